#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include "batch_norm_act.cuh"
#include "launch.h"

namespace fst_fast {
namespace {

template <typename scalar_t>
struct NormBackward {
  using compute_t = compute_of<scalar_t>;

  NormGrid grid;
  const scalar_t* d_y;
  const scalar_t* x;
  const scalar_t* residual;  // or null
  scalar_t* d_x;             // or null
  scalar_t* d_residual;      // or null
  NormChannels<compute_t> channels;
  compute_t* d_weight;            // [C] or null
  compute_t* d_bias;              // [C] or null
  NormPair<compute_t>* partials;  // [C, slices]: sums of g and of g * (x - mean)
  NormPair<compute_t>* means;     // [C]: of g, and the slope of g over x - mean
  int64_t channel_count, count;   // C, and values of a channel
  bool relu;
};

template <typename scalar_t, int kVector>
struct NormLoaded {
  Pack<scalar_t, kVector> d_y, x, residual;
};

template <typename scalar_t, int kVector>
__device__ NormLoaded<scalar_t, kVector> norm_load(const NormBackward<scalar_t>& a,
                                                   const scalar_t* gradient, bool adds,
                                                   int64_t offset) {
  NormLoaded<scalar_t, kVector> loaded;
  loaded.d_y = load_pack<kVector>(gradient + offset);
  loaded.x = load_pack<kVector>(a.x + offset);
  if (adds) loaded.residual = load_pack<kVector>(a.residual + offset);
  return loaded;
}

// What of the gradient passes the ReLU, whose input is computed anew with the forward's bits.
template <typename scalar_t, int kVector, typename compute_t>
__device__ compute_t norm_passing(const NormLoaded<scalar_t, kVector>& loaded, int i,
                                  const NormLine<compute_t>& line, bool adds, bool cuts) {
  const auto gradient = static_cast<compute_t>(loaded.d_y.at[i]);
  if (!cuts) return gradient;
  compute_t v = line(static_cast<compute_t>(loaded.x.at[i]));
  if (adds) v += static_cast<compute_t>(loaded.residual.at[i]);
  return v <= 0 ? compute_t(0) : gradient;
}

template <typename scalar_t, int kVector, bool kPlanar>
__device__ void norm_collect_gradients(const NormBackward<scalar_t>& a, int64_t item) {
  using compute_t = compute_of<scalar_t>;
  const NormPlace<kVector, kPlanar> place(a.grid, item);
  NormPair<compute_t> sums[kVector] = {};
  if (place.is_used()) {
    constexpr int kLines = kPlanar ? 1 : kVector;
    NormLine<compute_t> lines[kLines];
#pragma unroll
    for (int i = 0; i < kLines; ++i) lines[i].take(a.channels, place.channel(i));
    const bool adds = a.residual != nullptr && a.relu;
    for_each_row(
        place, [&](int64_t offset) { return norm_load<scalar_t, kVector>(a, a.d_y, adds, offset); },
        [&](int64_t offset, const NormLoaded<scalar_t, kVector>& loaded) {
          Pack<scalar_t, kVector> passed;
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const auto& line = lines[kPlanar ? 0 : i];
            const compute_t g = norm_passing(loaded, i, line, adds, a.relu);
            sums[i].a += g;
            sums[i].b += g * (static_cast<compute_t>(loaded.x.at[i]) - line.mean);
            passed.at[i] = static_cast<scalar_t>(g);
          }
          if (a.d_residual != nullptr) norm_store(a.d_residual + offset, passed);
        });
  }
  constexpr int kSums = kPlanar ? 1 : kVector;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    auto sum = sums[i];
    if constexpr (kPlanar) {
#pragma unroll
      for (int j = 1; j < kVector; ++j) sum = sum + sums[j];
    }
    sum = norm_column_sum(a.grid, sum);
    if (place.is_used() && threadIdx.x < a.grid.width) {
      a.partials[place.channel(i) * a.grid.slices + place.slice] = sum;
    }
  }
}

// A warp adds up the slices of a channel in double precision.
template <typename scalar_t>
__device__ void norm_merge_gradients(const NormBackward<scalar_t>& a, int64_t c) {
  using compute_t = compute_of<scalar_t>;
  const auto* partials = a.partials + c * a.grid.slices;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  double total = 0, product = 0;
  for (int slice = lane; slice < a.grid.slices; slice += kWarp) {
    total += static_cast<double>(partials[slice].a);
    product += static_cast<double>(partials[slice].b);
  }
  total = warp_sum(total);
  product = warp_sum(product);
  if (lane != 0) return;
  const double rstd = a.channels.rstd(c), count = static_cast<double>(a.count);
  if (a.d_bias != nullptr) a.d_bias[c] = static_cast<compute_t>(total);
  if (a.d_weight != nullptr) a.d_weight[c] = static_cast<compute_t>(product * rstd);
  a.means[c] = {static_cast<compute_t>(total / count),
                static_cast<compute_t>(product * rstd * rstd / count)};
}

