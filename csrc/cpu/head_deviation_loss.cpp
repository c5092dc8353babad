#include "../head_deviation_loss.h"

#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include "head_few_classes.h"
#include "head_many_classes.h"

namespace fst_fast {
namespace {

Element element_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Element::kDouble;
    case at::kFloat:
      return Element::kFloat;
    case at::kBFloat16:
      return Element::kBFloat16;
    default:
      return Element::kHalf;
  }
}

template <typename compute_t>
compute_t scalar_or_one(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? *tensor->const_data_ptr<compute_t>() : compute_t(1);
}

template <typename compute_t>
class HeadLoss {
 public:
  explicit HeadLoss(const HeadDeviationArguments& arguments)
      : a(arguments),
        features_(a.features.contiguous()),
        weight_(a.weight.contiguous()),
        labels_(a.labels.contiguous()) {
    set_inputs();
    set_rows();
    set_outputs();
  }

  HeadDeviationResult run() {
    const double penalty = add_penalty();
    if (p.B == 0) {
      start_empty();
    } else if (p.K <= kSmallClasses) {
      FewClasses<compute_t>(p).run();
    } else {
      ManyClasses<compute_t>(p).run();
    }
    if (p.d_bias != nullptr) write_d_bias();
    return result(penalty);
  }

 private:
  static constexpr Element kCompute = compute_element<compute_t>;
  static constexpr at::ScalarType kComputeType = sizeof(compute_t) == 8 ? at::kDouble : at::kFloat;

  void set_inputs() {
    p.B = features_.size(0);
    p.D = features_.size(1);
    p.K = weight_.size(0);
    p.features_type = element_of(features_);
    p.weight_type = element_of(weight_);
    p.features = features_.const_data_ptr();
    p.weight = weight_.const_data_ptr();
    p.scale = scalar_or_one<compute_t>(a.weight_scale);
    p.labels = labels_.template const_data_ptr<int64_t>();
    p.ignore_index = a.ignore_index;
    p.smoothing = static_cast<compute_t>(a.label_smoothing);
    p.bias = nullptr;
    if (a.bias.has_value()) {
      const auto bias = a.bias->contiguous();
      auto* copy = arena_.take<compute_t>(p.K);
      kernels_.widen(p.weight_type, bias.const_data_ptr(), copy, p.K);
      p.bias = copy;
    }
    p.class_weight = nullptr;
    p.class_weight_sum = static_cast<compute_t>(p.K);
    if (a.class_weight.has_value()) {
      class_weight_ = a.class_weight->contiguous();
      p.class_weight = class_weight_.template const_data_ptr<compute_t>();
      double sum = 0;
      for (int64_t k = 0; k < p.K; ++k) sum += p.class_weight[k];
      p.class_weight_sum = static_cast<compute_t>(sum);
    }
  }

  // Weighs the rows; refuses a label that is out of range.
  void set_rows() {
    p.losses = arena_.take<compute_t>(p.B);
    p.hits = arena_.take<bool>(p.B);
    auto* skip = arena_.take<bool>(p.B);
    bool any = false;
    norm_ = 0;
    for (int64_t row = 0; row < p.B; ++row) {
      const int64_t label = p.labels[row];
      skip[row] = label == p.ignore_index;
      any |= skip[row];
      if (skip[row]) continue;
      TORCH_CHECK_VALUE(label >= 0 && label < p.K,
                        "head_deviation_loss: labels must be class indices below K, or "
                        "ignore_index, got ",
                        label, " in row ", row, "; mend the labels, or set ignore_index");
      norm_ += p.class_weight == nullptr ? 1.0 : static_cast<double>(p.class_weight[label]);
    }
    p.skip = any ? skip : nullptr;
    if (a.reduction != "mean") norm_ = 1;
    auto* row_scale = arena_.take<compute_t>(p.B);
    p.row_scale = row_scale;
    if (a.row_grad.has_value()) {
      const auto row_grad = a.row_grad->contiguous();
      std::copy_n(row_grad.template const_data_ptr<compute_t>(), p.B, row_scale);
    } else {
      std::fill_n(row_scale, p.B, static_cast<compute_t>(1 / norm_));
    }
  }

  void set_outputs() {
    const auto empty = [](const at::Tensor& like, bool wanted) {
      return wanted ? at::empty(like.sizes(), like.options())
                    : at::Tensor(at::detail::empty_cpu({0}, like.scalar_type()));
    };
    d_features_ = empty(features_, a.output_mask[0]);
    d_weight_ = empty(weight_, a.output_mask[1]);
    d_bias_ = at::detail::empty_cpu({a.output_mask[2] ? p.K : 0}, weight_.scalar_type());
    p.d_features = a.output_mask[0] ? d_features_.mutable_data_ptr() : nullptr;
    p.d_weight = a.output_mask[1] ? d_weight_.mutable_data_ptr() : nullptr;
    p.d_bias = a.output_mask[2] ? arena_.take<double>(p.K) : nullptr;
    if (p.d_bias != nullptr) std::fill_n(p.d_bias, p.K, 0.0);
  }

  // The penalty; and weight0's share in the gradient.
  double add_penalty() {
    p.weight0 = nullptr;
    p.share = 0;
    if (!a.weight0.has_value() || (a.alpha == 0 && !a.alpha_scale.has_value())) return 0;
    weight0_ = a.weight0->contiguous();
    p.weight0 = weight0_.const_data_ptr();
    const double strength = a.alpha * scalar_or_one<compute_t>(a.alpha_scale);
    double rows = 1;
    if (a.row_grad.has_value()) {
      rows = 0;
      for (int64_t row = 0; row < p.B; ++row) rows += p.row_scale[row];
    }
    p.share = static_cast<compute_t>(strength * rows);
    return strength * p.scale * overlap();
  }

