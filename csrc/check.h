#pragma once

#include <ATen/core/Tensor.h>

// Argument checks shared by the native ops. A message says: op, argument, expected, got, remedy.
namespace fst_fast {

inline void check_contiguous(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ",
                    tensor.strides(), "; pass a contiguous tensor");
}

// Same shape, dtype and device as `like`, and contiguous.
inline void check_like(const char* op, const char* name, const at::Tensor& tensor,
                       const char* like_name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.sizes() == like.sizes(), op, ": ", name, " must be ", like.sizes(),
                    " like ", like_name, ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must be ",
                    like.scalar_type(), " like ", like_name, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": ", name, " must be on ", like.device(),
                    " like ", like_name, ", got ", tensor.device());
  check_contiguous(op, name, tensor);
}

// A 0-d tensor that a kernel reads where it runs, so that no value crosses to the host.
inline void check_scalar(const char* op, const char* name, const at::Tensor& tensor,
                         at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_VALUE(tensor.dim() == 0 && tensor.scalar_type() == dtype, op, ": ", name,
                    " must be a 0-d ", dtype, " tensor, got ", tensor.sizes(), " ",
                    tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == device, op, ": ", name, " must be on ", device, ", got ",
                    tensor.device());
}

}  // namespace fst_fast
