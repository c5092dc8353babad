#include <ATen/Dispatch.h>

#include "head_deviation_finish.cuh"
#include "head_deviation_host.h"
#include "launch.h"

// A head of many classes: its logits exist for some rows at a time. cuBLAS multiplies; everything
// else is in kernels of which each reads what it needs once.
namespace fst_fast {
namespace {

constexpr size_t kTotalsBytes = kTotalThreads / kWarp * sizeof(double);

int blocks_for(int64_t count, int64_t each, int64_t most) {
  return static_cast<int>(std::clamp<int64_t>((count + each - 1) / each, 1, most));
}

int64_t bytes_of(at::ScalarType dtype) { return static_cast<int64_t>(c10::elementSize(dtype)); }

// Whether the products need a weight of their own: of another dtype, or with zeros behind it.
bool copies_weight(const HeadInputs& in) {
  return in.weight.scalar_type() != in.features.scalar_type() || product_classes(in) != in.K;
}

struct Chunks {
  int64_t rows;
  int64_t pitch;  // logits from row to row; aligned whatever K is, as cuBLAS likes it
};

// Peak memory beyond inputs and results is a quarter of float32 logits, or logits_bytes and what
// the weight needs if that is more. Logits are in the compute dtype: rounded to bfloat16 twice the
// rows would fit, but the loss would be off by more than eager PyTorch's at times.
Chunks plan_chunks(const HeadInputs& in) {
  const auto narrow = in.features.scalar_type();
  const auto compute = compute_type(in.features);
  const int64_t pitch = rounded_up(in.K, 64);
  const int64_t row =
      pitch * bytes_of(compute) + (narrow == compute ? 0 : in.D * bytes_of(compute));
  if (in.B * row <= head_limits.logits_bytes) return {in.B, pitch};

  int64_t taken = in.wanted[1] ? in.B * in.D * bytes_of(narrow) : 0;
  if (copies_weight(in)) taken += product_classes(in) * in.D * bytes_of(narrow);
  if (in.weight.scalar_type() != compute && in.wanted[1]) {
    taken += product_classes(in) * in.D * bytes_of(compute);
  }
  const int64_t left = std::max(in.B * in.K - taken, head_limits.logits_bytes);
  const int64_t fitting = std::max(left / row, head_limits.chunk_rows);
  const int64_t most = fitting / head_limits.chunk_rows * head_limits.chunk_rows;
  const int64_t count = (in.B + most - 1) / most;
  return {rounded_up((in.B + count - 1) / count, head_limits.chunk_rows), pitch};
}

template <typename scalar_t, typename weight_t>
class ManyClasses {
  using compute_t = compute_of<scalar_t>;

 public:
  ManyClasses(const HeadInputs& in, const HeadOutputs& out)
      : in_(in),
        out_(out),
        terms_(loss_terms<compute_t>(in)),
        chunks_(plan_chunks(in)),
        classes_(product_classes(in)) {
    compute_ = in.features.options().dtype(compute_type(in.features));
    narrow_ = in.features.options();
    const auto bytes = in.labels.options().dtype(at::kByte);
    totals_memory_ = at::empty({static_cast<int64_t>(sizeof(Totals<compute_t>))}, bytes);
    totals_ = static_cast<Totals<compute_t>*>(totals_memory_.mutable_data_ptr());
    losses_ = in.reduction == Reduction::none ? out.cross_entropy : at::empty({in.B}, compute_);
    correct_ = at::empty({in.B}, bytes);
    bias_ = in.bias.defined() ? in.bias.to(compute_.dtype()) : in.bias;
  }

