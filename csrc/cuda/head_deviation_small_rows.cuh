#pragma once

#include "head_deviation_small_common.cuh"

// The rows of a small head, before the barrier across the grid.
namespace fst_fast {

// logits [kRows, classes] of a tile of rows. Past the last row, and the last class, that one again.
template <int kVector, typename scalar_t, typename weight_t>
__device__ void find_logits(const SmallHead<scalar_t, weight_t>& head, int64_t tile,
                            compute_of<scalar_t>* logits) {
  using compute_t = compute_of<scalar_t>;
  const int classes = static_cast<int>(head.terms.classes);
  const int lane = threadIdx.x % kWarp;
  const scalar_t* x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = tile * kRows + r;
    x[r] = head.features + (row < head.terms.rows ? row : head.terms.rows - 1) * head.columns;
  }
  for (int k0 = threadIdx.x / kWarp * kClasses; k0 < classes; k0 += kSmallWarps * kClasses) {
    compute_t sums[kClasses][kRows] = {};
    for (int64_t d = static_cast<int64_t>(lane) * kVector; d < head.columns; d += kWarp * kVector) {
      Pack<scalar_t, kVector> values[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) values[r] = load_pack<kVector>(x[r] + d);
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
        const int k = k0 + j < classes ? k0 + j : classes - 1;
        const auto w = load_pack<kVector>(head.weight + k * head.columns + d);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            sums[j][r] += static_cast<compute_t>(w.at[i]) * static_cast<compute_t>(values[r].at[i]);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const compute_t sum = warp_sum(sums[j][r]);
        const int k = k0 + j;
        if (lane != j * kRows + r || k >= classes) continue;
        const auto offset = head.bias == nullptr ? 0 : static_cast<compute_t>(head.bias[k]);
        logits[r * classes + k] = head.scale() * sum + offset;
      }
    }
  }
}

// Turns the logits of one row into d_logits; the whole warp must call it.
template <typename scalar_t, typename weight_t>
__device__ void finish_row(const SmallHead<scalar_t, weight_t>& head, int64_t row,
                           compute_of<scalar_t>* logits, compute_of<scalar_t> scale,
                           RowPart& part) {
  using compute_t = compute_of<scalar_t>;
  const auto& terms = head.terms;
  const int classes = static_cast<int>(terms.classes);
  const int lane = threadIdx.x % kWarp;
  Softmax<compute_t> softmax;
  compute_t class_weights = 0;
  for (int k = lane; k < classes; k += kWarp) {
    softmax.add(logits[k], k);
    class_weights += terms.weight_of(k);
  }
  softmax.merge_warp();
  const RowLoss<compute_t> row_loss(terms, row, softmax, scale, warp_sum(class_weights));
  // Before the logits are written over.
  const compute_t label_log_p = row_loss.log_probability(logits[row_loss.target.label]);
  __syncwarp();
  compute_t smoothed = 0;
  for (int k = lane; k < classes; k += kWarp) {
    const compute_t log_p = row_loss.log_probability(logits[k]);
    smoothed += terms.weight_of(k) * log_p;
    logits[k] = row_loss.gradient(terms, log_p, k);
    head.d_logits[row * classes + k] = logits[k];
  }
  const compute_t loss = row_loss.loss(label_log_p, warp_sum(smoothed));
  part.loss += loss;
  part.correct += row_loss.correct;
  if (row_loss.target.bad && row < part.invalid) part.invalid = row;
  if (terms.reduction == Reduction::none && lane == 0) head.cross_entropy[row] = loss;
}

