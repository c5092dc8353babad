#pragma once

#include "head_deviation_rows.cuh"

// What follows the matrix products of a head of many classes: scaling and sums. No ATen and no CUDA
// host calls here.
namespace fst_fast {

constexpr int kFinishThreads = 256;
constexpr int kFinishBlocks = 1024;  // at most; the order of a sum depends on it

// d_features <- factor * weight_scale * products, for some rows.
template <typename scalar_t>
struct FeaturesArguments {
  using compute_t = compute_of<scalar_t>;

  LossTerms<compute_t> terms;
  const compute_t* products;  // [count, columns]; may be d_features itself
  scalar_t* d_features;       // [count, columns]
  int64_t first_row;
  int64_t count;
  int64_t columns;
  const compute_t* weight_scale;
  const Totals<compute_t>* totals;
};

template <typename scalar_t, int kVector>
__global__ void __launch_bounds__(kFinishThreads)
    head_deviation_features_kernel(FeaturesArguments<scalar_t> a) {
  using compute_t = compute_of<scalar_t>;
  const compute_t scale = a.weight_scale == nullptr ? compute_t(1) : *a.weight_scale;
  const compute_t factor = scale * a.totals->factor;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x) * kVector;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kFinishThreads * kVector;
  for (int64_t i = first; i < a.count * a.columns; i += step) {
    const bool ignored = a.terms.ignored(a.first_row + i / a.columns);
    const auto products = load_pack<kVector>(a.products + i);
    Pack<scalar_t, kVector> out;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      out.at[j] = static_cast<scalar_t>(ignored ? compute_t(0) : factor * products.at[j]);
    }
    store_pack(a.d_features + i, out);
  }
}

// sums += the column sums of some rows of d_logits; a block takes kWarp columns. The last of the
// launches also writes d_bias.
template <typename scalar_t, typename weight_t>
struct BiasArguments {
  using compute_t = compute_of<scalar_t>;

  const scalar_t* d_logits;  // [count, pitch]
  int64_t pitch;
  int64_t count;
  int64_t classes;
  compute_t* sums;   // [classes]
  weight_t* d_bias;  // [classes]; null but in the last launch
  const Totals<compute_t>* totals;
  bool first;
};

template <typename scalar_t, typename weight_t>
__global__ void __launch_bounds__(kTotalThreads, 1)
    head_deviation_bias_kernel(BiasArguments<scalar_t, weight_t> a) {
  using compute_t = compute_of<scalar_t>;
  constexpr int kGroups = kTotalThreads / kWarp;
  auto* partial = reinterpret_cast<compute_t*>(dynamic_shared());  // [kGroups, kWarp]
  const int lane = threadIdx.x % kWarp;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  compute_t sum = 0;
  if (k < a.classes) {
#pragma unroll 8
    for (int64_t row = threadIdx.x / kWarp; row < a.count; row += kGroups) {
      sum += static_cast<compute_t>(a.d_logits[row * a.pitch + k]);
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp || k >= a.classes) return;
  sum = a.first ? compute_t(0) : a.sums[k];
  for (int group = 0; group < kGroups; ++group) sum += partial[group * kWarp + lane];
  a.sums[k] = sum;
  if (a.d_bias != nullptr) a.d_bias[k] = static_cast<weight_t>(a.totals->factor * sum);
}

// d_weight <- factor * products + share * weight0, and this block's part of <weight, weight0>.
template <typename weight_t, typename compute_t>
struct WeightArguments {
  const compute_t* products;  // [count]; may be d_weight itself; null: zeros
  const weight_t* weight;     // [count]
  const weight_t* weight0;    // [count]; null: no penalty
  weight_t* d_weight;         // [count]; null: not wanted
  const compute_t* weight_scale;
  const Totals<compute_t>* totals;
  double* overlaps;  // [gridDim.x]
  int64_t count;
};

template <int kVector, typename weight_t, typename compute_t>
__device__ double finish_weight(const WeightArguments<weight_t, compute_t>& a, int64_t i,
                                compute_t scale, const Totals<compute_t>& totals) {
  Pack<compute_t, kVector> d = {};
  if (a.products != nullptr && a.d_weight != nullptr) d = load_pack<kVector>(a.products + i);
#pragma unroll
  for (int j = 0; j < kVector; ++j) d.at[j] = a.products == nullptr ? 0 : totals.factor * d.at[j];
  double overlap = 0;
  if (a.weight0 != nullptr) {
    const auto w = load_pack<kVector>(a.weight + i);
    const auto w0 = load_pack<kVector>(a.weight0 + i);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const auto origin = static_cast<compute_t>(w0.at[j]);
      const compute_t scaled = scale * static_cast<compute_t>(w.at[j]);
      overlap += static_cast<double>(scaled) * static_cast<double>(origin);
      d.at[j] += totals.share * origin;
    }
  }
  if (a.d_weight != nullptr) {
    Pack<weight_t, kVector> out;
#pragma unroll
    for (int j = 0; j < kVector; ++j) out.at[j] = static_cast<weight_t>(d.at[j]);
    store_pack(a.d_weight + i, out);
  }
  return overlap;
}

