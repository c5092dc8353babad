#pragma once

#include <array>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>

#include "check.h"

namespace fst_fast {

// What head_deviation_loss takes, on every device. Tensors are [B, D], [K, D], [K] and [B].
struct HeadDeviationArguments {
  const at::Tensor& features;                     // [B, D]
  const at::Tensor& weight;                       // [K, D]; the head's weight is weight_scale * it
  const std::optional<at::Tensor>& bias;          // [K]
  const at::Tensor& labels;                       // [B] int64
  const std::optional<at::Tensor>& weight0;       // [K, D]
  const std::optional<at::Tensor>& class_weight;  // [K] compute dtype
  const std::optional<at::Tensor>& row_grad;      // [B] compute dtype; with reduction "none" only
  const std::optional<at::Tensor>& weight_scale;  // 0-d compute dtype
  const std::optional<at::Tensor>& alpha_scale;   // 0-d compute dtype; multiplies alpha
  double alpha;
  std::string_view reduction;
  double label_smoothing;
  int64_t ignore_index;
  std::array<bool, 3> output_mask;  // d_features, d_weight, d_bias
};

// loss, cross_entropy, penalty, correct, invalid, d_features, d_weight, d_bias; a gradient that was
// not asked for has no elements.
using HeadDeviationResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                       at::Tensor, at::Tensor, at::Tensor>;

inline at::ScalarType compute_type(const at::Tensor& features) {
  return features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Brief: whoever comes through fst_fast.ops gets the longer words of its checks.
inline void check_head_deviation_loss(const HeadDeviationArguments& a) {
  const char* op = "head_deviation_loss";
  const auto floating = a.features.scalar_type();
  TORCH_CHECK_VALUE(a.features.dim() == 2 && a.weight.dim() == 2 &&
                        a.weight.size(1) == a.features.size(1) && a.weight.numel() > 0,
                    op, ": features and weight must be [B, D] and [K, D], got ", a.features.sizes(),
                    " and ", a.weight.sizes());
  TORCH_CHECK_VALUE(floating == at::kDouble || floating == at::kFloat || floating == at::kHalf ||
                        floating == at::kBFloat16,
                    op, ": features must be float64, float32, bfloat16 or float16, got ", floating);
  const auto compute = compute_type(a.features);
  const auto matrix = a.weight.scalar_type();
  TORCH_CHECK_VALUE(matrix == floating || matrix == compute, op, ": weight must be ", floating,
                    " or ", compute, ", got ", matrix);
  const auto K = a.weight.size(0);
  const auto B = a.features.size(0);
  const auto require = [&](const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                           at::ScalarType dtype) {
    TORCH_CHECK_VALUE(tensor.sizes() == shape && tensor.scalar_type() == dtype &&
                          tensor.device() == a.features.device(),
                      op, ": ", name, " must be ", dtype, " ", shape, " on ", a.features.device(),
                      ", got ", tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
  };
  const auto require_constant = [&](const char* name, const std::optional<at::Tensor>& tensor,
                                    at::IntArrayRef shape, at::ScalarType dtype) {
    if (!tensor.has_value()) return;
    require(name, *tensor, shape, dtype);
    TORCH_CHECK_VALUE(!tensor->requires_grad(), op, ": ", name, " must not require grad");
  };
  require("weight", a.weight, a.weight.sizes(), matrix);
  if (a.bias.has_value()) require("bias", *a.bias, {K}, matrix);
  require("labels", a.labels, {B}, at::kLong);
  require_constant("weight0", a.weight0, a.weight.sizes(), matrix);
  require_constant("class_weight", a.class_weight, {K}, compute);
  require_constant("row_grad", a.row_grad, {B}, compute);
  require_constant("weight_scale", a.weight_scale, {}, compute);
  require_constant("alpha_scale", a.alpha_scale, {}, compute);
  TORCH_CHECK_VALUE(std::isfinite(a.alpha), op, ": alpha must be finite, got ", a.alpha);
  TORCH_CHECK_VALUE(a.weight0.has_value() || (a.alpha == 0 && !a.alpha_scale.has_value()), op,
                    ": weight0 must be given unless alpha is 0");
  TORCH_CHECK_VALUE(a.label_smoothing >= 0 && a.label_smoothing <= 1, op,
                    ": label_smoothing must be in [0, 1], got ", a.label_smoothing);
  TORCH_CHECK_VALUE(a.reduction == "mean" || a.reduction == "sum" || a.reduction == "none", op,
                    ": reduction must be mean, sum or none, got ", a.reduction);
  TORCH_CHECK_VALUE(!a.row_grad.has_value() || a.reduction == "none", op,
                    ": row_grad needs reduction none");
}

}  // namespace fst_fast