// d_features of a tile of rows, from its d_logits [kRows, classes].
template <int kVector, typename scalar_t, typename weight_t>
__device__ void find_d_features(const SmallHead<scalar_t, weight_t>& head, int64_t tile,
                                const compute_of<scalar_t>* d_logits) {
  using compute_t = compute_of<scalar_t>;
  constexpr int kShare = kRows / 2;  // rows of a thread
  const int classes = static_cast<int>(head.terms.classes);
  const int64_t packs = head.columns / kVector;
  for (int64_t item = threadIdx.x; item < 2 * packs; item += kSmallThreads) {
    const int r0 = item < packs ? 0 : kShare;
    const int64_t d = (item < packs ? item : item - packs) * kVector;
    compute_t sums[kShare][kVector] = {};
#pragma unroll 4
    for (int k = 0; k < classes; ++k) {
      const auto w = load_pack<kVector>(head.weight + k * head.columns + d);
#pragma unroll
      for (int r = 0; r < kShare; ++r) {
        const compute_t factor = d_logits[(r0 + r) * classes + k];
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[r][i] += factor * static_cast<compute_t>(w.at[i]);
      }
    }
#pragma unroll
    for (int r = 0; r < kShare; ++r) {
      const int64_t row = tile * kRows + r0 + r;
      if (row >= head.terms.rows) continue;
      Pack<scalar_t, kVector> out;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        out.at[i] = static_cast<scalar_t>(head.scale() * sums[r][i]);
      }
      store_pack(head.d_features + row * head.columns + d, out);
    }
  }
}

// This block's part of <weight, weight0>.
template <int kVector, typename scalar_t, typename weight_t>
__device__ double find_overlap(const SmallHead<scalar_t, weight_t>& head, double* warp_sums) {
  using compute_t = compute_of<scalar_t>;
  const compute_t scale = head.scale();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSmallThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSmallThreads * kVector;
  double sum = 0;
  for (int64_t i = thread * kVector; i < head.terms.classes * head.columns; i += step) {
    const auto w = load_pack<kVector>(head.weight + i);
    const auto w0 = load_pack<kVector>(head.weight0 + i);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const compute_t scaled = scale * static_cast<compute_t>(w.at[j]);
      sum += static_cast<double>(scaled) * static_cast<double>(static_cast<compute_t>(w0.at[j]));
    }
  }
  return block_sum(sum, warp_sums);
}

// What every block finds for itself, from the labels and row_grad of all rows.
template <typename compute_t>
struct BatchSums {
  compute_t norm;
  compute_t row_grad;
};

template <typename compute_t>
__device__ BatchSums<compute_t> find_batch_sums(const LossTerms<compute_t>& terms,
                                                double* warp_sums) {
  BatchSums<compute_t> sums = {1, 1};
  if (terms.reduction == Reduction::mean) {
    double norm = 0;
    for (int64_t row = threadIdx.x; row < terms.rows; row += kSmallThreads) {
      norm += Target<compute_t>(terms, terms.labels[row]).weight;
    }
    sums.norm = static_cast<compute_t>(block_sum(norm, warp_sums));
  }
  if (terms.row_grad != nullptr) {
    double sum = 0;
    for (int64_t row = threadIdx.x; row < terms.rows; row += kSmallThreads) {
      sum += terms.row_grad[row];
    }
    sums.row_grad = static_cast<compute_t>(block_sum(sum, warp_sums));
  }
  return sums;
}

// All that needs one row only; d_logits, row_parts and overlaps are left in device memory.
template <int kVector, typename scalar_t, typename weight_t>
__device__ BatchSums<compute_of<scalar_t>> take_rows(const SmallHead<scalar_t, weight_t>& head,
                                                     SmallShared<compute_of<scalar_t>>& shared) {
  const int warp = threadIdx.x / kWarp;
  const int64_t tiles = head.row_tiles();
  RowPart part = {0, 0, head.terms.rows};
  int64_t tile = blockIdx.x;
  if (tile < tiles) find_logits<kVector>(head, tile, shared.d_logits);
  const auto sums = find_batch_sums(head.terms, shared.warp_sums);
  while (tile < tiles) {
    __syncthreads();
    const int64_t row = tile * kRows + warp;
    if (warp < kRows && row < head.terms.rows) {
      auto* logits = shared.d_logits + warp * head.terms.classes;
      finish_row(head, row, logits, 1 / sums.norm, part);
    }
    __syncthreads();
    if (head.d_features != nullptr) find_d_features<kVector>(head, tile, shared.d_logits);
    __syncthreads();
    tile += gridDim.x;
    if (tile < tiles) find_logits<kVector>(head, tile, shared.d_logits);
  }
  if (warp < kRows && threadIdx.x % kWarp == 0) head.row_parts[blockIdx.x * kRows + warp] = part;
  if (head.weight0 != nullptr) {
    const double overlap = find_overlap<kVector>(head, shared.warp_sums);
    if (threadIdx.x == 0) head.overlaps[blockIdx.x] = overlap;
  }
  return sums;
}

}  // namespace fst_fast