template <typename scalar_t, int kVector, bool kPlanar>
__device__ void norm_apply_gradients(const NormBackward<scalar_t>& a, int64_t item) {
  using compute_t = compute_of<scalar_t>;
  const NormPlace<kVector, kPlanar> place(a.grid, item);
  if (!place.is_used()) return;
  constexpr int kLines = kPlanar ? 1 : kVector;
  NormLine<compute_t> lines[kLines];
  NormPair<compute_t> means[kLines];
#pragma unroll
  for (int i = 0; i < kLines; ++i) {
    lines[i].take(a.channels, place.channel(i));
    means[i] = a.means[place.channel(i)];
  }
  // What this thread has let pass is in d_residual.
  const bool cuts = a.relu && a.d_residual == nullptr;
  const bool adds = a.residual != nullptr && cuts;
  const scalar_t* gradient = a.d_residual == nullptr ? a.d_y : a.d_residual;
  for_each_row(
      place,
      [&](int64_t offset) { return norm_load<scalar_t, kVector>(a, gradient, adds, offset); },
      [&](int64_t offset, const NormLoaded<scalar_t, kVector>& loaded) {
        Pack<scalar_t, kVector> out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const auto& line = lines[kPlanar ? 0 : i];
          const auto& mean = means[kPlanar ? 0 : i];
          const compute_t g = norm_passing(loaded, i, line, adds, cuts);
          const compute_t apart = static_cast<compute_t>(loaded.x.at[i]) - line.mean;
          out.at[i] = static_cast<scalar_t>((g - mean.a - apart * mean.b) * line.scale);
        }
        norm_store(a.d_x + offset, out);
      });
}

template <typename scalar_t, int kVector, bool kPlanar>
__global__ void __launch_bounds__(kNormThreads, kNormBackwardBlocks)
    batch_norm_act_backward_kernel(NormBackward<scalar_t> a) {
  for (int64_t item = blockIdx.x; item < a.grid.items; item += gridDim.x) {
    norm_collect_gradients<scalar_t, kVector, kPlanar>(a, item);
  }
  cooperative_groups::this_grid().sync();
  const int64_t warp = threadIdx.x / kWarp * static_cast<int64_t>(gridDim.x) + blockIdx.x;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kNormThreads / kWarp);
  for (int64_t c = warp; c < a.channel_count; c += warps) norm_merge_gradients(a, c);
  if (a.d_x == nullptr) return;
  cooperative_groups::this_grid().sync();
  for (int64_t item = blockIdx.x; item < a.grid.items; item += gridDim.x) {
    norm_apply_gradients<scalar_t, kVector, kPlanar>(a, item);
  }
}

template <typename scalar_t, int kVector, bool kPlanar>
void launch_norm_backward(NormBackward<scalar_t> a, const BatchNormLayout& layout,
                          const at::Tensor& mean) {
  static Residency residency;
  using compute_t = compute_of<scalar_t>;
  constexpr size_t shared = kNormThreads * sizeof(NormPair<compute_t>);
  const auto kernel = batch_norm_act_backward_kernel<scalar_t, kVector, kPlanar>;
  const int64_t resident =
      resident_blocks(kernel, kNormThreads, shared, mean.get_device(), residency);
  a.grid = norm_grid<kVector, kPlanar>(layout, resident);
  const auto scratch = mean.new_empty({2 * layout.channels * (a.grid.slices + 1)});
  a.partials = static_cast<NormPair<compute_t>*>(scratch.mutable_data_ptr());
  a.means = a.partials + layout.channels * a.grid.slices;
  launch_together(kernel, std::min(a.grid.items, resident), kNormThreads, shared, a);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_act_backward_cuda(
    const at::Tensor& d_y, const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
    const at::Tensor& mean, const at::Tensor& var, bool relu, double eps,
    std::array<bool, 3> output_mask) {
  const BatchNormArguments arguments{x, weight, bias, residual, relu, eps};
  const auto layout =
      check_batch_norm_backward("batch_norm_act_backward", arguments, d_y, mean, var);
  const DeviceGuard guard(x.device());
  const auto like = [](const at::Tensor& tensor, bool wanted) {
    return wanted ? at::empty_like(tensor) : at::empty({0}, tensor.options());
  };
  auto d_x = like(x, output_mask[0]), d_residual = like(x, output_mask[2]);
  auto d_weight = like(mean, output_mask[1]), d_bias = like(mean, output_mask[1]);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "batch_norm_act_backward", [&] {
        using compute_t = compute_of<scalar_t>;
        NormBackward<scalar_t> a{};
        a.d_y = d_y.const_data_ptr<scalar_t>();
        a.x = x.const_data_ptr<scalar_t>();
        a.residual = norm_pointer<scalar_t>(residual);
        if (output_mask[0]) a.d_x = d_x.mutable_data_ptr<scalar_t>();
        if (output_mask[2]) a.d_residual = d_residual.mutable_data_ptr<scalar_t>();
        if (output_mask[1]) {
          a.d_weight = d_weight.mutable_data_ptr<compute_t>();
          a.d_bias = d_bias.mutable_data_ptr<compute_t>();
        }
        a.channels = {mean.const_data_ptr<compute_t>(), var.const_data_ptr<compute_t>(),
                      norm_pointer<compute_t>(weight), norm_pointer<compute_t>(bias),
                      static_cast<compute_t>(eps)};
        a.channel_count = layout.channels;
        a.count = layout.rows();
        a.relu = relu;
        const bool aligned =
            norm_is_aligned<scalar_t>({a.d_y, a.x, a.residual, a.d_x, a.d_residual});
        with_norm_layout<scalar_t>(layout, aligned, [&](auto vector, auto planar) {
          launch_norm_backward<scalar_t, vector.value, planar.value>(a, layout, mean);
        });
      });
  return {d_x, d_weight, d_bias, d_residual};
}

}  // namespace

TORCH_LIBRARY_IMPL(fst_fast_native, CUDA, m) {
  m.impl("batch_norm_act_backward", &batch_norm_act_backward_cuda);
}

}  // namespace fst_fast
