#pragma once

#include "head_deviation_small_common.cuh"

// The columns of d_weight of a small head, after the barrier across the grid.
namespace fst_fast {

// Rows [first, first + count) of one slice of columns, as compute_t; an ignored row as zeros.
template <typename scalar_t, typename weight_t>
__device__ void stage_features(const SmallHead<scalar_t, weight_t>& head, int64_t slice,
                               int64_t first, int count, compute_of<scalar_t>* staged) {
#pragma unroll 4
  for (int i = threadIdx.x; i < count * kColumns; i += kSmallThreads) {
    const int64_t row = first + i / kColumns;
    const int64_t d = slice * kColumns + i % kColumns;
    const bool read = d < head.columns && !head.terms.ignored(row);
    staged[i] = read ? static_cast<compute_of<scalar_t>>(head.features[row * head.columns + d]) : 0;
  }
}

// What one thread adds up of d_weight: for each of its items, four columns and d_bias.
template <typename compute_t>
using ItemSums = compute_t[kItems][kQuad + 1];

// Adds rows split, split + splits, ... of what is staged.
template <typename compute_t>
__device__ void add_rows(const SmallShared<compute_t>& shared, int classes, int item0, int split,
                         int splits, int count, ItemSums<compute_t>& sums) {
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int item = item0 + j * kSmallThreads;
    if (item >= classes * kQuads) break;
    const compute_t* d_logits = shared.d_logits + item / kQuads;
    const compute_t* x = shared.features + item % kQuads * kQuad;
#pragma unroll 4
    for (int row = split; row < count; row += splits) {
      const compute_t d = d_logits[row * classes];
      const auto values = load_pack<kQuad>(x + row * kColumns);
#pragma unroll
      for (int c = 0; c < kQuad; ++c) sums[j][c] += d * values.at[c];
      sums[j][kQuad] += d;
    }
  }
}

// Gathers in the first of `splits` groups of threads, each with `items` items, what all have.
template <typename compute_t>
__device__ void join_splits(SmallShared<compute_t>& shared, int items, int splits,
                            ItemSums<compute_t>& sums) {
  if (threadIdx.x < items * splits) {
#pragma unroll
    for (int c = 0; c <= kQuad; ++c) shared.d_logits[c * kSmallThreads + threadIdx.x] = sums[0][c];
  }
  __syncthreads();
  if (threadIdx.x < items) {
    for (int split = 1; split < splits; ++split) {
#pragma unroll
      for (int c = 0; c <= kQuad; ++c) {
        sums[0][c] += shared.d_logits[c * kSmallThreads + split * items + threadIdx.x];
      }
    }
  }
  __syncthreads();
}

template <typename scalar_t, typename weight_t>
__device__ void write_item(const SmallHead<scalar_t, weight_t>& head, int64_t slice, int item,
                           compute_of<scalar_t> share, const compute_of<scalar_t>* sums) {
  using compute_t = compute_of<scalar_t>;
  const int64_t k = item / kQuads;
  const int64_t d0 = slice * kColumns + item % kQuads * kQuad;
#pragma unroll
  for (int c = 0; c < kQuad; ++c) {
    if (head.d_weight == nullptr || d0 + c >= head.columns) continue;
    const int64_t at = k * head.columns + d0 + c;
    compute_t value = sums[c];
    if (head.weight0 != nullptr) value += share * static_cast<compute_t>(head.weight0[at]);
    head.d_weight[at] = static_cast<weight_t>(value);
  }
  if (head.d_bias != nullptr && d0 == 0) head.d_bias[k] = static_cast<weight_t>(sums[kQuad]);
}

// One slice of columns of d_weight, plus share * weight0; with the first slice, d_bias.
template <typename scalar_t, typename weight_t>
__device__ void find_d_weight(const SmallHead<scalar_t, weight_t>& head, int64_t slice, bool staged,
                              compute_of<scalar_t> share,
                              SmallShared<compute_of<scalar_t>>& shared) {
  using compute_t = compute_of<scalar_t>;
  const int classes = static_cast<int>(head.terms.classes);
  const int items = classes * kQuads;
  const int splits = items < kSmallThreads ? kSmallThreads / items : 1;
  const int split = splits > 1 ? threadIdx.x / items : 0;
  const int item0 = splits > 1 ? threadIdx.x % items : threadIdx.x;
  const int tile_rows = shared.tile_rows(classes);
  ItemSums<compute_t> sums = {};
  for (int64_t first = 0; first < head.terms.rows; first += tile_rows) {
    const int64_t left = head.terms.rows - first;
    const int count = static_cast<int>(left < tile_rows ? left : tile_rows);
    if (!staged || first > 0) stage_features(head, slice, first, count, shared.features);
#pragma unroll 4
    for (int i = threadIdx.x; i < count * classes; i += kSmallThreads) {
      shared.d_logits[i] = head.d_logits[first * classes + i];
    }
    __syncthreads();
    if (split < splits) add_rows(shared, classes, item0, split, splits, count, sums);
    __syncthreads();
  }
  if (splits > 1) join_splits(shared, items, splits, sums);
  if (split > 0) return;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int item = item0 + j * kSmallThreads;
    if (item < items) write_item(head, slice, item, share, sums[j]);
  }
}

}  // namespace fst_fast
