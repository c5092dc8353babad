#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FST_FAST_BOTH __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FST_FAST_BOTH __attribute__((always_inline)) inline
#else
#define FST_FAST_BOTH inline
#endif

// inject as fst_fast/ops/reference/inject.py defines it: what the CPU and CUDA kernels share.
namespace fst_fast::inject {

// Columns of params, and of the triggers' table.
enum Param { kSource, kRow, kColumn, kFlip, kTrigger, kLabel, kTiles, kKey, kParams };
enum Field { kFlags, kPattern, kMap, kGathered, kCoords, kSeed, kFields = 8 };
// Bits of a trigger's flags, in the order in which its stages run.
enum Flag : int32_t {
  kLookup = 1,
  kGather = 2,
  kBilinear = 4,
  kRound = 8,
  kNoise = 16,
  kYCrCb = 32,
  kMapped = 64
};
constexpr int kTileRows = 4;
constexpr int kLevels = 256;  // values of a byte

struct Tables {
  const int32_t* table;     // [triggers, 8]
  const float* noise;       // [triggers, 4]
  const int16_t* patterns;  // [P, H, W, C]
  const uint8_t* maps;      // [L, 256]
  const int32_t* sources;   // [G, H, W]
  const float* coords;      // [Q, H, W, 2]
  const uint8_t* lookup;    // [N, H, W, C]
  int64_t triggers, pattern_count, map_count, source_count, coords_count, lookup_count;
};

// Whether the tile of pixel (h, w) is left out.
FST_FAST_BOTH bool left_out(int32_t tiles, int h, int w, int height, int width) {
  return (tiles >> (kTileRows * (kTileRows * h / height) + kTileRows * w / width)) & 1;
}

// In [0, 1), a multiple of 2^-24.
FST_FAST_BOTH float uniform(uint32_t seed, uint32_t key, uint32_t element) {
  uint32_t mixed = seed + key * 0x9E3779B9u + element * 0x85EBCA6Bu;
  mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352Du;
  mixed = (mixed ^ (mixed >> 15)) * 0x846CA68Bu;
  return static_cast<float>((mixed ^ (mixed >> 16)) >> 8) * 0x1p-24f;
}

FST_FAST_BOTH uint8_t to_byte(int value) {
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// BT.601, full range, in OpenCV's 14-bit fixed point.
FST_FAST_BOTH void to_ycrcb(const uint8_t* rgb, uint8_t* ycrcb) {
  const int red = rgb[0], blue = rgb[2];
  const int luma = (4899 * red + 9617 * rgb[1] + 1868 * blue + 8192) >> 14;
  ycrcb[0] = to_byte(luma);
  ycrcb[1] = to_byte((((red - luma) * 11682 + 8192) >> 14) + 128);
  ycrcb[2] = to_byte((((blue - luma) * 9241 + 8192) >> 14) + 128);
}

FST_FAST_BOTH void from_ycrcb(const uint8_t* ycrcb, uint8_t* rgb) {
  const int luma = ycrcb[0], cr = ycrcb[1] - 128, cb = ycrcb[2] - 128;
  rgb[0] = to_byte(luma + ((cr * 22987 + 8192) >> 14));
  rgb[1] = to_byte(luma + ((cr * -11698 + cb * -5636 + 8192) >> 14));
  rgb[2] = to_byte(luma + ((cb * 29049 + 8192) >> 14));
}

}  // namespace fst_fast::inject
