#pragma once

#include "inject_trigger.cuh"

// Image rows and the table of input values, from global to shared memory.
namespace fst_fast::inject::device {

// 16 aligned bytes of global memory, from byte `at` of `from` on; those outside [least, end) are 0
// and not read.
__device__ inline Pack<uint8_t, 16> load_word(const uint8_t* from, int at, int least, int end) {
  if (at >= least && at + 16 <= end) return load_pack<16>(from + at);
  Pack<uint8_t, 16> word{};
  for (int i = 0; i < 16; ++i) {
    if (at + i >= least && at + i < end) word.at[i] = from[at + i];
  }
  return word;
}

// Copies count bytes in whole words, aligned as they are, so up to 15 bytes before and behind come
// along. Returns where the first one is. before, behind: bytes of the tensor around `from`, of
// which no others are read.
__device__ inline unsigned char* stage(const uint8_t* from, int count, int64_t before,
                                       int64_t behind, unsigned char* to) {
  constexpr int kAtOnce = 4;
  const int skip = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16);
  const int words = count == 0 ? 0 : (skip + count + 15) / 16;
  const int least = before < skip ? skip - static_cast<int>(before) : 0;
  const int end = behind < words * 16 - skip ? skip + static_cast<int>(behind) : words * 16;
  for (int i = threadIdx.x; i < words; i += kAtOnce * kThreads) {
    Pack<uint8_t, 16> word[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = i + j * kThreads;
      if (at < words) word[j] = load_word(from - skip, at * 16, least, end);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = i + j * kThreads;
      if (at < words) store_pack(to + at * 16, word[j]);
    }
  }
  return to + skip;
}

template <int kChannels, typename out_t>
__device__ void stage_lut(const out_t* lut, out_t* to) {
  constexpr int kVector = 16 / sizeof(out_t);
  for (int i = threadIdx.x * kVector; i < kChannels * kLevels; i += kThreads * kVector) {
    store_pack(to + i, load_pack<kVector>(lut + i));
  }
}

// Rows [top, bottom) of a sample's image, triggered, in shared memory from the returned pointer on,
// once the block has met at a barrier. to: 16-byte aligned, with room for 15 bytes more.
template <int kChannels, typename out_t>
__device__ unsigned char* stage_rows(const Problem<out_t>& a, const Sample& sample,
                                     const Trigger& trigger, int top, int bottom,
                                     unsigned char* to) {
  const int line = a.width * kChannels;
  const int64_t bytes = static_cast<int64_t>(a.height) * line;
  const bool looks = trigger.flags & kLookup;
  const uint8_t* stored = a.images + sample.source * bytes;
  const uint8_t* image = looks ? a.tables.lookup + sample.key * bytes : stored;
  const int count = max(bottom - top, 0) * line;
  if (trigger.flags == 0 || in_place(trigger, sample)) {
    const int64_t images = looks ? a.tables.lookup_count : a.image_count;
    const int64_t before = (looks ? sample.key : sample.source) * bytes + top * line;
    to = stage(image + top * line, count, before, images * bytes - before, to);
    if ((trigger.flags & ~kLookup) == 0) return to;
    __syncthreads();
  }
  trigger_rows<kChannels>(a, sample, trigger, stored, image, top, bottom, to);
  return to;
}

}  // namespace fst_fast::inject::device
