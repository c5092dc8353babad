#pragma once

#include <cooperative_groups.h>

#include "head_deviation_small_columns.cuh"
#include "head_deviation_small_rows.cuh"

// A head of few classes, in one launch. First every block takes rows: their logits, losses,
// d_logits and d_features. After one barrier across the grid it takes columns of d_weight, for
// which it needs the d_logits of all rows. No ATen and no CUDA host calls here.
namespace fst_fast {

// The sums over all rows; one warp calls it.
template <typename scalar_t, typename weight_t>
__device__ void write_sums(const SmallHead<scalar_t, weight_t>& head, compute_of<scalar_t> norm) {
  using compute_t = compute_of<scalar_t>;
  const auto& terms = head.terms;
  const int lane = threadIdx.x % kWarp;
  RowPart all = {0, 0, terms.rows};
  double overlap = 0;
  for (int i = lane; i < gridDim.x * kRows; i += kWarp) {
    const RowPart part = head.row_parts[i];
    all.loss += part.loss;
    all.correct += part.correct;
    all.invalid = part.invalid < all.invalid ? part.invalid : all.invalid;
    if (head.weight0 != nullptr && i < gridDim.x) overlap += head.overlaps[i];
  }
  all = {warp_sum(all.loss), warp_sum(all.correct), warp_min(all.invalid)};
  overlap = warp_sum(overlap);
  const compute_t penalty =
      head.weight0 == nullptr ? 0 : head.strength() * static_cast<compute_t>(overlap);
  if (lane == 0) {
    *head.penalty = penalty;
    *head.correct = all.correct;
    *head.invalid = all.invalid == terms.rows ? -1 : all.invalid;
  }
  if (terms.reduction == Reduction::none) {
    for (int64_t row = lane; row < terms.rows; row += kWarp) {
      head.loss[row] = head.cross_entropy[row] + penalty;
    }
  } else if (lane == 0) {
    *head.cross_entropy = static_cast<compute_t>(all.loss) / norm;
    *head.loss = *head.cross_entropy + penalty;
  }
}

template <typename scalar_t, typename weight_t, int kVector>
__global__ void __launch_bounds__(kSmallThreads, 2)
    head_deviation_small_kernel(SmallHead<scalar_t, weight_t> head) {
  using compute_t = compute_of<scalar_t>;
  auto& shared = *reinterpret_cast<SmallShared<compute_t>*>(dynamic_shared());
  const auto sums = take_rows<kVector>(head, shared);

  // The last block has columns to take only if all the others do.
  int64_t slices = head.d_bias != nullptr ? 1 : 0;
  if (head.d_weight != nullptr) slices = (head.columns + kColumns - 1) / kColumns;
  const int tile_rows = shared.tile_rows(static_cast<int>(head.terms.classes));
  const int64_t rows = head.terms.rows;
  const int count = static_cast<int>(rows < tile_rows ? rows : tile_rows);
  // These do not depend on other blocks, so they travel while the barrier waits.
  if (blockIdx.x < slices) stage_features(head, blockIdx.x, 0, count, shared.features);
  cooperative_groups::this_grid().sync();

  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < kWarp) write_sums(head, sums.norm);
  const compute_t share = head.weight0 == nullptr ? 0 : head.strength() * sums.row_grad;
  for (int64_t slice = blockIdx.x; slice < slices; slice += gridDim.x) {
    find_d_weight(head, slice, slice == blockIdx.x, share, shared);
  }
}

}  // namespace fst_fast
