#pragma once

#include "head_deviation_row.cuh"

// What the parts of head_deviation_small_kernel share. No ATen and no CUDA host calls here.
namespace fst_fast {

constexpr int kSmallThreads = 256;
constexpr int kSmallWarps = kSmallThreads / kWarp;
constexpr int kSmallClasses = 256;  // at most
constexpr int kRows = 4;            // that a block takes at a time
constexpr int kClasses = 2;         // that a warp takes at a time
constexpr int kColumns = 16;        // of d_weight that a block takes at a time
constexpr int kQuad = 4;            // columns of a thread
constexpr int kQuads = kColumns / kQuad;
constexpr int kItems = kSmallClasses * kQuads / kSmallThreads;

// What the rows of one warp add to the sums over all rows.
struct RowPart {
  double loss;
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
  RowPart* row_parts;   // [gridDim.x * kRows]
  double* overlaps;     // [gridDim.x], of weight with weight0

  __device__ compute_t scale() const {
    return weight_scale == nullptr ? compute_t(1) : *weight_scale;
  }
  __device__ compute_t strength() const {
    return alpha_scale == nullptr ? alpha : alpha * *alpha_scale;
  }
  __device__ int64_t row_tiles() const { return (terms.rows + kRows - 1) / kRows; }
};

template <typename compute_t>
struct SmallShared {
  static constexpr int kStaged = 32768 / sizeof(compute_t);
  static constexpr int kTileRows = 8192 / sizeof(compute_t) / kColumns;

  alignas(16) compute_t d_logits[kStaged];  // before the barrier [kRows, classes], logits at first
  alignas(16) compute_t features[kTileRows * kColumns];
  double warp_sums[kSmallWarps];

  // How many rows of d_logits and features are held at a time.
  __device__ static int tile_rows(int classes) {
    const int rows = kStaged / classes;
    return rows < kTileRows ? rows : kTileRows;
  }
};

}  // namespace fst_fast
