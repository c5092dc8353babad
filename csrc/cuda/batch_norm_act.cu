#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include "batch_norm_act.cuh"
#include "launch.h"

namespace fst_fast {
namespace {

template <typename scalar_t>
struct NormForward {
  using compute_t = compute_of<scalar_t>;

  NormGrid grid;
  const scalar_t* x;
  const scalar_t* residual;  // or null
  scalar_t* y;
  NormChannels<compute_t> channels;
  compute_t* mean;                // [C]
  compute_t* var;                 // [C]
  NormPair<compute_t>* partials;  // [C, slices]
  int64_t channel_count, count;   // C, and values of a channel
  bool relu;
};

// A number near the mean of a channel, the same for all threads: from it distances are added up, so
// that a mean far from zero costs no digits.
template <typename scalar_t, bool kPlanar>
__device__ compute_of<scalar_t> norm_origin(const NormForward<scalar_t>& a, int64_t c) {
  using compute_t = compute_of<scalar_t>;
  const int64_t rows = a.count / kNormSome;
  compute_t sum = 0;
#pragma unroll
  for (int i = 0; i < kNormSome; ++i) {
    // Evenly spread, or the first ones of the first image in a contiguous tensor.
    const int64_t row = kPlanar ? i % a.grid.pixels : i * rows;
    sum += static_cast<compute_t>(a.x[kPlanar ? c * a.grid.pixels + row : row * a.grid.stride + c]);
  }
  return sum / kNormSome;
}

// Sums of what one thread sees of a channel.
template <typename compute_t>
struct NormMoments {
  compute_t sum, squares;

  __device__ void add(compute_t apart) {
    sum += apart;
    squares += apart * apart;
  }
  __device__ NormSample<compute_t> sample(compute_t count) const {
    if (count == 0) return {0, 0, 0};
    const compute_t mean = sum / count;
    return {mean, squares - sum * mean, count};
  }
};

template <typename scalar_t, int kVector, bool kPlanar>
__device__ void norm_collect(const NormForward<scalar_t>& a, int64_t item) {
  using compute_t = compute_of<scalar_t>;
  const NormPlace<kVector, kPlanar> place(a.grid, item);
  NormMoments<compute_t> moments[kVector] = {};
  if (place.is_used()) {
    constexpr int kOrigins = kPlanar ? 1 : kVector;
    compute_t origins[kOrigins];
#pragma unroll
    for (int i = 0; i < kOrigins; ++i) {
      origins[i] = norm_origin<scalar_t, kPlanar>(a, place.channel(i));
    }
    for_each_row(
        place, [&](int64_t offset) { return load_pack<kVector>(a.x + offset); },
        [&](int64_t, const Pack<scalar_t, kVector>& pack) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            moments[i].add(static_cast<compute_t>(pack.at[i]) - origins[kPlanar ? 0 : i]);
          }
        });
  }
  const auto rows = static_cast<compute_t>(place.rows());
  constexpr int kSamples = kPlanar ? 1 : kVector;
#pragma unroll
  for (int i = 0; i < kSamples; ++i) {
    auto sample = moments[i].sample(rows);
    if constexpr (kPlanar) {
#pragma unroll
      for (int j = 1; j < kVector; ++j) sample = sample + moments[j].sample(rows);
    }
    sample = norm_column_sum(a.grid, sample);
    if (place.is_used() && threadIdx.x < a.grid.width) {
      a.partials[place.channel(i) * a.grid.slices + place.slice] = {sample.mean, sample.squares};
    }
  }
}

// Values of a channel in a slice of the grid.
template <int kVector, bool kPlanar>
__device__ int64_t norm_slice_count(const NormGrid& grid, int slice) {
  const int64_t height = kNormThreads / grid.width;
  const int64_t period = height * grid.slices, begin = slice * height;
  const int64_t whole = grid.rows / period, left = grid.rows % period;
  const int64_t more = min(max(left - begin, int64_t{0}), height);
  return (whole * height + more) * (kPlanar ? kVector : 1);
}

