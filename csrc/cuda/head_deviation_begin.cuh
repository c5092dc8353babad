#pragma once

#include "head_deviation_row.cuh"

// What precedes the matrix products of a head of many classes, in one launch: totals over all rows
// by one block, and operands of the products by the others. No ATen and no CUDA host calls here.
namespace fst_fast {

constexpr int kTotalThreads = 1024;
constexpr int kOperandBlocks = 1024;  // for each operand, at most

// What all rows need and one block finds first. All gradients are kept without `factor` until a
// product is done: with it those of a large batch would vanish in float16.
template <typename compute_t>
struct Totals {
  compute_t norm;
  compute_t factor;  // 1 / norm; 0 if every row is ignored
  compute_t class_weights;
  compute_t strength;  // of the penalty
  compute_t share;     // of weight0 in d_weight
  int64_t invalid;
  unsigned finished;  // blocks of the last launch that are done
};

template <typename scalar_t, typename weight_t>
struct BeginArguments {
  using compute_t = compute_of<scalar_t>;

  LossTerms<compute_t> terms;
  const compute_t* alpha_scale;
  compute_t alpha;
  Totals<compute_t>* totals;
  // features with zeros in the rows that are ignored
  const scalar_t* features;  // [rows, columns]
  scalar_t* masked;          // [rows, columns]
  int64_t columns;
  int mask_blocks;  // 0: not wanted
  // weight in the dtype of features, and zeros behind it
  const weight_t* weight;  // [weights]
  scalar_t* narrow;        // [weights_and_zeros]
  int64_t weights, weights_and_zeros;
  int narrow_blocks;  // 0: not needed
  // Whether they move in packs of 16 bytes.
  bool mask_packs, narrow_packs;
};

template <typename scalar_t, typename weight_t>
__device__ void find_totals(const BeginArguments<scalar_t, weight_t>& a) {
  using compute_t = compute_of<scalar_t>;
  auto* warp_sums = reinterpret_cast<double*>(dynamic_shared());
  const auto& terms = a.terms;
  double norm = 0;
  double counted = 0;
  double row_grad = 0;
  int64_t first_bad = terms.rows;
  for (int64_t row = threadIdx.x; row < terms.rows; row += kTotalThreads) {
    const Target<compute_t> target(terms, terms.labels[row]);
    norm += target.weight;
    counted += target.ignored ? 0 : 1;
    if (terms.row_grad != nullptr) row_grad += terms.row_grad[row];
    if (target.bad && row < first_bad) first_bad = row;
  }
  double class_weights = 0;
  if (terms.class_weight != nullptr && terms.label_smoothing > 0) {
    for (int64_t k = threadIdx.x; k < terms.classes; k += kTotalThreads) {
      class_weights += terms.class_weight[k];
    }
    class_weights = block_sum(class_weights, warp_sums);
  } else {
    class_weights = static_cast<double>(terms.classes);
  }
  norm = block_sum(norm, warp_sums);
  counted = block_sum(counted, warp_sums);
  row_grad = block_sum(row_grad, warp_sums);
  first_bad = warp_min(first_bad);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = static_cast<double>(first_bad);
  __syncthreads();
  if (threadIdx.x != 0) return;

  for (int warp = 0; warp < kTotalThreads / kWarp; ++warp) {
    const auto other = static_cast<int64_t>(warp_sums[warp]);
    first_bad = other < first_bad ? other : first_bad;
  }
  Totals<compute_t> totals;
  totals.norm = terms.reduction == Reduction::mean ? static_cast<compute_t>(norm) : 1;
  totals.factor = counted == 0 ? 0 : 1 / totals.norm;
  totals.class_weights = static_cast<compute_t>(class_weights);
  totals.strength = a.alpha_scale == nullptr ? a.alpha : a.alpha * *a.alpha_scale;
  totals.share = totals.strength;
  if (terms.row_grad != nullptr) totals.share *= static_cast<compute_t>(row_grad);
  totals.invalid = first_bad == terms.rows ? -1 : first_bad;
  totals.finished = 0;
  *a.totals = totals;
}

template <int kVector, typename scalar_t, typename weight_t>
__device__ void mask_features(const BeginArguments<scalar_t, weight_t>& a, int block) {
  const int64_t first = (static_cast<int64_t>(block) * kTotalThreads + threadIdx.x) * kVector;
  const int64_t step = static_cast<int64_t>(a.mask_blocks) * kTotalThreads * kVector;
  for (int64_t i = first; i < a.terms.rows * a.columns; i += step) {
    Pack<scalar_t, kVector> values;
#pragma unroll
    for (int j = 0; j < kVector; ++j) values.at[j] = static_cast<scalar_t>(0.0f);
    if (!a.terms.ignored(i / a.columns)) values = load_pack<kVector>(a.features + i);
    store_pack(a.masked + i, values);
  }
}

// Elements [0, packed) of the weight in packs, and those behind them, few, one by one.
template <int kVector, typename scalar_t, typename weight_t>
__device__ void narrow_weight(const BeginArguments<scalar_t, weight_t>& a, int block) {
  const int64_t thread = static_cast<int64_t>(block) * kTotalThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(a.narrow_blocks) * kTotalThreads;
  const int64_t packed = a.weights / kVector * kVector;
  for (int64_t i = thread * kVector; i < packed; i += threads * kVector) {
    const auto from = load_pack<kVector>(a.weight + i);
    Pack<scalar_t, kVector> to;
#pragma unroll
    for (int j = 0; j < kVector; ++j) to.at[j] = static_cast<scalar_t>(from.at[j]);
    store_pack(a.narrow + i, to);
  }
  for (int64_t i = packed + thread; i < a.weights_and_zeros; i += threads) {
    a.narrow[i] = static_cast<scalar_t>(i < a.weights ? a.weight[i] : static_cast<weight_t>(0.0f));
  }
}

template <typename scalar_t, typename weight_t>
__global__ void __launch_bounds__(kTotalThreads, 1)
    head_deviation_begin_kernel(BeginArguments<scalar_t, weight_t> a) {
  constexpr int kVector = 16 / sizeof(scalar_t);
  int block = static_cast<int>(blockIdx.x) - 1;
  if (block < 0) {
    find_totals(a);
  } else if (block < a.mask_blocks) {
    a.mask_packs ? mask_features<kVector>(a, block) : mask_features<1>(a, block);
  } else {
    block -= a.mask_blocks;
    a.narrow_packs ? narrow_weight<kVector>(a, block) : narrow_weight<1>(a, block);
  }
}

}  // namespace fst_fast
