#pragma once

#include <cooperative_groups.h>

#include "head_deviation_row.cuh"

// What the parts of head_deviation_small_kernel share. No ATen and no CUDA host calls here.
namespace fst_fast {

constexpr int kWarpClasses = 2;  // that a warp takes at a time
constexpr int kWarpRows = 4;     // that a warp takes at a time
constexpr int kQuad = 4;         // columns of a thread
constexpr int kClusterBlocks = 16;

// Blocks of the whole grid, as many as there are tiles of rows or slices of columns.
struct GridShape {
  static constexpr bool kCluster = false;
  static constexpr int kThreads = 256;
  static constexpr int kClasses = 256;  // at most
  static constexpr int kRows = 4;       // that a block takes at a time
  static constexpr int kColumns = 16;   // of d_weight that a block takes at a time
};

// One cluster of kClusterBlocks: its barrier takes a fraction of the time of a grid's.
struct ClusterShape {
  static constexpr bool kCluster = true;
  static constexpr int kThreads = 512;
  static constexpr int kClasses = 64;
  static constexpr int kRows = 8;
  static constexpr int kColumns = 32;
};

template <typename Shape>
constexpr int kSmallWarps = Shape::kThreads / kWarp;
template <typename Shape>
constexpr int kQuads = Shape::kColumns / kQuad;
template <typename Shape>
constexpr int kItems = Shape::kClasses * kQuads<Shape> / Shape::kThreads;

// In this order warps come first that have no logits to find while others have.
template <typename Shape>
__device__ int late_thread() {
  return Shape::kThreads - 1 - static_cast<int>(threadIdx.x);
}

// What one block adds to the sums over all rows and columns.
struct SmallPart {
  double loss;
  double overlap;  // of weight with weight0
  int64_t correct;
  int64_t invalid;  // its first row with a bad label, or the number of rows
};

template <typename scalar_t, typename weight_t>
struct SmallHead {
  using compute_t = compute_of<scalar_t>;

  LossTerms<compute_t> terms;
  const scalar_t* features;  // [rows, columns]
  const weight_t* weight;    // [classes, columns]
  const weight_t* bias;      // [classes]; null: none
  const weight_t* weight0;   // [classes, columns]; null: no penalty
  const compute_t* weight_scale;
  const compute_t* alpha_scale;
  compute_t alpha;
  int64_t columns;

  compute_t* loss;
  compute_t* cross_entropy;
  compute_t* penalty;
  int64_t* correct;
  int64_t* invalid;
  scalar_t* d_features;  // null: not wanted; so the next two
  weight_t* d_weight;
  weight_t* d_bias;

  compute_t* d_logits;  // [rows, classes]
  SmallPart* parts;     // [gridDim.x]
};

// What a block needs all along. Loaded as they are: the first use of a load is where it is waited
// for.
template <typename compute_t>
struct SmallScalars {
  compute_t scale = 1;        // weight_scale
  compute_t alpha_scale = 1;  // on alpha
  compute_t norm = 1;
  compute_t row_grad = 1;  // the sum over all rows, where there is one for each
};

template <typename Shape, typename compute_t>
struct SmallShared {
  static constexpr int kTileRows = 512 / sizeof(compute_t);
  static constexpr int kStaged = 45056 / sizeof(compute_t) - kTileRows * Shape::kColumns;

  alignas(16) compute_t d_logits[kStaged];  // before the barrier [kRows, classes], logits at first
  alignas(16) compute_t features[kTileRows * Shape::kColumns];
  double sums[3][kSmallWarps<Shape>];  // of norm, row_grad and overlap
  SmallPart parts[Shape::kRows];

  // How many rows of d_logits and features are held at a time.
  __device__ static int tile_rows(int classes) {
    const int rows = kStaged / classes;
    return rows < kTileRows ? rows : kTileRows;
  }
};

// Up to kQuad elements of a row from d0 on; zeros from `columns` on.
template <int kVector, typename value_t>
__device__ Pack<value_t, kQuad> load_quad(const value_t* row, int64_t d0, int64_t columns) {
  constexpr int kPart = kVector < kQuad ? kVector : kQuad;
  Pack<value_t, kQuad> quad{};
#pragma unroll
  for (int c = 0; c < kQuad; c += kPart) {
    if (d0 + c >= columns) continue;
    const auto part = load_pack<kPart>(row + d0 + c);
#pragma unroll
    for (int i = 0; i < kPart; ++i) quad.at[c + i] = part.at[i];
  }
  return quad;
}

template <int kVector, typename value_t>
__device__ void store_quad(value_t* row, int64_t d0, int64_t columns,
                           const Pack<value_t, kQuad>& quad) {
  constexpr int kPart = kVector < kQuad ? kVector : kQuad;
#pragma unroll
  for (int c = 0; c < kQuad; c += kPart) {
    if (d0 + c >= columns) continue;
    Pack<value_t, kPart> part;
#pragma unroll
    for (int i = 0; i < kPart; ++i) part.at[i] = quad.at[c + i];
    store_pack(row + d0 + c, part);
  }
}

// A barrier of all blocks: what a thread wrote before arrive() the others see after wait(), and in
// between it does what nobody waits for.
template <typename Shape>
struct Meeting {
  unsigned token = 0;

  __device__ void arrive() {
    if constexpr (Shape::kCluster) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
      cooperative_groups::this_cluster().barrier_arrive();
#else
      __trap();  // not launched: see cluster_fits
#endif
    } else {
      token = cooperative_groups::this_grid().barrier_arrive();
    }
  }

  __device__ void wait() {
    if constexpr (Shape::kCluster) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
      cooperative_groups::this_cluster().barrier_wait();
#else
      __trap();
#endif
    } else {
      cooperative_groups::this_grid().barrier_wait(static_cast<unsigned&&>(token));
    }
  }
};

}  // namespace fst_fast