// A warp merges the slices of a channel, means of distances from the origin, in double precision.
template <typename scalar_t, int kVector, bool kPlanar>
__device__ void norm_merge(const NormForward<scalar_t>& a, int64_t c) {
  using compute_t = compute_of<scalar_t>;
  const auto* partials = a.partials + c * a.grid.slices;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  double sum = 0;
  for (int slice = lane; slice < a.grid.slices; slice += kWarp) {
    sum += static_cast<double>(partials[slice].a) *
           static_cast<double>(norm_slice_count<kVector, kPlanar>(a.grid, slice));
  }
  const double mean = warp_sum(sum) / static_cast<double>(a.count);
  double squares = 0;
  for (int slice = lane; slice < a.grid.slices; slice += kWarp) {
    const double apart = static_cast<double>(partials[slice].a) - mean;
    squares +=
        static_cast<double>(partials[slice].b) +
        apart * apart * static_cast<double>(norm_slice_count<kVector, kPlanar>(a.grid, slice));
  }
  const double var = warp_sum(squares) / static_cast<double>(a.count);
  if (lane != 0) return;
  a.mean[c] = static_cast<compute_t>(mean + norm_origin<scalar_t, kPlanar>(a, c));
  // Rounding may leave less than nothing; this form lets NaN pass.
  a.var[c] = var < 0 ? compute_t(0) : static_cast<compute_t>(var);
}

template <typename scalar_t, int kVector, bool kPlanar>
__device__ void norm_apply(const NormForward<scalar_t>& a, int64_t item) {
  using compute_t = compute_of<scalar_t>;
  const NormPlace<kVector, kPlanar> place(a.grid, item);
  if (!place.is_used()) return;
  constexpr int kLines = kPlanar ? 1 : kVector;
  NormLine<compute_t> lines[kLines];
#pragma unroll
  for (int i = 0; i < kLines; ++i) lines[i].take(a.channels, place.channel(i));
  struct Loaded {
    Pack<scalar_t, kVector> x, residual;
  };
  const bool adds = a.residual != nullptr;
  for_each_row(
      place,
      [&](int64_t offset) {
        Loaded loaded;
        loaded.x = load_pack<kVector>(a.x + offset);
        if (adds) loaded.residual = load_pack<kVector>(a.residual + offset);
        return loaded;
      },
      [&](int64_t offset, const Loaded& loaded) {
        Pack<scalar_t, kVector> out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          compute_t v = lines[kPlanar ? 0 : i](static_cast<compute_t>(loaded.x.at[i]));
          if (adds) v += static_cast<compute_t>(loaded.residual.at[i]);
          // NaN stays NaN.
          if (a.relu && v <= 0) v = 0;
          out.at[i] = static_cast<scalar_t>(v);
        }
        norm_store(a.y + offset, out);
      });
}

template <typename scalar_t, int kVector, bool kPlanar>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    batch_norm_act_kernel(NormForward<scalar_t> a) {
  for (int64_t item = blockIdx.x; item < a.grid.items; item += gridDim.x) {
    norm_collect<scalar_t, kVector, kPlanar>(a, item);
  }
  cooperative_groups::this_grid().sync();
  // Neighbouring channels go to different blocks.
  const int64_t warp = threadIdx.x / kWarp * static_cast<int64_t>(gridDim.x) + blockIdx.x;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kNormThreads / kWarp);
  for (int64_t c = warp; c < a.channel_count; c += warps) {
    norm_merge<scalar_t, kVector, kPlanar>(a, c);
  }
  cooperative_groups::this_grid().sync();
  for (int64_t item = blockIdx.x; item < a.grid.items; item += gridDim.x) {
    norm_apply<scalar_t, kVector, kPlanar>(a, item);
  }
}

