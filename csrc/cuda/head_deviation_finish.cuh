#pragma once

#include "head_deviation_rows.cuh"

// What follows the matrix products of a head of many classes, in one launch for each chunk of rows:
// some blocks scale gradients, some add up d_bias, and with the last chunk some finish d_weight;
// the block that is done last adds up the losses. No ATen and no CUDA host calls here.
namespace fst_fast {

constexpr int kFinishThreads = 512;
constexpr int kFinishBlocks = 512;  // of each kind, at most; the order of a sum depends on it

// d_features <- factor * weight_scale * products, for some rows.
template <typename scalar_t>
struct FeaturesPart {
  const compute_of<scalar_t>* products;  // [count, columns]; may be d_features itself
  scalar_t* d_features;                  // [count, columns]
  int64_t first_row;
  int64_t count;
  int64_t columns;
  int blocks;  // 0: not wanted
  bool packs;
};

// sums += the column sums of some rows of d_logits; a block takes kWarp columns. With the last rows
// d_bias is written.
template <typename scalar_t, typename weight_t>
struct BiasPart {
  const scalar_t* d_logits;  // [count, pitch]
  int64_t pitch;
  int64_t count;
  compute_of<scalar_t>* sums;  // [classes]
  weight_t* d_bias;            // [classes]; null but with the last rows
  int blocks;                  // 0: not wanted
  bool first;
};

// d_weight <- factor * products + share * weight0, and each block's part of <weight, weight0>.
template <typename weight_t, typename compute_t>
struct WeightPart {
  const compute_t* products;  // [count]; may be d_weight itself; null: zeros
  const weight_t* weight;     // [count]
  const weight_t* weight0;    // [count]; null: no penalty
  weight_t* d_weight;         // [count]; null: not wanted
  double* overlaps;           // [blocks]
  int64_t count;
  int blocks;  // 0: nothing to do
  bool packs;
};

// The sums over all rows.
template <typename compute_t>
struct SumsPart {
  const compute_t* losses;  // [rows]
  const uint8_t* right;     // [rows]
  bool each_row;            // reduction "none"
  compute_t* loss;
  compute_t* cross_entropy;  // the losses themselves for each row
  compute_t* penalty;
  int64_t* correct;
  int64_t* invalid;
};

template <typename scalar_t, typename weight_t>
struct FinishArguments {
  using compute_t = compute_of<scalar_t>;

  LossTerms<compute_t> terms;
  const compute_t* weight_scale;
  Totals<compute_t>* totals;
  BiasPart<scalar_t, weight_t> bias;
  FeaturesPart<scalar_t> features;
  WeightPart<weight_t, compute_t> weight;
  SumsPart<compute_t> sums;
  bool last;  // of the launches

  __device__ compute_t scale() const {
    return weight_scale == nullptr ? compute_t(1) : *weight_scale;
  }
};

template <int kVector, typename scalar_t, typename weight_t>
__device__ void finish_features(const FinishArguments<scalar_t, weight_t>& a, int block) {
  using compute_t = compute_of<scalar_t>;
  const auto& part = a.features;
  const compute_t factor = a.scale() * a.totals->factor;
  const int64_t first = (static_cast<int64_t>(block) * kFinishThreads + threadIdx.x) * kVector;
  const int64_t step = static_cast<int64_t>(part.blocks) * kFinishThreads * kVector;
  for (int64_t i = first; i < part.count * part.columns; i += step) {
    const bool ignored = a.terms.ignored(part.first_row + i / part.columns);
    const auto products = load_pack<kVector>(part.products + i);
    Pack<scalar_t, kVector> out;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      out.at[j] = static_cast<scalar_t>(ignored ? compute_t(0) : factor * products.at[j]);
    }
    store_pack(part.d_features + i, out);
  }
}