  // <weight, weight0>, in blocks so that any number of threads gives the same sum.
  double overlap() {
    constexpr int64_t size = 1 << 14;
    const int64_t count = p.K * p.D;
    const int64_t blocks = (count + size - 1) / size;
    auto* partials = arena_.take<double>(blocks);
    at::parallel_for(0, blocks, grain(4.0 * size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        partials[i] = kernels_.dot(p.weight_type, advance(p.weight, p.weight_type, i * size),
                                   advance(p.weight0, p.weight_type, i * size),
                                   std::min(size, count - i * size));
      }
    });
    double sum = 0;
    for (int64_t i = 0; i < blocks; ++i) sum += partials[i];
    return sum;
  }

  // Without rows the gradients are the penalty's alone.
  void start_empty() {
    if (p.d_weight == nullptr) return;
    if (p.weight0 == nullptr) {
      d_weight_.zero_();
      return;
    }
    auto* copy = arena_.take<compute_t>(p.K * p.D);
    kernels_.widen(p.weight_type, p.weight0, copy, p.K * p.D);
    kernels_.narrow(p.weight_type, copy, p.share, nullptr, 0, p.d_weight, p.K * p.D);
  }

  void write_d_bias() {
    auto* sums = arena_.take<compute_t>(p.K);
    for (int64_t k = 0; k < p.K; ++k) sums[k] = static_cast<compute_t>(p.d_bias[k]);
    kernels_.narrow(p.weight_type, sums, 1, nullptr, 0, d_bias_.mutable_data_ptr(), p.K);
  }

  static at::Tensor scalar(double value) {
    at::Tensor tensor = at::detail::empty_cpu({}, kComputeType);
    *tensor.mutable_data_ptr<compute_t>() = static_cast<compute_t>(value);
    return tensor;
  }

  static at::Tensor count(int64_t value) {
    at::Tensor tensor = at::detail::empty_cpu({}, at::kLong);
    *tensor.mutable_data_ptr<int64_t>() = value;
    return tensor;
  }

  HeadDeviationResult result(double penalty) {
    int64_t correct = 0;
    double sum = 0;
    for (int64_t row = 0; row < p.B; ++row) {
      correct += p.hits[row] ? 1 : 0;
      sum += p.losses[row];
    }
    at::Tensor loss, cross_entropy;
    if (a.reduction == "none") {
      loss = at::empty({p.B}, features_.options().dtype(kComputeType));
      cross_entropy = at::empty({p.B}, loss.options());
      auto* total = loss.mutable_data_ptr<compute_t>();
      for (int64_t row = 0; row < p.B; ++row) {
        total[row] = p.losses[row] + static_cast<compute_t>(penalty);
      }
      std::copy_n(p.losses, p.B, cross_entropy.mutable_data_ptr<compute_t>());
    } else {
      loss = scalar(sum / norm_ + penalty);
      cross_entropy = scalar(sum / norm_);
    }
    return {std::move(loss), std::move(cross_entropy), scalar(penalty),      count(correct),
            count(-1),       std::move(d_features_),   std::move(d_weight_), std::move(d_bias_)};
  }

  const HeadDeviationArguments& a;
  const HeadKernels<compute_t>& kernels_ = head_kernels<compute_t>();
  HeadProblem<compute_t> p{};
  Arena arena_;
  double norm_;
  at::Tensor features_, weight_, labels_, weight0_, class_weight_;
  at::Tensor d_features_, d_weight_, d_bias_;
};

HeadDeviationResult head_deviation_loss_cpu(
    const at::Tensor& features, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& labels, const std::optional<at::Tensor>& weight0,
    const std::optional<at::Tensor>& class_weight, const std::optional<at::Tensor>& row_grad,
    const std::optional<at::Tensor>& weight_scale, const std::optional<at::Tensor>& alpha_scale,
    double alpha, std::string_view reduction, double label_smoothing, int64_t ignore_index,
    std::array<bool, 3> output_mask) {
  const HeadDeviationArguments arguments{
      features,     weight,      bias,  labels,    weight0,         class_weight, row_grad,
      weight_scale, alpha_scale, alpha, reduction, label_smoothing, ignore_index, output_mask};
  check_head_deviation_loss(arguments);
  if (features.scalar_type() == at::kDouble) return HeadLoss<double>(arguments).run();
  return HeadLoss<float>(arguments).run();
}

void rescale_cpu(at::TensorList tensors, const at::Tensor& factor) {
  TORCH_CHECK_VALUE(factor.dim() == 0 && at::isFloatingType(factor.scalar_type()),
                    "rescale_: factor must be a 0-d floating tensor, got ", factor.sizes(), " ",
                    factor.scalar_type());
  const auto type = factor.scalar_type();
  const double scale = type == at::kFloat    ? *factor.const_data_ptr<float>()
                       : type == at::kDouble ? *factor.const_data_ptr<double>()
                                             : factor.item<double>();
  if (scale == 1) return;
  for (const auto& tensor : tensors) {
    if (tensor.numel() > 0) tensor.mul_(scale);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fst_fast_native, CPU, m) {
  m.impl("head_deviation_loss", &head_deviation_loss_cpu);
  m.impl("rescale_", &rescale_cpu);
}

}  // namespace fst_fast
