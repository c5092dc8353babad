#include <ATen/Dispatch.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include <algorithm>

#include "../head_step.h"
#include "device.cuh"
#include "launch.h"

namespace fst_fast {
namespace {

constexpr int kThreads = 512;
constexpr size_t kSharedBytes = kThreads / kWarp * sizeof(double);
// Up to here one block beats the cost of a grid-wide barrier.
constexpr int64_t kOneBlock = 16384;

template <typename scalar_t>
struct Step {
  using compute_t = compute_of<scalar_t>;

  scalar_t* weight;           // [count]
  const scalar_t* d_weight;   // [count]
  scalar_t* weight_momentum;  // [count]
  int64_t count;
  scalar_t* bias;           // [bias_count]
  const scalar_t* d_bias;   // [bias_count]
  scalar_t* bias_momentum;  // [bias_count]
  int64_t bias_count;
  const compute_t* lr;
  const compute_t* norm;    // null: no projection
  compute_t* weight_scale;  // null: weight is the head; else the head is weight_scale * weight
  const float* found_inf;   // null: always step
  double* partials;         // [gridDim.x]; unused with one block
  compute_t momentum;
};

// Multiply and add are rounded one by one, as in eager PyTorch: nvcc would fuse a * b + c.
__device__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ double multiply(double a, double b) { return __dmul_rn(a, b); }

template <typename scalar_t, typename compute_t>
__device__ scalar_t next_momentum(scalar_t m, scalar_t g, compute_t momentum) {
  const auto product = multiply(momentum, static_cast<compute_t>(m));
  return static_cast<scalar_t>(product + static_cast<compute_t>(g));
}

template <typename value_t, typename scalar_t, typename compute_t>
__device__ compute_t moved(value_t w, scalar_t m, compute_t lr) {
  return static_cast<compute_t>(w) - multiply(lr, static_cast<compute_t>(m));
}

// m <- round(momentum * m + g) for elements [i, i + kVector); returns the sum of (w - lr * m)^2.
// With a weight_scale, w <- round(weight_scale * w - lr * m) and the sum is that of w^2.
template <int kVector, typename scalar_t, typename compute_t>
__device__ compute_t advance(const Step<scalar_t>& step, int64_t i, compute_t lr,
                             compute_t weight_scale) {
  using pack_t = Pack<scalar_t, kVector>;
  auto w = *reinterpret_cast<const pack_t*>(step.weight + i);
  const auto g = *reinterpret_cast<const pack_t*>(step.d_weight + i);
  auto m = *reinterpret_cast<const pack_t*>(step.weight_momentum + i);
  compute_t squares = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    m.at[j] = next_momentum(m.at[j], g.at[j], step.momentum);
    auto v = moved(w.at[j], m.at[j], lr);
    if (step.weight_scale != nullptr) {
      const auto scaled = multiply(weight_scale, static_cast<compute_t>(w.at[j]));
      w.at[j] = static_cast<scalar_t>(moved(scaled, m.at[j], lr));
      v = static_cast<compute_t>(w.at[j]);
    }
    squares += v * v;
  }
  if (step.weight_scale != nullptr) *reinterpret_cast<pack_t*>(step.weight + i) = w;
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

// norm / ||v||, from each thread's part of ||v||^2. Every thread of every block must call it, and
// has read weight_scale before any returns.
template <typename scalar_t, typename compute_t>
__device__ compute_t projection_scale(const Step<scalar_t>& step, compute_t squares) {
  auto* warp_sums = reinterpret_cast<double*>(dynamic_shared());
  double sum = block_sum(squares, warp_sums);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) step.partials[blockIdx.x] = sum;
    cooperative_groups::this_grid().sync();
    // Every block adds all partials itself, in the same order: no second barrier to share a sum.
    double part = 0;
    for (int block = threadIdx.x; block < gridDim.x; block += kThreads) {
      part += step.partials[block];
    }
    sum = block_sum(part, warp_sums);
  }
  if (step.norm == nullptr) return 1;
  return sum == 0 ? compute_t(1) : static_cast<compute_t>(*step.norm / sqrt(sum));
}

