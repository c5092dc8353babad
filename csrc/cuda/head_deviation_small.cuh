#pragma once

#include "head_deviation_small_columns.cuh"
#include "head_deviation_small_rows.cuh"

// A head of few classes, in one launch. First every block takes rows: their logits, losses,
// d_logits and d_features. After one barrier across the blocks it takes columns of d_weight, for
// which it needs the d_logits of all rows. What takes the time is not arithmetic but how often a
// load waits for another, so loads that depend on nothing go early, and in warps that have nothing
// else to do. No ATen and no CUDA host calls here.
namespace fst_fast {

// The sums over all rows. One warp calls it, each lane with the part of the block of its number.
template <typename scalar_t, typename weight_t>
__device__ void write_sums(const SmallHead<scalar_t, weight_t>& head, SmallPart all,
                           compute_of<scalar_t> strength, compute_of<scalar_t> norm) {
  using compute_t = compute_of<scalar_t>;
  const auto& terms = head.terms;
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int i = lane + kWarp; i < gridDim.x; i += kWarp) {
    const SmallPart part = head.parts[i];
    all.loss += part.loss;
    all.overlap += part.overlap;
    all.correct += part.correct;
    all.invalid = part.invalid < all.invalid ? part.invalid : all.invalid;
  }
  all = {warp_sum(all.loss), warp_sum(all.overlap), warp_sum(all.correct), warp_min(all.invalid)};
  const compute_t penalty =
      head.weight0 == nullptr ? 0 : strength * static_cast<compute_t>(all.overlap);
  if (lane == 0) {
    *head.penalty = penalty;
    *head.correct = all.correct;
    *head.invalid = all.invalid == terms.rows ? -1 : all.invalid;
  }
  if (terms.reduction == Reduction::none) {
#pragma unroll 1
    for (int64_t row = lane; row < terms.rows; row += kWarp) {
      head.loss[row] = head.cross_entropy[row] + penalty;
    }
  } else if (lane == 0) {
    const compute_t cross_entropy = static_cast<compute_t>(all.loss) / norm;
    *head.cross_entropy = cross_entropy;
    *head.loss = cross_entropy + penalty;
  }
}

template <typename Shape, typename scalar_t, typename weight_t, int kVector>
__global__ void __launch_bounds__(Shape::kThreads, 512 / Shape::kThreads)
    head_deviation_small_kernel(SmallHead<scalar_t, weight_t> head) {
  using compute_t = compute_of<scalar_t>;
  auto& shared = *reinterpret_cast<SmallShared<Shape, compute_t>*>(dynamic_shared());
  int64_t slices = head.d_bias != nullptr ? 1 : 0;
  if (head.d_weight != nullptr) slices = (head.columns + Shape::kColumns - 1) / Shape::kColumns;
  Meeting<Shape> meeting;
  const auto scalars = take_rows<Shape, kVector>(head, slices, meeting, shared);
  meeting.wait();

  const bool sums = blockIdx.x == gridDim.x - 1 && threadIdx.x < kWarp;
  SmallPart part = {0, 0, 0, head.terms.rows};
  // Travels while the columns are found.
  if (sums && threadIdx.x < gridDim.x) part = head.parts[threadIdx.x];
  const compute_t strength = head.alpha * scalars.alpha_scale;
  const compute_t share = strength * scalars.row_grad;
  for (int64_t slice = blockIdx.x; slice < slices; slice += gridDim.x) {
    find_d_weight<Shape, kVector>(head, slice, share, shared);
  }
  if (sums) write_sums(head, part, strength, scalars.norm);
}

}  // namespace fst_fast