template <typename scalar_t, int kVector, bool kPlanar>
void launch_norm(NormForward<scalar_t> a, const BatchNormLayout& layout, const at::Tensor& mean) {
  static Residency residency;
  using compute_t = compute_of<scalar_t>;
  constexpr size_t shared = kNormThreads * sizeof(NormSample<compute_t>);
  const auto kernel = batch_norm_act_kernel<scalar_t, kVector, kPlanar>;
  const int64_t resident =
      resident_blocks(kernel, kNormThreads, shared, mean.get_device(), residency);
  a.grid = norm_grid<kVector, kPlanar>(layout, resident);
  const auto partials = mean.new_empty({2 * layout.channels * a.grid.slices});
  a.partials = static_cast<NormPair<compute_t>*>(partials.mutable_data_ptr());
  launch_together(kernel, std::min(a.grid.items, resident), kNormThreads, shared, a);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_act_cuda(
    const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, bool relu,
    double eps) {
  const BatchNormArguments arguments{x, weight, bias, residual, relu, eps};
  const auto layout = check_batch_norm("batch_norm_act", arguments);
  const DeviceGuard guard(x.device());
  const auto options = x.options().dtype(batch_norm_compute(x));
  auto y = at::empty_like(x);
  auto mean = at::empty({layout.channels}, options), var = at::empty({layout.channels}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "batch_norm_act", [&] {
    using compute_t = compute_of<scalar_t>;
    NormForward<scalar_t> a{};
    a.x = x.const_data_ptr<scalar_t>();
    a.residual = norm_pointer<scalar_t>(residual);
    a.y = y.mutable_data_ptr<scalar_t>();
    a.mean = mean.mutable_data_ptr<compute_t>();
    a.var = var.mutable_data_ptr<compute_t>();
    a.channels = {a.mean, a.var, norm_pointer<compute_t>(weight), norm_pointer<compute_t>(bias),
                  static_cast<compute_t>(eps)};
    a.channel_count = layout.channels;
    a.count = layout.rows();
    a.relu = relu;
    const bool aligned = norm_is_aligned<scalar_t>({a.x, a.residual, a.y});
    with_norm_layout<scalar_t>(layout, aligned, [&](auto vector, auto planar) {
      launch_norm<scalar_t, vector.value, planar.value>(a, layout, mean);
    });
  });
  return {y, mean, var};
}

template <typename compute_t>
struct NormUpdate {
  const compute_t* mean;    // [C]
  const compute_t* var;     // [C]
  compute_t* running_mean;  // [C]
  compute_t* running_var;   // [C]
  int64_t* batches;         // or null
  int64_t channels;
  double momentum;  // negative: 1 / batches
  compute_t unbiased;
};

// One block, as every thread reads the number of batches before one counts it up.
template <typename compute_t>
__global__ void __launch_bounds__(kNormThreads) batch_norm_update_kernel(NormUpdate<compute_t> a) {
  double share = a.momentum;
  if (a.batches != nullptr) {
    const int64_t batches = *a.batches + 1;
    __syncthreads();
    if (threadIdx.x == 0) *a.batches = batches;
    if (share < 0) share = 1 / static_cast<double>(batches);
  }
  const auto now = static_cast<compute_t>(share), before = static_cast<compute_t>(1 - share);
  for (int64_t c = threadIdx.x; c < a.channels; c += kNormThreads) {
    a.running_mean[c] = norm_multiply(now, a.mean[c]) + norm_multiply(before, a.running_mean[c]);
    a.running_var[c] = norm_multiply(now, norm_multiply(a.var[c], a.unbiased)) +
                       norm_multiply(before, a.running_var[c]);
  }
}

void batch_norm_update_cuda(const at::Tensor& mean, const at::Tensor& var,
                            const at::Tensor& running_mean, const at::Tensor& running_var,
                            const std::optional<at::Tensor>& num_batches_tracked, int64_t count,
                            std::optional<double> momentum) {
  check_batch_norm_update(mean, var, running_mean, running_var, num_batches_tracked, count,
                          momentum);
  const DeviceGuard guard(mean.device());
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "batch_norm_update_", [&] {
    NormUpdate<scalar_t> a{};
    a.mean = mean.const_data_ptr<scalar_t>();
    a.var = var.const_data_ptr<scalar_t>();
    a.running_mean = running_mean.mutable_data_ptr<scalar_t>();
    a.running_var = running_var.mutable_data_ptr<scalar_t>();
    if (num_batches_tracked.has_value()) {
      a.batches = num_batches_tracked->mutable_data_ptr<int64_t>();
    }
    a.channels = mean.numel();
    a.momentum = momentum.value_or(-1);
    a.unbiased = static_cast<scalar_t>(static_cast<double>(count) / (count - 1));
    launch(batch_norm_update_kernel<scalar_t>, 1, kNormThreads, 0, a);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fst_fast_native, CUDA, m) {
  m.impl("batch_norm_act", &batch_norm_act_cuda);
  m.impl("batch_norm_update_", &batch_norm_update_cuda);
}

}  // namespace fst_fast
