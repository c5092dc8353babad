#include <ATen/Dispatch.h>

#include "head_deviation_finish.cuh"
#include "head_deviation_host.h"
#include "launch.h"

// A head of many classes: its logits exist for some rows at a time. cuBLAS multiplies; everything
// else is in kernels of which each reads what it needs once.
namespace fst_fast {
namespace {

constexpr size_t kSumsBytes = kTotalThreads / kWarp * sizeof(double);

int64_t rounded_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int64_t bytes_of(at::ScalarType dtype) { return static_cast<int64_t>(c10::elementSize(dtype)); }

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
  if (in.weight.scalar_type() != narrow) taken += in.K * in.D * bytes_of(narrow);
  if (in.weight.scalar_type() != compute && in.wanted[1]) {
    taken += in.K * in.D * bytes_of(compute);
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
      : in_(in), out_(out), terms_(loss_terms<compute_t>(in)), chunks_(plan_chunks(in)) {
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
    const TotalsArguments<compute_t> arguments{terms_, read<compute_t>(in_.alpha_scale),
                                               static_cast<compute_t>(in_.alpha), totals_};
    launch(head_deviation_totals_kernel<compute_t>, 1, kTotalThreads, kSumsBytes, arguments);
    if (in_.B > 0) run_rows();
    finish_weight();
    finish_sums();
  }

 private:
  void run_rows() {
    const auto matrix = in_.weight.to(narrow_.dtype());
    const auto memory = at::empty({chunks_.rows * chunks_.pitch}, compute_);
    const int64_t grad_pitch =
        chunks_.pitch * static_cast<int64_t>(sizeof(compute_t) / sizeof(scalar_t));
    const auto features = in_.wanted[1] ? masked_features() : at::Tensor();
    if (in_.wanted[1]) {
      // d_weight itself, unless its dtype would round the sum of a chunk.
      products_ = out_.d_weight.scalar_type() == compute_type(in_.features)
                      ? out_.d_weight
                      : at::empty({in_.K, in_.D}, compute_);
    }
    if (in_.wanted[2]) bias_sums_ = at::empty({in_.K}, compute_);
    for (int64_t first = 0; first < in_.B; first += chunks_.rows) {
      const int64_t count = std::min(chunks_.rows, in_.B - first);
      const auto logits = memory.as_strided({count, in_.K}, {chunks_.pitch, 1});
      const auto d_logits =
          memory.view(narrow_.dtype().toScalarType()).as_strided({count, in_.K}, {grad_pitch, 1});
      product(logits, in_.features.narrow(0, first, count), matrix.t(), false);
      find_d_logits(logits, d_logits, first);
      if (in_.wanted[0]) find_d_features(d_logits, matrix, first);
      if (in_.wanted[1]) {
        product(products_, d_logits.t(), features.narrow(0, first, count), first > 0);
      }
      if (in_.wanted[2]) add_d_bias(d_logits, first);
    }
  }

  // A row that is ignored may hold NaN, which a product with zeros would keep.
  at::Tensor masked_features() {
    const auto masked = at::empty({in_.B, in_.D}, narrow_);
    const MaskArguments<scalar_t> arguments{terms_, read<scalar_t>(in_.features),
                                            write<scalar_t>(masked), in_.D};
    constexpr int kVector = 16 / sizeof(scalar_t);
    const auto kernel = packs_fit({in_.features, masked}, kVector)
                            ? head_deviation_mask_kernel<scalar_t, kVector>
                            : head_deviation_mask_kernel<scalar_t, 1>;
    launch(kernel, in_.B, 128, 0, arguments);
    return masked;
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

  void find_d_features(const at::Tensor& d_logits, const at::Tensor& matrix, int64_t first) {
    constexpr int kVector = 16 / sizeof(scalar_t);
    const int64_t count = d_logits.size(0);
    const auto out = out_.d_features.narrow(0, first, count);
    const auto products =
        std::is_same_v<scalar_t, compute_t> ? out : at::empty({count, in_.D}, compute_);
    product(products, d_logits, matrix, false);
    FeaturesArguments<scalar_t> arguments{};
    arguments.terms = terms_;
    arguments.products = read<compute_t>(products);
    arguments.d_features = write<scalar_t>(out);
    arguments.first_row = first;
    arguments.count = count;
    arguments.columns = in_.D;
    arguments.weight_scale = read<compute_t>(in_.weight_scale);
    arguments.totals = totals_;
    const bool packs = packs_fit({products, out}, kVector);
    const auto kernel = packs ? head_deviation_features_kernel<scalar_t, kVector>
                              : head_deviation_features_kernel<scalar_t, 1>;
    launch(kernel, finish_blocks(count * in_.D, packs ? kVector : 1), kFinishThreads, 0, arguments);
  }

  void add_d_bias(const at::Tensor& d_logits, int64_t first) {
    BiasArguments<scalar_t, weight_t> arguments{};
    arguments.d_logits = read<scalar_t>(d_logits);
    arguments.pitch = d_logits.stride(0);
    arguments.count = d_logits.size(0);
    arguments.classes = in_.K;
    arguments.sums = write<compute_t>(bias_sums_);
    arguments.first = first == 0;
    const bool last = first + d_logits.size(0) == in_.B;
    arguments.d_bias = last ? write<weight_t>(out_.d_bias) : nullptr;
    arguments.totals = totals_;
    launch(head_deviation_bias_kernel<scalar_t, weight_t>, (in_.K + kWarp - 1) / kWarp,
           kTotalThreads, kTotalThreads * sizeof(compute_t), arguments);
  }

  void finish_weight() {
    if (in_.B == 0 && in_.wanted[2]) out_.d_bias.zero_();
    if (!in_.wanted[1] && !in_.weight0.defined()) return;
    constexpr int kVector = 16 / sizeof(weight_t);
    const int64_t count = in_.K * in_.D;
    parts_ = finish_blocks(count, kVector);
    overlaps_ = at::empty({parts_}, compute_.dtype(at::kDouble));
    WeightArguments<weight_t, compute_t> arguments{};
    arguments.products = read<compute_t>(products_);
    arguments.weight = read<weight_t>(in_.weight);
    arguments.weight0 = read<weight_t>(in_.weight0);
    arguments.d_weight = write<weight_t>(out_.d_weight);
    arguments.weight_scale = read<compute_t>(in_.weight_scale);
    arguments.totals = totals_;
    arguments.overlaps = write<double>(overlaps_);
    arguments.count = count;
    // Flat: what is left over at the end of the tensor moves one by one.
    const auto flat = [](const at::Tensor& t) { return t.defined() ? t.view({-1, 1}) : t; };
    const bool packs =
        packs_fit({flat(in_.weight), flat(in_.weight0), flat(out_.d_weight), flat(products_)}, 1);
    launch(packs ? head_deviation_weight_kernel<weight_t, compute_t, kVector>
                 : head_deviation_weight_kernel<weight_t, compute_t, 1>,
           parts_, kFinishThreads, kSumsBytes, arguments);
  }

  void finish_sums() {
    SumsArguments<compute_t> arguments{};
    arguments.losses = read<compute_t>(losses_);
    arguments.right = read<uint8_t>(correct_);
    arguments.overlaps = read<double>(overlaps_);
    arguments.totals = totals_;
    arguments.rows = in_.B;
    arguments.parts = static_cast<int>(parts_);
    arguments.has_penalty = in_.weight0.defined();
    arguments.each_row = in_.reduction == Reduction::none;
    arguments.loss = write<compute_t>(out_.loss);
    arguments.cross_entropy = write<compute_t>(out_.cross_entropy);
    arguments.penalty = write<compute_t>(out_.penalty);
    arguments.correct = write<int64_t>(out_.correct);
    arguments.invalid = write<int64_t>(out_.invalid);
    launch(head_deviation_sums_kernel<compute_t>, 1, kTotalThreads, kSumsBytes, arguments);
  }

  static int64_t finish_blocks(int64_t count, int64_t vector) {
    const int64_t each = kFinishThreads * vector;
    return std::clamp<int64_t>((count + each - 1) / each, 1, kFinishBlocks);
  }

  const HeadInputs& in_;
  const HeadOutputs& out_;
  const LossTerms<compute_t> terms_;
  const Chunks chunks_;
  at::TensorOptions compute_, narrow_;
  at::Tensor totals_memory_, losses_, correct_, bias_, products_, bias_sums_, overlaps_;
  Totals<compute_t>* totals_;
  int64_t parts_ = 0;
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