  void run() {
    begin();
    if (in_.B == 0 && in_.wanted[2]) out_.d_bias.zero_();
    if (in_.B == 0) return finish({}, {}, 0);
    const auto memory = at::empty({chunks_.rows * chunks_.pitch}, compute_);
    const int64_t grad_pitch =
        chunks_.pitch * static_cast<int64_t>(sizeof(compute_t) / sizeof(scalar_t));
    if (in_.wanted[1]) {
      // d_weight itself, unless its dtype would round the sum of a chunk.
      products_ = out_.d_weight.scalar_type() == compute_type(in_.features)
                      ? out_.d_weight.as_strided({classes_, in_.D}, {in_.D, 1})
                      : at::empty({classes_, in_.D}, compute_);
    }
    if (in_.wanted[2]) bias_sums_ = at::empty({in_.K}, compute_);
    for (int64_t first = 0; first < in_.B; first += chunks_.rows) {
      const int64_t count = std::min(chunks_.rows, in_.B - first);
      const auto logits = memory.as_strided({count, classes_}, {chunks_.pitch, 1});
      const auto d_logits = memory.view(narrow_.dtype().toScalarType())
                                .as_strided({count, classes_}, {grad_pitch, 1});
      product(logits, in_.features.narrow(0, first, count), matrix_.t(), false);
      find_d_logits(logits, d_logits, first);
      at::Tensor d_features;
      if (in_.wanted[0]) {
        const bool same = std::is_same_v<scalar_t, compute_t>;
        d_features =
            same ? out_.d_features.narrow(0, first, count) : at::empty({count, in_.D}, compute_);
        product(d_features, d_logits, matrix_, false);
      }
      if (in_.wanted[1]) {
        product(products_, d_logits.t(), masked_.narrow(0, first, count), first > 0);
      }
      const bool last = first + count == in_.B;
      if (last || in_.wanted[0] || in_.wanted[2]) finish(d_logits, d_features, first);
    }
  }

 private:
  void begin() {
    constexpr int kVector = 16 / sizeof(scalar_t);
    const auto blocks = [](int64_t count, bool packs) {
      return blocks_for(count, kTotalThreads * (packs ? kVector : 1), kOperandBlocks);
    };
    BeginArguments<scalar_t, weight_t> a{};
    a.terms = terms_;
    a.alpha_scale = read<compute_t>(in_.alpha_scale);
    a.alpha = static_cast<compute_t>(in_.alpha);
    a.totals = totals_;
    // A row that is ignored may hold NaN, which a product with zeros would keep.
    if (in_.wanted[1] && in_.features.numel() > 0) {
      masked_ = at::empty({in_.B, in_.D}, narrow_);
      a.features = read<scalar_t>(in_.features);
      a.masked = write<scalar_t>(masked_);
      a.columns = in_.D;
      a.mask_packs = packs_fit({in_.features, masked_}, kVector);
      a.mask_blocks = blocks(in_.B * in_.D, a.mask_packs);
    }
    matrix_ = in_.weight;
    if (copies_weight(in_) && in_.B > 0) {
      matrix_ = at::empty({classes_, in_.D}, narrow_);
      a.weight = read<weight_t>(in_.weight);
      a.narrow = write<scalar_t>(matrix_);
      a.weights = in_.K * in_.D;
      a.weights_and_zeros = matrix_.numel();
      a.narrow_packs = packs_fit({flat(in_.weight), flat(matrix_)}, 1);
      a.narrow_blocks = blocks(a.weights, a.narrow_packs);
    }
    launch(head_deviation_begin_kernel<scalar_t, weight_t>, 1 + a.mask_blocks + a.narrow_blocks,
           kTotalThreads, kTotalsBytes, a);
  }

  void find_d_logits(const at::Tensor& logits, const at::Tensor& d_logits, int64_t first) {
    const bool wanted = in_.wanted[0] || in_.wanted[1] || in_.wanted[2];
    RowArguments<scalar_t> arguments{};
    arguments.terms = terms_;
    arguments.logits = read<compute_t>(logits);
    arguments.d_logits = wanted ? write<scalar_t>(d_logits) : nullptr;
    arguments.pitch = logits.stride(0);
    arguments.grad_pitch = d_logits.stride(0);
    arguments.first_row = first;
    arguments.bias = read<compute_t>(bias_);
    arguments.weight_scale = read<compute_t>(in_.weight_scale);
    arguments.totals = totals_;
    arguments.losses = write<compute_t>(losses_);
    arguments.correct = write<uint8_t>(correct_);
    // Two packs a thread, for heads that leave most of a full block without work.
    const int64_t threads = rounded_up((in_.K + 2 * kRowPack - 1) / (2 * kRowPack), kWarp);
    launch(head_deviation_row_kernel<scalar_t>, logits.size(0),
           static_cast<int>(std::clamp<int64_t>(threads, 2 * kWarp, kRowThreads)),
           sizeof(RowShared<compute_t>), arguments);
  }