template <typename scalar_t, typename weight_t>
__device__ void add_bias(const FinishArguments<scalar_t, weight_t>& a, int block) {
  using compute_t = compute_of<scalar_t>;
  constexpr int kGroups = kFinishThreads / kWarp;
  const auto& part = a.bias;
  auto* partial = reinterpret_cast<compute_t*>(dynamic_shared());  // [kGroups, kWarp]
  const int lane = threadIdx.x % kWarp;
  const int64_t k = static_cast<int64_t>(block) * kWarp + lane;
  compute_t sum = 0;
  if (k < a.terms.classes) {
#pragma unroll 16
    for (int64_t row = threadIdx.x / kWarp; row < part.count; row += kGroups) {
      sum += static_cast<compute_t>(part.d_logits[row * part.pitch + k]);
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp || k >= a.terms.classes) return;
  sum = part.first ? compute_t(0) : part.sums[k];
  for (int group = 0; group < kGroups; ++group) sum += partial[group * kWarp + lane];
  part.sums[k] = sum;
  if (part.d_bias != nullptr) part.d_bias[k] = static_cast<weight_t>(a.totals->factor * sum);
}

template <int kVector, typename weight_t, typename compute_t>
__device__ double finish_pack(const WeightPart<weight_t, compute_t>& a, int64_t i, compute_t scale,
                              const Totals<compute_t>& totals) {
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

template <int kVector, typename scalar_t, typename weight_t>
__device__ void finish_weight(const FinishArguments<scalar_t, weight_t>& a, int block) {
  const auto& part = a.weight;
  const auto scale = a.scale();
  const auto totals = *a.totals;
  const int64_t thread = static_cast<int64_t>(block) * kFinishThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(part.blocks) * kFinishThreads;
  const int64_t packed = part.count / kVector * kVector;
  double overlap = 0;
  for (int64_t i = thread * kVector; i < packed; i += threads * kVector) {
    overlap += finish_pack<kVector>(part, i, scale, totals);
  }
  // Fewer than kVector elements follow `packed`.
  if (packed + thread < part.count) {
    overlap += finish_pack<1>(part, packed + thread, scale, totals);
  }
  overlap = block_sum(overlap, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) part.overlaps[block] = overlap;
}

template <typename scalar_t, typename weight_t>
__device__ void finish_sums(const FinishArguments<scalar_t, weight_t>& a) {
  using compute_t = compute_of<scalar_t>;
  const auto& part = a.sums;
  auto* warp_sums = reinterpret_cast<double*>(dynamic_shared());
  double loss = 0;
  double right = 0;
  double overlap = 0;
  for (int64_t row = threadIdx.x; row < a.terms.rows; row += kFinishThreads) {
    loss += part.losses[row];
    right += part.right[row];
  }
  const bool has_penalty = a.weight.weight0 != nullptr;
  for (int block = threadIdx.x; has_penalty && block < a.weight.blocks; block += kFinishThreads) {
    overlap += a.weight.overlaps[block];
  }
  loss = block_sum(loss, warp_sums);
  right = block_sum(right, warp_sums);
  overlap = block_sum(overlap, warp_sums);
  const compute_t penalty =
      has_penalty ? a.totals->strength * static_cast<compute_t>(overlap) : compute_t(0);
  for (int64_t row = threadIdx.x; part.each_row && row < a.terms.rows; row += kFinishThreads) {
    part.loss[row] = part.losses[row] + penalty;
  }
  if (threadIdx.x != 0) return;
  *part.penalty = penalty;
  *part.correct = static_cast<int64_t>(right);
  *part.invalid = a.totals->invalid;
  if (part.each_row) return;
  *part.cross_entropy = static_cast<compute_t>(loss) / a.totals->norm;
  *part.loss = *part.cross_entropy + penalty;
}

template <typename scalar_t, typename weight_t>
__global__ void __launch_bounds__(kFinishThreads, 2)
    head_deviation_finish_kernel(FinishArguments<scalar_t, weight_t> a) {
  constexpr int kVector = 16 / sizeof(scalar_t);
  constexpr int kWeightVector = 16 / sizeof(weight_t);
  int block = static_cast<int>(blockIdx.x);
  // Those whose loads wait for each other come first.
  if (block < a.bias.blocks) {
    add_bias(a, block);
  } else if ((block -= a.bias.blocks) < a.features.blocks) {
    a.features.packs ? finish_features<kVector>(a, block) : finish_features<1>(a, block);
  } else if ((block -= a.features.blocks) < a.weight.blocks) {
    a.weight.packs ? finish_weight<kWeightVector>(a, block) : finish_weight<1>(a, block);
  }
  if (a.last && is_last_block(&a.totals->finished)) finish_sums(a);
}

}  // namespace fst_fast
