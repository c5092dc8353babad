#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "../head_step.h"

namespace fst_fast {
namespace {

constexpr int kThreads = 512;
constexpr int kWarp = 32;
// Up to here one block beats the cost of a grid-wide barrier.
constexpr int64_t kOneBlock = 16384;

template <typename scalar_t>
struct Step {
  using compute_t = at::opmath_type<scalar_t>;

  scalar_t* weight;           // [count]
  const scalar_t* d_weight;   // [count]
  scalar_t* weight_momentum;  // [count]
  int64_t count;
  scalar_t* bias;           // [bias_count]
  const scalar_t* d_bias;   // [bias_count]
  scalar_t* bias_momentum;  // [bias_count]
  int64_t bias_count;
  const compute_t* lr;
  const compute_t* norm;   // null: no projection
  const float* found_inf;  // null: always step
  double* partials;        // [gridDim.x]; unused with one block
  compute_t momentum;
};

// kVector neighbours that move with one load or store.
template <typename scalar_t, int kVector>
struct alignas(sizeof(scalar_t) * kVector) Pack {
  scalar_t at[kVector];
};

// Multiply and add are rounded one by one, as in eager PyTorch: nvcc would fuse a * b + c.
__device__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ double multiply(double a, double b) { return __dmul_rn(a, b); }

template <typename scalar_t, typename compute_t>
__device__ scalar_t next_momentum(scalar_t m, scalar_t g, compute_t momentum) {
  const auto product = multiply(momentum, static_cast<compute_t>(m));
  return static_cast<scalar_t>(product + static_cast<compute_t>(g));
}

template <typename scalar_t, typename compute_t>
__device__ compute_t moved(scalar_t w, scalar_t m, compute_t lr) {
  return static_cast<compute_t>(w) - multiply(lr, static_cast<compute_t>(m));
}

// The sum over the block, added in a fixed order; every thread gets it.
__device__ double block_sum(double value) {
  __shared__ double warp_sums[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffff, value, offset);
  }
  // A thread may still be reading what an earlier call left in warp_sums.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += warp_sums[warp];
  return sum;
}

// m <- round(momentum * m + g) for elements [i, i + kVector); returns the sum of (w - lr * m)^2.
template <int kVector, typename scalar_t, typename compute_t>
__device__ compute_t advance(const Step<scalar_t>& step, int64_t i, compute_t lr) {
  using pack_t = Pack<scalar_t, kVector>;
  const auto w = *reinterpret_cast<const pack_t*>(step.weight + i);
  const auto g = *reinterpret_cast<const pack_t*>(step.d_weight + i);
  auto m = *reinterpret_cast<const pack_t*>(step.weight_momentum + i);
  compute_t squares = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    m.at[j] = next_momentum(m.at[j], g.at[j], step.momentum);
    const auto v = moved(w.at[j], m.at[j], lr);
    squares += v * v;
  }
  *reinterpret_cast<pack_t*>(step.weight_momentum + i) = m;
  return squares;
}

// w <- round((w - lr * m) * scale) for elements [i, i + kVector).
template <int kVector, typename scalar_t, typename compute_t>
__device__ void write(const Step<scalar_t>& step, int64_t i, compute_t lr, compute_t scale) {
  using pack_t = Pack<scalar_t, kVector>;
  auto w = *reinterpret_cast<const pack_t*>(step.weight + i);
  const auto m = *reinterpret_cast<const pack_t*>(step.weight_momentum + i);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    w.at[j] = static_cast<scalar_t>(moved(w.at[j], m.at[j], lr) * scale);
  }
  *reinterpret_cast<pack_t*>(step.weight + i) = w;
}

// norm / ||v||, from each thread's part of ||v||^2. Every thread of every block must call it.
template <typename scalar_t, typename compute_t>
__device__ compute_t projection_scale(const Step<scalar_t>& step, compute_t squares) {
  double sum = block_sum(squares);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) step.partials[blockIdx.x] = sum;
    cooperative_groups::this_grid().sync();
    // Every block adds all partials itself, in the same order: no second barrier to share a sum.
    double part = 0;
    for (int block = threadIdx.x; block < gridDim.x; block += kThreads) {
      part += step.partials[block];
    }
    sum = block_sum(part);
  }
  return sum == 0 ? compute_t(1) : static_cast<compute_t>(*step.norm / sqrt(sum));
}

