#pragma once

#include "../inject.h"
#include "device.cuh"

// What one launch of inject works on, and what a block reads of it first.
namespace fst_fast::inject::device {

// A multiple of 3, so that a thread's elements begin with the same channel in every round.
constexpr int kThreads = 192;
// Bytes around the staged image rows that may be read, and are then thrown away.
constexpr int kSlack = 32;

// Outputs are moved, never computed with, so out_t is only as wide as they are.
template <typename out_t>
struct Problem {
  const uint8_t* images;  // [image_count, height, width, C]
  const int32_t* params;  // [B, 8], 16-byte aligned
  const out_t* lut;       // [C, 256], 16-byte aligned
  Tables tables;
  out_t* out;
  int64_t* labels;  // [B]
  int64_t image_count;
  int height, width, out_height, out_width;
  int rows;                      // of the output, for one block
  int bands;                     // blocks for one sample
  int step_rows, step_elements;  // from one round of a thread to the next
  out_t nan;
};

struct alignas(16) Sample {
  int32_t source, row, column, flip, trigger, label, tiles, key;
};

__device__ inline Sample read_sample(const int32_t* params, int64_t b) {
  static_assert(sizeof(Sample) == kParams * sizeof(int32_t));
  Sample sample = *reinterpret_cast<const Sample*>(params + b * kParams);
  // Further out no pixel is inside either, and sums stay small.
  constexpr int kLargestSide = 1024;
  sample.row = min(max(sample.row, -kLargestSide), kLargestSide);
  sample.column = min(max(sample.column, -kLargestSide), kLargestSide);
  return sample;
}

// A sample's trigger: what its flags say is used is there.
struct Trigger {
  int32_t flags = 0;
  const int16_t* pattern = nullptr;  // [H, W, C]
  int32_t first_map = 0;
  const int32_t* sources = nullptr;  // [H, W]
  const float* coords = nullptr;     // [H, W, 2]
  uint32_t seed = 0;
};

__device__ inline bool inside(int64_t index, int64_t count) { return index >= 0 && index < count; }

// Whether all that the sample names is there; trigger is filled if it has one.
template <int kChannels, typename out_t>
__device__ bool find_trigger(const Problem<out_t>& a, const Sample& sample, Trigger& trigger) {
  const Tables& t = a.tables;
  if (!inside(sample.source, a.image_count)) return false;
  if (sample.trigger == -1) return true;
  if (!inside(sample.trigger, t.triggers)) return false;
  const int32_t* row = t.table + static_cast<int64_t>(sample.trigger) * kFields;
  const int64_t pixels = static_cast<int64_t>(a.height) * a.width;
  const int32_t flags = __ldg(row + kFlags);
  trigger.flags = flags;
  bool good = true;
  if (flags & kLookup) good &= inside(sample.key, t.lookup_count);
  if (flags & kGather) {
    const int64_t table = __ldg(row + kGathered);
    good &= inside(table, t.source_count);
    trigger.sources = t.sources + table * pixels;
  }
  if (flags & kBilinear) {
    const int64_t table = __ldg(row + kCoords);
    good &= inside(table, t.coords_count);
    trigger.coords = t.coords + table * pixels * 2;
    trigger.seed = static_cast<uint32_t>(__ldg(row + kSeed));
  }
  if (flags & kYCrCb) good &= kChannels == 3;
  if (flags & kMapped) {
    const int64_t pattern = __ldg(row + kPattern);
    trigger.first_map = __ldg(row + kMap);
    good &= inside(pattern, t.pattern_count) && inside(trigger.first_map, t.map_count);
    trigger.pattern = t.patterns + pattern * pixels * kChannels;
  }
  return good;
}

}  // namespace fst_fast::inject::device
