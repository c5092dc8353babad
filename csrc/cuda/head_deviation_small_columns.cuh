#pragma once

#include "head_deviation_small_common.cuh"

// The columns of d_weight of a small head, after the barrier across the blocks.
namespace fst_fast {

// Rows from `first` on of one slice of columns, as compute_t; an ignored row as zeros. `threads`
// threads call it, of which this is number `thread`.
template <typename Shape, int kVector, typename scalar_t, typename weight_t>
__device__ void stage_features(const SmallHead<scalar_t, weight_t>& head, int64_t slice,
                               int64_t first, int thread, int threads,
                               SmallShared<Shape, compute_of<scalar_t>>& shared) {
  using compute_t = compute_of<scalar_t>;
  constexpr int kPacks = Shape::kColumns / kVector;
  const int64_t left = head.terms.rows - first;
  const int most = shared.tile_rows(static_cast<int>(head.terms.classes));
  const int count = static_cast<int>(left < most ? left : most);
#pragma unroll 4
  for (int i = thread; i < count * kPacks; i += threads) {
    const int64_t row = first + i / kPacks;
    const int64_t d = slice * Shape::kColumns + i % kPacks * kVector;
    Pack<scalar_t, kVector> x{};
    if (d < head.columns) x = load_pack<kVector>(head.features + row * head.columns + d);
    const bool ignored = head.terms.ignored(row);
    Pack<compute_t, kVector> staged;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      staged.at[j] = ignored ? compute_t(0) : static_cast<compute_t>(x.at[j]);
    }
    store_pack(shared.features + i * kVector, staged);
  }
}

// What one thread adds up of d_weight: for each of its items, four columns and d_bias.
template <typename Shape, typename compute_t>
using ItemSums = compute_t[kItems<Shape>][kQuad + 1];

// weight0 at one thread's items, which travels while the rows are added.
template <typename Shape, typename weight_t>
using ItemOrigins = Pack<weight_t, kQuad>[kItems<Shape>];

template <typename Shape, int kVector, typename scalar_t, typename weight_t>
__device__ void load_origins(const SmallHead<scalar_t, weight_t>& head, int64_t slice, int items,
                             int item0, ItemOrigins<Shape, weight_t>& origins) {
#pragma unroll
  for (int j = 0; j < kItems<Shape>; ++j) {
    const int item = item0 + j * Shape::kThreads;
    if (item >= items) break;
    const int64_t d0 = slice * Shape::kColumns + item % kQuads<Shape> * kQuad;
    const weight_t* row = head.weight0 + item / kQuads<Shape> * head.columns;
    origins[j] = load_quad<kVector>(row, d0, head.columns);
  }
}

// Adds rows split, split + splits, ... of what is staged.
template <typename Shape, typename compute_t>
__device__ void add_rows(const SmallShared<Shape, compute_t>& shared, int classes, int item0,
                         int split, int splits, int count, ItemSums<Shape, compute_t>& sums) {
#pragma unroll
  for (int j = 0; j < kItems<Shape>; ++j) {
    const int item = item0 + j * Shape::kThreads;
    if (item >= classes * kQuads<Shape>) break;
    const compute_t* d_logits = shared.d_logits + item / kQuads<Shape>;
    const compute_t* x = shared.features + item % kQuads<Shape> * kQuad;
#pragma unroll 4
    for (int row = split; row < count; row += splits) {
      const compute_t d = d_logits[row * classes];
      const auto values = load_pack<kQuad>(x + row * Shape::kColumns);
#pragma unroll
      for (int c = 0; c < kQuad; ++c) sums[j][c] += d * values.at[c];
      sums[j][kQuad] += d;
    }
  }
}