template <typename scalar_t, int kVector>
__global__ void __launch_bounds__(kThreads) head_step_kernel(Step<scalar_t> step) {
  using compute_t = typename Step<scalar_t>::compute_t;
  // Nobody writes found_inf here, so all blocks leave together and none waits at the barrier.
  if (step.found_inf != nullptr && *step.found_inf != 0) return;

  const compute_t lr = *step.lr;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t packed = step.count / kVector * kVector;
  const int64_t tail = packed + thread;  // fewer than kVector elements follow `packed`

  // A thread visits the same elements in both passes, so it reads back only its own momentum.
  compute_t squares = 0;
  for (int64_t i = thread * kVector; i < packed; i += threads * kVector) {
    squares += advance<kVector>(step, i, lr);
  }
  if (tail < step.count) squares += advance<1>(step, tail, lr);
  for (int64_t i = thread; i < step.bias_count; i += threads) {
    step.bias_momentum[i] = next_momentum(step.bias_momentum[i], step.d_bias[i], step.momentum);
    step.bias[i] = static_cast<scalar_t>(moved(step.bias[i], step.bias_momentum[i], lr));
  }

  const compute_t scale = step.norm == nullptr ? 1 : projection_scale(step, squares);

  for (int64_t i = thread * kVector; i < packed; i += threads * kVector) {
    write<kVector>(step, i, lr, scale);
  }
  if (tail < step.count) write<1>(step, tail, lr, scale);
}

// How many blocks fit on the device at once: a grid-wide barrier waits for ever with more.
template <typename scalar_t, int kVector>
int resident_blocks(int device) {
  static std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS> cache{};
  int blocks = cache.at(device);
  if (blocks == 0) {
    int per_multiprocessor = 0;
    int multiprocessors = 0;
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_multiprocessor, head_step_kernel<scalar_t, kVector>, kThreads, 0));
    C10_CUDA_CHECK(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    blocks = per_multiprocessor * multiprocessors;
    cache[device] = blocks;
  }
  return blocks;
}

template <typename scalar_t, int kVector>
void launch(Step<scalar_t> step, const at::Tensor& weight) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto kernel = head_step_kernel<scalar_t, kVector>;
  if (step.count <= kOneBlock) {
    kernel<<<1, kThreads, 0, stream>>>(step);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const int64_t per_block = static_cast<int64_t>(kThreads) * kVector;
  const int64_t wanted = (step.count + per_block - 1) / per_block;
  const int64_t resident = resident_blocks<scalar_t, kVector>(weight.get_device());
  const auto blocks = static_cast<unsigned>(std::min(wanted, resident));
  const at::Tensor partials = weight.new_empty({blocks}, weight.options().dtype(at::kDouble));
  step.partials = partials.mutable_data_ptr<double>();
  void* arguments[] = {&step};
  C10_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
                                             dim3(kThreads), arguments, 0, stream));
}

void head_step_cuda(const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const at::Tensor& d_weight, const std::optional<at::Tensor>& d_bias,
                    const at::Tensor& weight_momentum,
                    const std::optional<at::Tensor>& bias_momentum, const at::Tensor& lr,
                    double momentum, const std::optional<at::Tensor>& norm,
                    const std::optional<at::Tensor>& found_inf) {
  check_head_step(weight, bias, d_weight, d_bias, weight_momentum, bias_momentum, lr, norm,
                  found_inf);
  if (weight.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(weight.device());

  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, weight.scalar_type(), "head_step_", [&] {
        using compute_t = at::opmath_type<scalar_t>;
        Step<scalar_t> step{};
        step.weight = weight.mutable_data_ptr<scalar_t>();
        step.d_weight = d_weight.const_data_ptr<scalar_t>();
        step.weight_momentum = weight_momentum.mutable_data_ptr<scalar_t>();
        step.count = weight.numel();
        if (bias.has_value()) {
          step.bias = bias->mutable_data_ptr<scalar_t>();
          step.d_bias = d_bias->const_data_ptr<scalar_t>();
          step.bias_momentum = bias_momentum->mutable_data_ptr<scalar_t>();
          step.bias_count = bias->numel();
        }
        step.lr = lr.const_data_ptr<compute_t>();
        if (norm.has_value()) step.norm = norm->const_data_ptr<compute_t>();
        if (found_inf.has_value()) step.found_inf = found_inf->const_data_ptr<float>();
        step.momentum = static_cast<compute_t>(momentum);

        constexpr int kVector = 16 / sizeof(scalar_t);
        const auto misaligned = [](const void* pointer) {
          return reinterpret_cast<uintptr_t>(pointer) % 16 != 0;
        };
        if (misaligned(step.weight) || misaligned(step.d_weight) ||
            misaligned(step.weight_momentum)) {
          launch<scalar_t, 1>(step, weight);
        } else {
          launch<scalar_t, kVector>(step, weight);
        }
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(fst_fast_native, CUDA, m) { m.impl("head_step_", &head_step_cuda); }

}  // namespace fst_fast
