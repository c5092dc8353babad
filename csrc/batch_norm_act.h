#pragma once

#include <ATen/OpMathType.h>
#include <c10/core/MemoryFormat.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "check.h"

namespace fst_fast {

// The arguments that forward and backward of batch_norm_act have in common.
struct BatchNormArguments {
  const at::Tensor& x;                        // [N, C, H, W], channels-last or contiguous
  const std::optional<at::Tensor>& weight;    // [C], or none: ones
  const std::optional<at::Tensor>& bias;      // [C], or none: zeros
  const std::optional<at::Tensor>& residual;  // like x, or none
  bool relu;
  double eps;
};

// Where the elements of x are: in channels-last [rows, channels], else [images, channels, pixels].
struct BatchNormLayout {
  int64_t images, channels, pixels;
  bool channels_last;

  int64_t rows() const { return images * pixels; }
  at::MemoryFormat format() const {
    return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  }
};

inline at::ScalarType batch_norm_compute(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// One value for each channel, in the compute dtype.
inline void check_per_channel(const char* op, const char* name, const at::Tensor& tensor,
                              int64_t channels, at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == channels, op, ": ", name, " must be [",
                    channels, "] like the channels of x, got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ",
                    tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == device, op, ": ", name, " must be on ", device,
                    " like x, got ", tensor.device());
  check_contiguous(op, name, tensor);
}

inline void check_laid_out_as(const char* op, const char* name, const at::Tensor& tensor,
                              const at::Tensor& x, at::MemoryFormat format) {
  TORCH_CHECK_VALUE(tensor.sizes() == x.sizes() && tensor.scalar_type() == x.scalar_type(), op,
                    ": ", name, " must be ", x.sizes(), " ", x.scalar_type(), " like x, got ",
                    tensor.sizes(), " ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == x.device(), op, ": ", name, " must be on ", x.device(),
                    " like x, got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.is_contiguous(format), op, ": ", name,
                    " must have the memory layout of x, got strides ", tensor.strides(),
                    "; use contiguous(memory_format=...)");
}

// Checks the arguments of batch_norm_act, on every device.
inline BatchNormLayout check_batch_norm(const char* op, const BatchNormArguments& a) {
  const at::Tensor& x = a.x;
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": x must be [N, C, H, W], got ", x.sizes());
  const bool last = x.is_contiguous(at::MemoryFormat::ChannelsLast);
  TORCH_CHECK_VALUE(last || x.is_contiguous(), op,
                    ": x must be contiguous or channels-last, got strides ", x.strides(),
                    "; pass a contiguous tensor");
  const BatchNormLayout layout{x.size(0), x.size(1), x.size(2) * x.size(3), last};
  TORCH_CHECK_VALUE(layout.rows() > 1, op, ": x must hold more than one value per channel, got ",
                    x.sizes());
  const auto compute = batch_norm_compute(x);
  if (a.weight.has_value()) {
    check_per_channel(op, "weight", *a.weight, layout.channels, compute, x.device());
  }
  if (a.bias.has_value()) {
    check_per_channel(op, "bias", *a.bias, layout.channels, compute, x.device());
  }
  if (a.residual.has_value()) {
    check_laid_out_as(op, "residual", *a.residual, x, layout.format());
  }
  return layout;
}

// The further arguments of the backward.
inline BatchNormLayout check_batch_norm_backward(const char* op, const BatchNormArguments& a,
                                                 const at::Tensor& d_y, const at::Tensor& mean,
                                                 const at::Tensor& var) {
  const auto layout = check_batch_norm(op, a);
  check_laid_out_as(op, "d_y", d_y, a.x, layout.format());
  const auto compute = batch_norm_compute(a.x);
  check_per_channel(op, "mean", mean, layout.channels, compute, a.x.device());
  check_per_channel(op, "var", var, layout.channels, compute, a.x.device());
  return layout;
}

// Checks the arguments of batch_norm_update_, on every device.
inline void check_batch_norm_update(const at::Tensor& mean, const at::Tensor& var,
                                    const at::Tensor& running_mean, const at::Tensor& running_var,
                                    const std::optional<at::Tensor>& batches, int64_t count,
                                    std::optional<double> momentum) {
  const char* op = "batch_norm_update_";
  TORCH_CHECK_VALUE(mean.dim() == 1, op, ": mean must be [C], got ", mean.sizes());
  TORCH_CHECK_VALUE(mean.scalar_type() == at::kFloat || mean.scalar_type() == at::kDouble, op,
                    ": mean must be float32 or float64, got ", mean.scalar_type());
  check_contiguous(op, "mean", mean);
  check_like(op, "var", var, "mean", mean);
  check_like(op, "running_mean", running_mean, "mean", mean);
  check_like(op, "running_var", running_var, "mean", mean);
  TORCH_CHECK_VALUE(count > 1, op, ": count must be at least 2, got ", count);
  TORCH_CHECK_VALUE(momentum.has_value() || batches.has_value(), op,
                    ": num_batches_tracked must be given where momentum is None");
  if (batches.has_value()) {
    check_scalar(op, "num_batches_tracked", *batches, at::kLong, mean.device());
  }
}

}  // namespace fst_fast