// Gathers in the first of `splits` groups of threads, each with `items` items, what all have.
template <typename Shape, typename compute_t>
__device__ void join_splits(SmallShared<Shape, compute_t>& shared, int items, int splits,
                            ItemSums<Shape, compute_t>& sums) {
  if (threadIdx.x < items * splits) {
#pragma unroll
    for (int c = 0; c <= kQuad; ++c) {
      shared.d_logits[c * Shape::kThreads + threadIdx.x] = sums[0][c];
    }
  }
  __syncthreads();
  if (threadIdx.x < items) {
#pragma unroll 1
    for (int split = 1; split < splits; ++split) {
#pragma unroll
      for (int c = 0; c <= kQuad; ++c) {
        sums[0][c] += shared.d_logits[c * Shape::kThreads + split * items + threadIdx.x];
      }
    }
  }
  __syncthreads();
}

template <typename Shape, int kVector, typename scalar_t, typename weight_t>
__device__ void write_item(const SmallHead<scalar_t, weight_t>& head, int64_t slice, int item,
                           compute_of<scalar_t> share, const Pack<weight_t, kQuad>& origin,
                           const compute_of<scalar_t>* sums) {
  using compute_t = compute_of<scalar_t>;
  const int64_t k = item / kQuads<Shape>;
  const int64_t d0 = slice * Shape::kColumns + item % kQuads<Shape> * kQuad;
  if (head.d_weight != nullptr) {
    Pack<weight_t, kQuad> out;
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      compute_t value = sums[c];
      // Last, so that small sums are not rounded away beside it.
      if (head.weight0 != nullptr) value += share * static_cast<compute_t>(origin.at[c]);
      out.at[c] = static_cast<weight_t>(value);
    }
    store_quad<kVector>(head.d_weight + k * head.columns, d0, head.columns, out);
  }
  if (head.d_bias != nullptr && d0 == 0) head.d_bias[k] = static_cast<weight_t>(sums[kQuad]);
}

// One slice of columns of d_weight, plus share * weight0; with the first slice, d_bias. The rows of
// this block's first slice have been staged.
template <typename Shape, int kVector, typename scalar_t, typename weight_t>
__device__ void find_d_weight(const SmallHead<scalar_t, weight_t>& head, int64_t slice,
                              compute_of<scalar_t> share,
                              SmallShared<Shape, compute_of<scalar_t>>& shared) {
  const int classes = static_cast<int>(head.terms.classes);
  const int items = classes * kQuads<Shape>;
  const int splits = items < Shape::kThreads ? Shape::kThreads / items : 1;
  const int split = splits > 1 ? threadIdx.x / items : 0;
  const int item0 = splits > 1 ? threadIdx.x % items : threadIdx.x;
  const int tile_rows = shared.tile_rows(classes);
  ItemOrigins<Shape, weight_t> origins = {};
  if (head.weight0 != nullptr && split == 0) {
    load_origins<Shape, kVector>(head, slice, items, item0, origins);
  }
  ItemSums<Shape, compute_of<scalar_t>> sums = {};
  for (int64_t first = 0; first < head.terms.rows; first += tile_rows) {
    const int64_t left = head.terms.rows - first;
    const int count = static_cast<int>(left < tile_rows ? left : tile_rows);
    if (slice != blockIdx.x || first > 0) {
      stage_features<Shape, kVector>(head, slice, first, threadIdx.x, Shape::kThreads, shared);
    }
#pragma unroll 4
    for (int i = threadIdx.x; i < count * classes; i += Shape::kThreads) {
      shared.d_logits[i] = head.d_logits[first * classes + i];
    }
    __syncthreads();
    if (split < splits) add_rows(shared, classes, item0, split, splits, count, sums);
    __syncthreads();
  }
  if (splits > 1) join_splits(shared, items, splits, sums);
  if (split > 0) return;
#pragma unroll
  for (int j = 0; j < kItems<Shape>; ++j) {
    const int item = item0 + j * Shape::kThreads;
    if (item >= items) break;
    write_item<Shape, kVector>(head, slice, item, share, origins[j], sums[j]);
  }
}

}  // namespace fst_fast