template <typename weight_t, typename compute_t, int kVector>
__global__ void __launch_bounds__(kFinishThreads)
    head_deviation_weight_kernel(WeightArguments<weight_t, compute_t> a) {
  auto* warp_sums = reinterpret_cast<double*>(dynamic_shared());
  const compute_t scale = a.weight_scale == nullptr ? compute_t(1) : *a.weight_scale;
  const Totals<compute_t> totals = *a.totals;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kFinishThreads;
  const int64_t packed = a.count / kVector * kVector;
  double overlap = 0;
  for (int64_t i = thread * kVector; i < packed; i += threads * kVector) {
    overlap += finish_weight<kVector>(a, i, scale, totals);
  }
  // Fewer than kVector elements follow `packed`.
  if (packed + thread < a.count) overlap += finish_weight<1>(a, packed + thread, scale, totals);
  overlap = block_sum(overlap, warp_sums);
  if (threadIdx.x == 0) a.overlaps[blockIdx.x] = overlap;
}

// The sums over all rows, by one block.
template <typename compute_t>
struct SumsArguments {
  const compute_t* losses;  // [rows]
  const uint8_t* right;     // [rows]
  const double* overlaps;   // [parts]
  const Totals<compute_t>* totals;
  int64_t rows;
  int parts;
  bool has_penalty;
  bool each_row;  // reduction "none"

  compute_t* loss;
  compute_t* cross_entropy;  // the losses themselves for each row
  compute_t* penalty;
  int64_t* correct;
  int64_t* invalid;
};

template <typename compute_t>
__global__ void __launch_bounds__(kTotalThreads, 1)
    head_deviation_sums_kernel(SumsArguments<compute_t> a) {
  auto* warp_sums = reinterpret_cast<double*>(dynamic_shared());
  double loss = 0;
  double right = 0;
  double overlap = 0;
  for (int64_t row = threadIdx.x; row < a.rows; row += kTotalThreads) {
    loss += a.losses[row];
    right += a.right[row];
  }
  for (int part = threadIdx.x; a.has_penalty && part < a.parts; part += kTotalThreads) {
    overlap += a.overlaps[part];
  }
  loss = block_sum(loss, warp_sums);
  right = block_sum(right, warp_sums);
  overlap = block_sum(overlap, warp_sums);
  const compute_t penalty =
      a.has_penalty ? a.totals->strength * static_cast<compute_t>(overlap) : compute_t(0);
  for (int64_t row = threadIdx.x; a.each_row && row < a.rows; row += kTotalThreads) {
    a.loss[row] = a.losses[row] + penalty;
  }
  if (threadIdx.x != 0) return;
  *a.penalty = penalty;
  *a.correct = static_cast<int64_t>(right);
  *a.invalid = a.totals->invalid;
  if (a.each_row) return;
  *a.cross_entropy = static_cast<compute_t>(loss) / a.totals->norm;
  *a.loss = *a.cross_entropy + penalty;
}

}  // namespace fst_fast
