#pragma once

#include "head_deviation_small_columns.cuh"

// The rows of a small head, before the barrier across the blocks.
namespace fst_fast {

// logits [kRows, classes] of a tile of rows. Past the last row, and the last class, that one again.
template <typename Shape, int kVector, typename scalar_t, typename weight_t>
__device__ void find_logits(const SmallHead<scalar_t, weight_t>& head, int64_t tile,
                            compute_of<scalar_t> scale, compute_of<scalar_t>* logits) {
  using compute_t = compute_of<scalar_t>;
  constexpr int kSums = kWarpClasses * kWarpRows;
  const int classes = static_cast<int>(head.terms.classes);
  const int lane = threadIdx.x % kWarp;
  const int groups = (classes + kWarpClasses - 1) / kWarpClasses;
  const int items = groups * (Shape::kRows / kWarpRows);
  for (int item = threadIdx.x / kWarp; item < items; item += kSmallWarps<Shape>) {
    const int k0 = item % groups * kWarpClasses;
    const int r0 = item / groups * kWarpRows;
    // Of the sum that the lane ends with.
    const int mine = lane / (kWarp / kSums);
    const int k = k0 + mine / kWarpRows;
    compute_t offset = 0;
    if (head.bias != nullptr && k < classes) offset = static_cast<compute_t>(head.bias[k]);

    const scalar_t* x[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int64_t row = tile * Shape::kRows + r0 + r;
      x[r] = head.features + (row < head.terms.rows ? row : head.terms.rows - 1) * head.columns;
    }
    compute_t sums[kSums] = {};
#pragma unroll 2
    for (int64_t d = static_cast<int64_t>(lane) * kVector; d < head.columns; d += kWarp * kVector) {
      Pack<scalar_t, kVector> values[kWarpRows];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) values[r] = load_pack<kVector>(x[r] + d);
#pragma unroll
      for (int j = 0; j < kWarpClasses; ++j) {
        const int row = k0 + j < classes ? k0 + j : classes - 1;
        const auto w = load_pack<kVector>(head.weight + row * head.columns + d);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
            sums[j * kWarpRows + r] +=
                static_cast<compute_t>(w.at[i]) * static_cast<compute_t>(values[r].at[i]);
          }
        }
      }
    }
    const compute_t sum = warp_sums(sums);
    if (lane % (kWarp / kSums) == 0 && k < classes) {
      logits[(r0 + mine % kWarpRows) * classes + k] = scale * sum + offset;
    }
  }
}

// Turns the logits of one row into d_logits; the whole warp must call it.
template <typename scalar_t, typename weight_t>
__device__ void finish_row(const SmallHead<scalar_t, weight_t>& head, int64_t row,
                           compute_of<scalar_t>* logits, compute_of<scalar_t> scale,
                           SmallPart& part) {
  using compute_t = compute_of<scalar_t>;
  const auto& terms = head.terms;
  const int classes = static_cast<int>(terms.classes);
  const int lane = threadIdx.x % kWarp;
  Softmax<compute_t> softmax;
  compute_t class_weights = 0;
#pragma unroll 1
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
#pragma unroll 1
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
template <typename Shape, int kVector, typename scalar_t, typename weight_t>
__device__ void find_d_features(const SmallHead<scalar_t, weight_t>& head, int64_t tile,
                                compute_of<scalar_t> scale, const compute_of<scalar_t>* d_logits) {
  using compute_t = compute_of<scalar_t>;
  constexpr int kShare = 2;  // rows of a thread
  const int classes = static_cast<int>(head.terms.classes);
  const int packs = static_cast<int>(head.columns / kVector);
  for (int item = threadIdx.x; item < Shape::kRows / kShare * packs; item += Shape::kThreads) {
    const int r0 = item / packs * kShare;
    const int64_t d = item % packs * kVector;
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
      const int64_t row = tile * Shape::kRows + r0 + r;
      if (row >= head.terms.rows) continue;
      Pack<scalar_t, kVector> out;
#pragma unroll
      for (int i = 0; i < kVector; ++i) out.at[i] = static_cast<scalar_t>(scale * sums[r][i]);
      store_pack(head.d_features + row * head.columns + d, out);
    }
  }
}

// This thread's part of <weight, weight0>, of the slices of columns that its block takes.
template <typename Shape, int kVector, typename scalar_t, typename weight_t>
__device__ double find_overlap(const SmallHead<scalar_t, weight_t>& head,
                               compute_of<scalar_t> scale) {
  using compute_t = compute_of<scalar_t>;
  constexpr int kEach = kQuads<Shape>;
  const int items = static_cast<int>(head.terms.classes) * kEach;
  const int64_t step = static_cast<int64_t>(gridDim.x) * Shape::kColumns;
  double sum = 0;
#pragma unroll 1
  for (int64_t d = static_cast<int64_t>(blockIdx.x) * Shape::kColumns; d < head.columns;
       d += step) {
#pragma unroll 1
    for (int item = late_thread<Shape>(); item < items; item += Shape::kThreads) {
      const int64_t row = item / kEach * head.columns;
      const int64_t d0 = d + item % kEach * kQuad;
      const auto w = load_quad<kVector>(head.weight + row, d0, head.columns);
      const auto w0 = load_quad<kVector>(head.weight0 + row, d0, head.columns);
#pragma unroll
      for (int c = 0; c < kQuad; ++c) {
        const compute_t scaled = scale * static_cast<compute_t>(w.at[c]);
        sum += static_cast<double>(scaled) * static_cast<double>(static_cast<compute_t>(w0.at[c]));
      }
    }
  }
  return sum;
}

