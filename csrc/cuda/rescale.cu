#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "../check.h"
#include "device.cuh"
#include "launch.h"

namespace fst_fast {
namespace {

constexpr int kRescaleThreads = 256;
constexpr int64_t kRescaleBlocks = 2048;  // at most
constexpr int kTensors = 3;               // of one launch

enum class Kind { none, float64, float32, float16, bfloat16 };

struct Rescale {
  struct {
    void* values;
    int64_t count;
    Kind kind;
  } tensors[kTensors];
  const void* factor;
  bool double_factor;
};

template <int kVector, typename scalar_t>
__device__ void rescale_packs(scalar_t* values, int64_t packs, compute_of<scalar_t> factor) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kRescaleThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kRescaleThreads;
  for (int64_t i = thread; i < packs; i += threads) {
    auto pack = load_pack<kVector>(values + i * kVector);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      pack.at[j] = static_cast<scalar_t>(static_cast<compute_of<scalar_t>>(pack.at[j]) * factor);
    }
    store_pack(values + i * kVector, pack);
  }
}

template <typename scalar_t>
__device__ void rescale_tensor(void* memory, int64_t count, double factor) {
  constexpr int kVector = 16 / sizeof(scalar_t);
  auto* values = static_cast<scalar_t*>(memory);
  const auto by = static_cast<compute_of<scalar_t>>(factor);
  const bool aligned = reinterpret_cast<uintptr_t>(memory) % 16 == 0;
  const int64_t packs = aligned ? count / kVector : 0;
  rescale_packs<kVector>(values, packs, by);
  rescale_packs<1>(values + packs * kVector, count - packs * kVector, by);
}

__global__ void __launch_bounds__(kRescaleThreads) rescale_kernel(Rescale a) {
  const double factor = a.double_factor ? *static_cast<const double*>(a.factor)
                                        : *static_cast<const float*>(a.factor);
  if (factor == 1) return;
#pragma unroll
  for (int i = 0; i < kTensors; ++i) {
    const auto& tensor = a.tensors[i];
    switch (tensor.kind) {
      case Kind::float64:
        rescale_tensor<double>(tensor.values, tensor.count, factor);
        break;
      case Kind::float32:
        rescale_tensor<float>(tensor.values, tensor.count, factor);
        break;
      case Kind::float16:
        rescale_tensor<c10::Half>(tensor.values, tensor.count, factor);
        break;
      case Kind::bfloat16:
        rescale_tensor<c10::BFloat16>(tensor.values, tensor.count, factor);
        break;
      case Kind::none:
        break;
    }
  }
}

Kind kind_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Kind::float64;
    case at::kFloat:
      return Kind::float32;
    case at::kHalf:
      return Kind::float16;
    case at::kBFloat16:
      return Kind::bfloat16;
    default:
      TORCH_CHECK_VALUE(false, "rescale_: tensors must be float64, float32, float16 or bfloat16, ",
                        "got ", tensor.scalar_type());
  }
}

void rescale_cuda(at::TensorList tensors, const at::Tensor& factor) {
  TORCH_CHECK_VALUE(factor.numel() == 1 &&
                        (factor.scalar_type() == at::kFloat || factor.scalar_type() == at::kDouble),
                    "rescale_: factor must be one float32 or float64, got ", factor.sizes(), " ",
                    factor.scalar_type());
  const DeviceGuard guard(factor.device());
  for (size_t first = 0; first < tensors.size(); first += kTensors) {
    Rescale arguments{};
    arguments.factor = factor.const_data_ptr();
    arguments.double_factor = factor.scalar_type() == at::kDouble;
    int64_t most = 0;
    for (size_t i = first; i < std::min(first + kTensors, tensors.size()); ++i) {
      const at::Tensor& tensor = tensors[i];
      TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense() && tensor.device() == factor.device(),
                        "rescale_: tensors must be dense and on ", factor.device(),
                        " like factor, got ", tensor.sizes(), " with strides ", tensor.strides(),
                        " on ", tensor.device());
      const Kind kind = kind_of(tensor);
      if (tensor.numel() == 0) continue;
      arguments.tensors[i - first] = {tensor.mutable_data_ptr(), tensor.numel(), kind};
      most = std::max(most, tensor.numel());
    }
    if (most == 0) continue;
    const int64_t per_block = 4 * kRescaleThreads;
    const int64_t blocks = std::min((most + per_block - 1) / per_block, kRescaleBlocks);
    launch(rescale_kernel, blocks, kRescaleThreads, 0, arguments);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fst_fast_native, CUDA, m) { m.impl("rescale_", &rescale_cuda); }

}  // namespace fst_fast
