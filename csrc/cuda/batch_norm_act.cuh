#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "../batch_norm_act.h"
#include "device.cuh"

// What the forward and the backward of batch_norm_act share. Both are one launch in three phases:
// every block adds up its part of the rows, a warp adds up the parts of each channel, and every
// block goes over its rows again. Between the phases all blocks wait for each other.
namespace fst_fast {

constexpr int kNormThreads = 256;
constexpr int kNormBlocks = 2;  // of a multiprocessor: for more, the compiler spills registers
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kNormBackwardBlocks = 1;  // there the backward spills for two
#else
constexpr int kNormBackwardBlocks = kNormBlocks;
#endif
constexpr int kNormColumns =
    8;                          // packs beside each other that the threads of a block read, at most
constexpr int kNormSome = 8;    // values whose mean is near enough that of all
constexpr int kNormUnroll = 4;  // rows that a thread has loaded before it uses the first

// Multiply and add are rounded one by one, so that the backward finds the bits of the forward.
__device__ inline float norm_multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double norm_multiply(double a, double b) { return __dmul_rn(a, b); }

// The division of [rows, packs of channels] among blocks and threads. Of a contiguous tensor a
// channel is a column, and its packs of pixels, image by image, are the rows.
struct NormGrid {
  int64_t rows;     // that a thread may walk: packs of pixels in a contiguous tensor
  int64_t columns;  // packs of channels; channels in a contiguous tensor
  int64_t stride;   // elements from a row to the next one; from an image's channel to that of the
                    // next one in a contiguous tensor
  int64_t packs;    // of an image's channel in a contiguous tensor
  int64_t pixels;   // of an image
  int width;        // columns of a block, a power of two
  int slices;       // blocks that share a column
  int64_t items;    // slices * columns / width, rounded up
};

template <int kVector, bool kPlanar>
NormGrid norm_grid(const BatchNormLayout& layout, int64_t resident) {
  NormGrid grid{};
  grid.columns = kPlanar ? layout.channels : layout.channels / kVector;
  grid.packs = layout.pixels / kVector;
  grid.pixels = layout.pixels;
  grid.rows = kPlanar ? layout.images * grid.packs : layout.rows();
  grid.stride = kPlanar ? layout.channels * layout.pixels : layout.channels;
  grid.width = 1;
  while (!kPlanar && grid.width < kNormColumns && grid.width < grid.columns) grid.width *= 2;
  const int64_t tiles = (grid.columns + grid.width - 1) / grid.width;
  const int64_t at_once = kNormThreads / grid.width * kNormUnroll;
  const int64_t useful = (grid.rows + at_once - 1) / at_once;
  grid.slices = static_cast<int>(std::clamp<int64_t>(resident / tiles, 1, useful));
  grid.items = tiles * grid.slices;
  return grid;
}

// The place of a thread within an item of the grid.
template <int kVector, bool kPlanar>
struct NormPlace {
  __device__ NormPlace(const NormGrid& grid, int64_t item) : grid(grid) {
    const int height = kNormThreads / grid.width;
    column = item / grid.slices * grid.width + threadIdx.x % grid.width;
    slice = static_cast<int>(item % grid.slices);
    first = static_cast<int64_t>(slice) * height + threadIdx.x / grid.width;
    step = static_cast<int64_t>(grid.slices) * height;
  }

  __device__ bool is_used() const { return column < grid.columns; }
  __device__ int64_t rows() const {
    return first < grid.rows ? (grid.rows - first + step - 1) / step : 0;
  }
  __device__ int64_t channel(int i) const { return kPlanar ? column : column * kVector + i; }
  __device__ int64_t offset(int64_t row) const {
    if (!kPlanar) return row * grid.stride + column * kVector;
    return row / grid.packs * grid.stride + (column * grid.packs + row % grid.packs) * kVector;
  }

  const NormGrid& grid;
  int64_t column, first, step;
  int slice;
};

// Two numbers of a part of a channel: mean and squares around it, or two sums.
template <typename compute_t>
struct alignas(2 * sizeof(compute_t)) NormPair {
  compute_t a, b;

  __device__ NormPair operator+(const NormPair& other) const { return {a + other.a, b + other.b}; }
};

// A part's mean and the sum of squares around it.
template <typename compute_t>
struct NormSample {
  compute_t mean, squares, count;