  // What follows the products of the rows from `first` on; all that is left after the last ones.
  void finish(const at::Tensor& d_logits, const at::Tensor& d_features, int64_t first) {
    FinishArguments<scalar_t, weight_t> a{};
    a.terms = terms_;
    a.weight_scale = read<compute_t>(in_.weight_scale);
    a.totals = totals_;
    a.last = in_.B == 0 || first + d_logits.size(0) == in_.B;
    if (in_.wanted[0] && d_features.defined() && d_features.numel() > 0) {
      fill_features(a.features, d_features, first);
    }
    if (in_.wanted[2] && d_logits.defined()) fill_bias(a, d_logits, first);
    if (a.last && (in_.wanted[1] || in_.weight0.defined())) fill_weight(a.weight);
    if (a.last) fill_sums(a.sums);
    const int blocks = a.bias.blocks + a.features.blocks + a.weight.blocks;
    // Partial sums of d_bias, or a sum by warp.
    const size_t shared = kFinishThreads * sizeof(compute_t);
    launch(head_deviation_finish_kernel<scalar_t, weight_t>, std::max(blocks, 1), kFinishThreads,
           shared, a);
  }

  void fill_features(FeaturesPart<scalar_t>& part, const at::Tensor& products, int64_t first) {
    constexpr int kVector = 16 / sizeof(scalar_t);
    const auto out = out_.d_features.narrow(0, first, products.size(0));
    part.products = read<compute_t>(products);
    part.d_features = write<scalar_t>(out);
    part.first_row = first;
    part.count = products.size(0);
    part.columns = in_.D;
    part.packs = packs_fit({products, out}, kVector);
    part.blocks = finish_blocks(products.numel(), part.packs ? kVector : 1);
  }

  void fill_bias(FinishArguments<scalar_t, weight_t>& a, const at::Tensor& d_logits,
                 int64_t first) {
    a.bias.d_logits = read<scalar_t>(d_logits);
    a.bias.pitch = d_logits.stride(0);
    a.bias.count = d_logits.size(0);
    a.bias.sums = write<compute_t>(bias_sums_);
    a.bias.d_bias = a.last ? write<weight_t>(out_.d_bias) : nullptr;
    a.bias.first = first == 0;
    a.bias.blocks = static_cast<int>((in_.K + kWarp - 1) / kWarp);
  }

  void fill_weight(WeightPart<weight_t, compute_t>& part) {
    constexpr int kVector = 16 / sizeof(weight_t);
    part.count = in_.K * in_.D;
    // What is left over at the end of the tensor moves one by one.
    part.packs =
        packs_fit({flat(in_.weight), flat(in_.weight0), flat(out_.d_weight), flat(products_)}, 1);
    part.blocks = finish_blocks(part.count, kVector);
    overlaps_ = at::empty({part.blocks}, compute_.dtype(at::kDouble));
    part.products = read<compute_t>(products_);
    part.weight = read<weight_t>(in_.weight);
    part.weight0 = read<weight_t>(in_.weight0);
    part.d_weight = write<weight_t>(out_.d_weight);
    part.overlaps = write<double>(overlaps_);
  }

  void fill_sums(SumsPart<compute_t>& part) {
    part.losses = read<compute_t>(losses_);
    part.right = read<uint8_t>(correct_);
    part.each_row = in_.reduction == Reduction::none;
    part.loss = write<compute_t>(out_.loss);
    part.cross_entropy = write<compute_t>(out_.cross_entropy);
    part.penalty = write<compute_t>(out_.penalty);
    part.correct = write<int64_t>(out_.correct);
    part.invalid = write<int64_t>(out_.invalid);
  }

  static at::Tensor flat(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.view({-1, 1}) : tensor;
  }

  static int finish_blocks(int64_t count, int64_t vector) {
    return blocks_for(count, kFinishThreads * vector, kFinishBlocks);
  }

  const HeadInputs& in_;
  const HeadOutputs& out_;
  const LossTerms<compute_t> terms_;
  const Chunks chunks_;
  const int64_t classes_;  // of the products
  at::TensorOptions compute_, narrow_;
  at::Tensor totals_memory_, losses_, correct_, bias_, masked_, matrix_, products_, bias_sums_,
      overlaps_;
  Totals<compute_t>* totals_;
};

}  // namespace

void head_of_many_classes(const HeadInputs& in, const HeadOutputs& out) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.features.scalar_type(),
                                  "head_deviation_loss", [&] {
                                    if (in.weight.scalar_type() == in.features.scalar_type()) {
                                      ManyClasses<scalar_t, scalar_t>(in, out).run();
                                    } else {
                                      ManyClasses<scalar_t, compute_of<scalar_t>>(in, out).run();
                                    }
                                  });
}

}  // namespace fst_fast