template <typename scalar_t, int kVector>
__global__ void __launch_bounds__(kThreads) head_step_kernel(Step<scalar_t> step) {
  using compute_t = typename Step<scalar_t>::compute_t;
  // Nobody writes found_inf here, so all blocks leave together and none waits at the barrier.
  if (step.found_inf != nullptr && *step.found_inf != 0) return;

  const compute_t lr = *step.lr;
  const bool deferred = step.weight_scale != nullptr;
  const compute_t weight_scale = deferred ? *step.weight_scale : compute_t(1);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t packed = step.count / kVector * kVector;
  const int64_t tail = packed + thread;  // fewer than kVector elements follow `packed`

  // A thread visits the same elements in both passes, so it reads back only its own momentum.
  compute_t squares = 0;
  for (int64_t i = thread * kVector; i < packed; i += threads * kVector) {
    squares += advance<kVector>(step, i, lr, weight_scale);
  }
  if (tail < step.count) squares += advance<1>(step, tail, lr, weight_scale);
  for (int64_t i = thread; i < step.bias_count; i += threads) {
    step.bias_momentum[i] = next_momentum(step.bias_momentum[i], step.d_bias[i], step.momentum);
    step.bias[i] = static_cast<scalar_t>(moved(step.bias[i], step.bias_momentum[i], lr));
  }

  const bool free = step.norm == nullptr && !deferred;
  const compute_t scale = free ? compute_t(1) : projection_scale(step, squares);
  if (deferred) {
    if (thread == 0) *step.weight_scale = scale;
    return;
  }

  for (int64_t i = thread * kVector; i < packed; i += threads * kVector) {
    write<kVector>(step, i, lr, scale);
  }
  if (tail < step.count) write<1>(step, tail, lr, scale);
}

template <typename scalar_t, int kVector>
void launch_step(Step<scalar_t> step, const at::Tensor& weight) {
  static Residency residency;
  const auto kernel = head_step_kernel<scalar_t, kVector>;
  if (step.count <= kOneBlock) return launch(kernel, 1, kThreads, kSharedBytes, step);
  const int64_t per_block = static_cast<int64_t>(kThreads) * kVector;
  const int64_t wanted = (step.count + per_block - 1) / per_block;
  const int64_t resident =
      resident_blocks(kernel, kThreads, kSharedBytes, weight.get_device(), residency);
  const int64_t blocks = std::min(wanted, resident);
  const at::Tensor partials = weight.new_empty({blocks}, weight.options().dtype(at::kDouble));
  step.partials = partials.mutable_data_ptr<double>();
  launch_together(kernel, blocks, kThreads, kSharedBytes, step);
}

void head_step_cuda(const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const at::Tensor& d_weight, const std::optional<at::Tensor>& d_bias,
                    const at::Tensor& weight_momentum,
                    const std::optional<at::Tensor>& bias_momentum, const at::Tensor& lr,
                    double momentum, const std::optional<at::Tensor>& norm,
                    const std::optional<at::Tensor>& weight_scale,
                    const std::optional<at::Tensor>& found_inf) {
  check_head_step(weight, bias, d_weight, d_bias, weight_momentum, bias_momentum, lr, norm,
                  weight_scale, found_inf);
  if (weight.numel() == 0) return;
  const DeviceGuard guard(weight.device());

  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, weight.scalar_type(), "head_step_", [&] {
        using compute_t = compute_of<scalar_t>;
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
        if (weight_scale.has_value()) {
          step.weight_scale = weight_scale->mutable_data_ptr<compute_t>();
        }
        if (found_inf.has_value()) step.found_inf = found_inf->const_data_ptr<float>();
        step.momentum = static_cast<compute_t>(momentum);

        constexpr int kVector = 16 / sizeof(scalar_t);
        const auto misaligned = [](const void* pointer) {
          return reinterpret_cast<uintptr_t>(pointer) % 16 != 0;
        };
        if (misaligned(step.weight) || misaligned(step.d_weight) ||
            misaligned(step.weight_momentum)) {
          launch_step<scalar_t, 1>(step, weight);
        } else {
          launch_step<scalar_t, kVector>(step, weight);
        }
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(fst_fast_native, CUDA, m) { m.impl("head_step_", &head_step_cuda); }

}  // namespace fst_fast