  // Of two parts together (Chan, Golub and LeVeque, 1983).
  __device__ NormSample operator+(const NormSample& other) const {
    if (other.count == 0) return *this;
    if (count == 0) return other;
    const compute_t total = count + other.count, share = other.count / total;
    const compute_t apart = other.mean - mean;
    return {mean + apart * share, squares + other.squares + apart * apart * share * count, total};
  }
};

// Adds up what the threads of each column have, in a fixed order; the first thread of a column has
// the result. Every thread calls it.
template <typename value_t>
__device__ value_t norm_column_sum(const NormGrid& grid, value_t value) {
  auto* shared = reinterpret_cast<value_t*>(dynamic_shared());
  const int row = static_cast<int>(threadIdx.x) / grid.width;
  // A thread may still be reading what an earlier call left there.
  __syncthreads();
  shared[threadIdx.x] = value;
  for (int half = kNormThreads / grid.width / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half) {
      value = value + shared[threadIdx.x + half * grid.width];
      shared[threadIdx.x] = value;
    }
  }
  return value;
}

// Calls body(offset of a pack, what load(offset) gave) for the rows of a place, with several loads
// ahead of their use.
template <int kVector, bool kPlanar, typename Load, typename Body>
__device__ void for_each_row(const NormPlace<kVector, kPlanar>& place, const Load& load,
                             const Body& body) {
  // Offsets within planes take registers, and so does float64, of which two are a pack.
  constexpr int kUnroll = kPlanar || kVector == 2 ? kNormUnroll / 2 : kNormUnroll;
  using Loaded = decltype(load(int64_t{}));
  int64_t row = place.first;
  for (; row + (kUnroll - 1) * place.step < place.grid.rows; row += kUnroll * place.step) {
    Loaded loaded[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) loaded[i] = load(place.offset(row + i * place.step));
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) body(place.offset(row + i * place.step), loaded[i]);
  }
  for (; row < place.grid.rows; row += place.step) {
    const int64_t offset = place.offset(row);
    body(offset, load(offset));
  }
}

// Stores 16 bytes at once where a pack has as many.
template <typename scalar_t, int kVector>
__device__ void norm_store(scalar_t* pointer, const Pack<scalar_t, kVector>& pack) {
  if constexpr (sizeof(pack) == 16) {
    store_16_bytes(pointer, pack);
  } else {
    store_pack(pointer, pack);
  }
}

// Mean, scale and bias of the channels of a thread: y = (x - mean) * scale + bias.
template <typename compute_t>
struct NormChannels {
  const compute_t* mean;    // [C]
  const compute_t* var;     // [C]
  const compute_t* weight;  // [C] or null
  const compute_t* bias;    // [C] or null
  compute_t eps;

  __device__ compute_t rstd(int64_t c) const { return 1 / sqrt(var[c] + eps); }
  __device__ compute_t scale(int64_t c) const {
    return weight == nullptr ? rstd(c) : norm_multiply(weight[c], rstd(c));
  }
  __device__ compute_t shift(int64_t c) const { return bias == nullptr ? compute_t(0) : bias[c]; }
};

template <typename compute_t>
struct NormLine {
  compute_t mean, scale, shift;
  __device__ void take(const NormChannels<compute_t>& channels, int64_t c) {
    mean = channels.mean[c];
    scale = channels.scale(c);
    shift = channels.shift(c);
  }
  __device__ compute_t operator()(compute_t x) const {
    return norm_multiply(x - mean, scale) + shift;
  }
};

template <typename scalar_t>
inline bool norm_is_aligned(std::initializer_list<const scalar_t*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const scalar_t* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  });
}

// Calls body(integral_constant elements of a pack, bool_constant planar).
template <typename scalar_t, typename Body>
void with_norm_layout(const BatchNormLayout& layout, bool aligned, const Body& body) {
  constexpr int kVector = 16 / sizeof(scalar_t);
  const int64_t neighbours = layout.channels_last ? layout.channels : layout.pixels;
  const bool packs = aligned && neighbours % kVector == 0;
  using Wide = std::integral_constant<int, kVector>;
  using Narrow = std::integral_constant<int, 1>;
  if (layout.channels_last) {
    return packs ? body(Wide(), std::false_type()) : body(Narrow(), std::false_type());
  }
  packs ? body(Wide(), std::true_type()) : body(Narrow(), std::true_type());
}

template <typename value_t>
const value_t* norm_pointer(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<value_t>() : nullptr;
}

}  // namespace fst_fast
