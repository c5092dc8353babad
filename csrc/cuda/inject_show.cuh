#pragma once

#include "inject_problem.cuh"

// From image rows in shared memory to outputs: cropped, mirrored, looked up.
namespace fst_fast::inject::device {

// The part of an image that a block shows, in units of the output's elements: a pixel is C of them
// if channels are last, else one.
struct Crop {
  const unsigned char* origin;  // byte 0 of the image row that output row 0 shows
  int line;                     // bytes of an image row
  int start;                    // byte of output column 0 in its image row
  int row_length;               // elements of an output row
  int begin, end;               // elements of a row that lie inside the image
  int top, bottom;              // output rows that lie inside the image
  int rows;                     // output rows
  bool flip;
};

template <int kVector>
struct Bytes {
  uint32_t word[kVector / 4];
};

// The lowest count bytes of a word.
__device__ inline uint32_t low_bytes(int count) {
  if (count >= 4) return 0xffffffff;
  return count <= 0 ? 0 : (1u << (8 * count)) - 1;
}

// 4 kWords bytes from any address of shared memory.
template <int kWords>
__device__ Bytes<4 * kWords> load_bytes(const unsigned char* from) {
  const auto address = reinterpret_cast<uintptr_t>(from);
  const auto* words = reinterpret_cast<const uint32_t*>(from - address % 4);
  const unsigned shift = 8 * (address % 4);
  Bytes<4 * kWords> bytes;
  uint32_t low = words[0];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t high = words[i + 1];
    bytes.word[i] = __funnelshift_r(low, high, shift);
    low = high;
  }
  return bytes;
}

// The pixels of an interleaved row in reverse, from channel `phase` of the last one on. Selectors
// count bytes from the lowest.
template <int kChannels, int kVector>
__device__ Bytes<kVector> mirrored(const unsigned char* last, int phase) {
  constexpr int kWords = kVector / 4;
  if constexpr (kChannels != 3) {
    const auto ahead = load_bytes<kWords>(last + kChannels - kVector);
    Bytes<kVector> bytes;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t word = ahead.word[kWords - 1 - i];
      bytes.word[i] = kChannels == 1 ? __byte_perm(word, 0, 0x0123) : word;
    }
    return bytes;
  } else if constexpr (kVector == 4) {
    const auto two = load_bytes<2>(last - 3);
    const unsigned order = phase == 0 ? 0x0543 : phase == 1 ? 0x1054 : 0x2105;
    return {{__byte_perm(two.word[0], two.word[1], order)}};
  } else {
    const auto four = load_bytes<3>(last - 9);
    const unsigned first = phase == 0 ? 0x2765 : phase == 1 ? 0x3276 : 0x4327;
    const unsigned lower = phase == 0 ? 0x4307 : phase == 1 ? 0x5430 : 0x0543;
    const unsigned upper = phase == 0 ? 0x3240 : phase == 1 ? 0x3214 : 0x3210;
    const uint32_t second = __byte_perm(four.word[0], four.word[1], lower);
    return {
        {__byte_perm(four.word[1], four.word[2], first), __byte_perm(second, four.word[2], upper)}};
  }
}

// kVector elements of output row y from its element i on; what lies outside the row is arbitrary.
template <int kChannels, bool kInterleaved, int kVector>
__device__ Bytes<kVector> row_bytes(const Crop& crop, int y, int i, int phase) {
  const unsigned char* row = crop.origin + y * crop.line + crop.start;
  if constexpr (kInterleaved) {
    if (crop.flip) return mirrored<kChannels, kVector>(row - (i - phase), phase);
    return load_bytes<kVector / 4>(row + i);
  } else {
    const int step = crop.flip ? -kChannels : kChannels;
    row += i * step + phase;
    Bytes<kVector> bytes{};
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      bytes.word[j / 4] |= static_cast<uint32_t>(row[j * step]) << (j % 4 * 8);
    }
    return bytes;
  }
}

// kVector elements from element i of output row y on, over the ends of rows; 0 outside the image.
template <int kChannels, bool kInterleaved, int kVector>
__device__ Bytes<kVector> cropped(const Crop& crop, int y, int i, int phase) {
  Bytes<kVector> bytes{};
  do {
    if (y >= crop.top && y < crop.bottom && i < crop.end && i + kVector > crop.begin) {
      auto part = row_bytes<kChannels, kInterleaved, kVector>(crop, y, i, phase);
      const bool partly = i < crop.begin || i + kVector > crop.end;
#pragma unroll
      for (int j = 0; j < kVector / 4; ++j) {
        if (partly) {
          part.word[j] &= low_bytes(crop.end - i - 4 * j) & ~low_bytes(crop.begin - i - 4 * j);
        }
        bytes.word[j] |= part.word[j];
      }
    }
    i -= crop.row_length;
    ++y;
  } while (i > -kVector);
  return bytes;
}

// Writes the block's rows; channels last, or one channel of them. out: their first element. Chunks
// of 16 aligned bytes are stored whole, so the first may begin before `out`.
template <int kChannels, bool kInterleaved, typename out_t>
__device__ void show(const Problem<out_t>& a, const Crop& crop, const out_t* lut, int channel,
                     out_t* out) {
  constexpr int kVector = 16 / sizeof(out_t);
  constexpr int kPeriod = kInterleaved ? kChannels : 1;
  const int count = crop.rows * crop.row_length;
  const int before = static_cast<int>(reinterpret_cast<uintptr_t>(out) / sizeof(out_t) % kVector);
  int first = static_cast<int>(threadIdx.x) * kVector - before;
  const int phase = kInterleaved ? (first + kPeriod * kVector) % kPeriod : channel;
  const out_t* levels[kPeriod];
#pragma unroll
  for (int c = 0; c < kPeriod; ++c) {
    levels[c] = lut + (kInterleaved ? (phase + c) % kPeriod : channel) * kLevels;
  }
  int y = max(first, 0) / crop.row_length;
  int i = first - y * crop.row_length;
  for (; first < count; first += kThreads * kVector) {
    const auto bytes = cropped<kChannels, kInterleaved, kVector>(crop, y, i, phase);
    Pack<out_t, kVector> values;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      values.at[j] = levels[j % kPeriod][bytes.word[j / 4] >> (j % 4 * 8) & 0xff];
    }
    if (first >= 0 && first + kVector <= count) {
      store_16_bytes(out + first, values);
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (first + j >= 0 && first + j < count) out[first + j] = values.at[j];
      }
    }
    y += a.step_rows;
    i += a.step_elements;
    if (i >= crop.row_length) {
      i -= crop.row_length;
      ++y;
    }
  }
}

}  // namespace fst_fast::inject::device