// Leaves in shared.sums what each warp has; every block finds for itself what needs all labels.
template <typename Shape, int kVector, typename scalar_t, typename weight_t>
__device__ void add_up(const SmallHead<scalar_t, weight_t>& head, compute_of<scalar_t> scale,
                       SmallShared<Shape, compute_of<scalar_t>>& shared) {
  const auto& terms = head.terms;
  double sums[4] = {};
  if (terms.reduction == Reduction::mean || terms.row_grad != nullptr) {
#pragma unroll 1
    for (int64_t row = late_thread<Shape>(); row < terms.rows; row += Shape::kThreads) {
      sums[0] += Target<compute_of<scalar_t>>(terms, terms.labels[row]).weight;
      if (terms.row_grad != nullptr) sums[1] += terms.row_grad[row];
    }
  }
  if (head.weight0 != nullptr) sums[2] = find_overlap<Shape, kVector>(head, scale);
  const double sum = warp_sums(sums);
  const int which = threadIdx.x % kWarp / (kWarp / 4);
  if (threadIdx.x % (kWarp / 4) == 0 && which < 3) {
    shared.sums[which][threadIdx.x / kWarp] = sum;
  }
}

template <typename Shape, typename compute_t>
__device__ double total(const SmallShared<Shape, compute_t>& shared, int which) {
  double sum = 0;
#pragma unroll 4
  for (int warp = 0; warp < kSmallWarps<Shape>; ++warp) sum += shared.sums[which][warp];
  return sum;
}

// This block's part of the sums, from those of the warps that had rows; one thread calls it.
template <typename Shape, typename compute_t>
__device__ SmallPart block_part(const SmallShared<Shape, compute_t>& shared) {
  SmallPart all = shared.parts[0];
#pragma unroll 1
  for (int warp = 1; warp < Shape::kRows; ++warp) {
    const SmallPart part = shared.parts[warp];
    all.loss += part.loss;
    all.correct += part.correct;
    all.invalid = part.invalid < all.invalid ? part.invalid : all.invalid;
  }
  all.overlap = total(shared, 2);
  return all;
}

// All that needs one row only, and the features that this block's columns will need. d_logits and
// parts are left in device memory for all blocks, which meet after they are written.
template <typename Shape, int kVector, typename scalar_t, typename weight_t>
__device__ SmallScalars<compute_of<scalar_t>> take_rows(
    const SmallHead<scalar_t, weight_t>& head, int64_t slices, Meeting<Shape>& meeting,
    SmallShared<Shape, compute_of<scalar_t>>& shared) {
  using compute_t = compute_of<scalar_t>;
  const auto& terms = head.terms;
  const int warp = threadIdx.x / kWarp;
  const int64_t tiles = (terms.rows + Shape::kRows - 1) / Shape::kRows;
  SmallScalars<compute_t> scalars;
  if (head.weight_scale != nullptr) scalars.scale = *head.weight_scale;
  if (head.alpha_scale != nullptr) scalars.alpha_scale = *head.alpha_scale;
  SmallPart part = {0, 0, 0, terms.rows};
  bool last = false;
  for (int64_t tile = blockIdx.x; !last; tile += gridDim.x) {
    const bool first = tile == blockIdx.x;
    last = tile + gridDim.x >= tiles;
    if (tile < tiles) find_logits<Shape, kVector>(head, tile, scalars.scale, shared.d_logits);
    if (first) add_up<Shape, kVector>(head, scalars.scale, shared);
    __syncthreads();
    if (first && terms.reduction == Reduction::mean) {
      scalars.norm = static_cast<compute_t>(total(shared, 0));
    }
    if (first && terms.row_grad != nullptr) {
      scalars.row_grad = static_cast<compute_t>(total(shared, 1));
    }
    const int64_t row = tile * Shape::kRows + warp;
    if (warp < Shape::kRows) {
      auto* logits = shared.d_logits + warp * terms.classes;
      if (row < terms.rows) finish_row(head, row, logits, 1 / scalars.norm, part);
      if (threadIdx.x % kWarp == 0) shared.parts[warp] = part;
    } else if (first && blockIdx.x < slices) {
      constexpr int kBusy = Shape::kRows * kWarp;
      stage_features<Shape, kVector>(head, blockIdx.x, 0, threadIdx.x - kBusy,
                                     Shape::kThreads - kBusy, shared);
    }
    __syncthreads();
    if (last) {
      if (late_thread<Shape>() == 0) head.parts[blockIdx.x] = block_part(shared);
      meeting.arrive();
    }
    if (head.d_features != nullptr && tile < tiles) {
      find_d_features<Shape, kVector>(head, tile, scalars.scale, shared.d_logits);
    }
    // Before the shared memory is written again.
    __syncthreads();
  }
  return scalars;
}

}  // namespace fst_fast
