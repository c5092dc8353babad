#pragma once

#include <optional>

#include "check.h"

namespace fst_fast {

// What head_step_ asks of its arguments, on every device.
inline void check_head_step(const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const at::Tensor& d_weight, const std::optional<at::Tensor>& d_bias,
                            const at::Tensor& weight_momentum,
                            const std::optional<at::Tensor>& bias_momentum, const at::Tensor& lr,
                            const std::optional<at::Tensor>& norm,
                            const std::optional<at::Tensor>& weight_scale,
                            const std::optional<at::Tensor>& found_inf) {
  const char* op = "head_step_";
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight must be [K, D], got ", weight.sizes());
  check_contiguous(op, "weight", weight);
  check_like(op, "d_weight", d_weight, "weight", weight);
  check_like(op, "weight_momentum", weight_momentum, "weight", weight);
  TORCH_CHECK_VALUE(
      bias.has_value() == d_bias.has_value() && bias.has_value() == bias_momentum.has_value(), op,
      ": bias, d_bias and bias_momentum must be given together or not at all");
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": bias must be [",
                      weight.size(0), "] like the rows of weight, got ", bias->sizes());
    TORCH_CHECK_VALUE(bias->scalar_type() == weight.scalar_type(), op, ": bias must be ",
                      weight.scalar_type(), " like weight, got ", bias->scalar_type());
    TORCH_CHECK_VALUE(bias->device() == weight.device(), op, ": bias must be on ", weight.device(),
                      " like weight, got ", bias->device());
    check_contiguous(op, "bias", *bias);
    check_like(op, "d_bias", *d_bias, "bias", *bias);
    check_like(op, "bias_momentum", *bias_momentum, "bias", *bias);
  }
  const auto compute = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  check_scalar(op, "lr", lr, compute, weight.device());
  if (norm.has_value()) check_scalar(op, "norm", *norm, compute, weight.device());
  if (weight_scale.has_value()) {
    check_scalar(op, "weight_scale", *weight_scale, compute, weight.device());
  }
  if (found_inf.has_value()) {
    check_scalar(op, "found_inf", *found_inf, at::kFloat, weight.device());
  }
}

}  // namespace fst_fast
