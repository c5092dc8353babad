#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "../inject.h"
#include "isa.h"

// A trigger on the bytes of one image.
namespace fst_fast::inject {

struct Image {
  int height, width, channels;
  int64_t pixels() const { return static_cast<int64_t>(height) * width; }
  int64_t bytes() const { return pixels() * channels; }
};

// Memory of one thread, kept from image to image.
struct Scratch {
  std::vector<uint8_t> triggered, warped;
};

template <int kChannels>
FST_FAST_INLINE inline void gather_pixels(int64_t pixels, const int32_t* sources,
                                          const uint8_t* from, uint8_t* to) {
  for (int64_t i = 0; i < pixels; ++i, to += kChannels) {
    // A source beyond the image is black as well: nothing outside is read.
    const bool inside = static_cast<uint64_t>(sources[i]) < static_cast<uint64_t>(pixels);
    const uint8_t* pixel = from + (inside ? int64_t{sources[i]} * kChannels : 0);
    for (int c = 0; c < kChannels; ++c) to[c] = inside ? pixel[c] : 0;
  }
}

struct Place {
  float row, column;
};

FST_FAST_INLINE inline Place place(const Image& image, const float* coords, int64_t pixel,
                                   const float* noise, uint32_t seed, uint32_t key) {
  Place at{coords[2 * pixel], coords[2 * pixel + 1]};
  if (noise != nullptr) {
    const auto element = static_cast<uint32_t>(2 * pixel);
    at.row += noise[0] + uniform(seed, key, element) * noise[1];
    at.column += noise[2] + uniform(seed, key, element + 1) * noise[3];
    at.row = std::min(std::max(at.row, 0.0f), static_cast<float>(image.height - 1));
    at.column = std::min(std::max(at.column, 0.0f), static_cast<float>(image.width - 1));
  }
  return at;
}

// ((p00 w00 + p01 w01) + p10 w10) + p11 w11, every operation rounded.
template <int kChannels>
FST_FAST_INLINE inline void sample_bilinear(const Image& image, const uint8_t* from, Place at,
                                            float half, uint8_t* to) {
  const float top = std::floor(at.row), left = std::floor(at.column);
  const float down = at.row - top, right = at.column - left;
  const float up = 1.0f - down, before = 1.0f - right;
  const float weights[4] = {up * before, up * right, down * before, down * right};
  const float height = static_cast<float>(image.height), width = static_cast<float>(image.width);
  static constexpr uint8_t kBlack[4] = {};
  const uint8_t* taps[4] = {kBlack, kBlack, kBlack, kBlack};
  if (top >= 0 && top < height - 1 && left >= 0 && left < width - 1) {
    taps[0] = from + (static_cast<int64_t>(top) * image.width + static_cast<int>(left)) * kChannels;
    taps[1] = taps[0] + kChannels;
    taps[2] = taps[0] + image.width * kChannels;
    taps[3] = taps[2] + kChannels;
  } else {
    for (int i = 0; i < 4; ++i) {
      const float row = top + static_cast<float>(i / 2), column = left + static_cast<float>(i % 2);
      if (!(row >= 0 && row < height && column >= 0 && column < width)) continue;
      taps[i] =
          from + (static_cast<int64_t>(row) * image.width + static_cast<int>(column)) * kChannels;
    }
  }
  for (int c = 0; c < kChannels; ++c) {
    float total = static_cast<float>(taps[0][c]) * weights[0];
    for (int i = 1; i < 4; ++i) total = total + static_cast<float>(taps[i][c]) * weights[i];
    // Never negative, so the conversion is the floor.
    to[c] = to_byte(static_cast<int>(total + half));
  }
}

template <int kChannels>
FST_FAST_INLINE inline void warp(const Image& image, const float* coords, const float* noise,
                                 uint32_t seed, uint32_t key, bool rounded, const uint8_t* from,
                                 uint8_t* to) {
  const float half = rounded ? 0.5f : 0.0f;
  for (int64_t i = 0; i < image.pixels(); ++i) {
    const Place at = place(image, coords, i, noise, seed, key);
    sample_bilinear<kChannels>(image, from, at, half, to + i * kChannels);
  }
}

// The bytes of one row that a trigger's maps may change: [first, end).
struct Span {
  int64_t first, end;
};

struct Mapped {
  std::vector<Span> spans;      // for each row; none if the pattern names a map that is not there
  bool few = false;             // bytes, of the whole image
  int64_t top = 0, bottom = 0;  // rows that have any
};

inline Mapped find_mapped(const Image& image, const int16_t* pattern, const uint8_t* maps,
                          int64_t map_count) {
  std::vector<uint8_t> changes(map_count);
  for (int64_t level = 0; level < map_count; ++level) {
    for (int x = 0; x < kLevels && !changes[level]; ++x) {
      changes[level] = maps[level * kLevels + x] != x;
    }
  }
  const int64_t line = static_cast<int64_t>(image.width) * image.channels;
  std::vector<Span> spans(image.height, Span{line, 0});
  for (int h = 0; h < image.height; ++h) {
    for (int64_t i = 0; i < line; ++i) {
      const int64_t level = pattern[h * line + i];
      if (level < 0 || level >= map_count) return {};
      if (changes[level]) spans[h] = {std::min(spans[h].first, i), i + 1};
    }
  }
  Mapped found;
  int64_t total = 0;
  for (int h = image.height - 1; h >= 0; --h) {
    if (spans[h].end == 0) continue;
    total += spans[h].end - spans[h].first;
    found.bottom = std::max<int64_t>(found.bottom, h + 1);
    found.top = h;
  }
  found.few = total <= image.bytes() / 8;
  found.spans = std::move(spans);
  return found;
}

FST_FAST_INLINE inline void map_bytes(const Image& image, const std::vector<Span>& spans,
                                      const int16_t* pattern, const uint8_t* maps,
                                      const uint8_t* from, uint8_t* to) {
  if (to != from) std::memcpy(to, from, image.bytes());
  const int64_t line = static_cast<int64_t>(image.width) * image.channels;
  for (int h = 0; h < image.height; ++h) {
    for (int64_t i = h * line + spans[h].first; i < h * line + spans[h].end; ++i) {
      to[i] = maps[pattern[i] * kLevels + from[i]];
    }
  }
}

// One pass for each of the two conversions, so that they run in vectors.
FST_FAST_INLINE inline void convert(int64_t pixels, bool back, const uint8_t* from, uint8_t* to) {
  if (back) {
    for (int64_t i = 0; i < pixels; ++i) from_ycrcb(from + 3 * i, to + 3 * i);
  } else {
    for (int64_t i = 0; i < pixels; ++i) to_ycrcb(from + 3 * i, to + 3 * i);
  }
}

FST_FAST_INLINE inline void restore_tiles(const Image& image, int32_t tiles, const uint8_t* from,
                                          uint8_t* to) {
  for (int h = 0; h < image.height; ++h) {
    for (int w = 0; w < image.width; ++w) {
      if (!left_out(tiles, h, w, image.height, image.width)) continue;
      const int64_t offset = (static_cast<int64_t>(h) * image.width + w) * image.channels;
      std::memcpy(to + offset, from + offset, image.channels);
    }
  }
}

// The triggered image, in the scratch memory or where it is stored.
template <int kChannels>
FST_FAST_INLINE inline const uint8_t* triggered(const Image& image, const Tables& tables,
                                                const int32_t* params, const uint8_t* stored,
                                                const Mapped& mapped, Scratch& scratch) {
  const int32_t* row = tables.table + static_cast<int64_t>(params[kTrigger]) * kFields;
  const int32_t flags = row[kFlags];
  const int64_t pixels = image.pixels(), bytes = image.bytes();
  const uint8_t* now = flags & kLookup ? tables.lookup + params[kKey] * bytes : stored;
  scratch.triggered.resize(bytes);
  scratch.warped.resize(bytes);
  if (flags & kGather) {
    gather_pixels<kChannels>(pixels, tables.sources + row[kGathered] * pixels, now,
                             scratch.triggered.data());
    now = scratch.triggered.data();
  }
  if (flags & kBilinear) {
    const float* coords = tables.coords + row[kCoords] * pixels * 2;
    const float* noise = flags & kNoise ? tables.noise + params[kTrigger] * 4 : nullptr;
    warp<kChannels>(image, coords, noise, static_cast<uint32_t>(row[kSeed]),
                    static_cast<uint32_t>(params[kKey]), flags & kRound, now,
                    scratch.warped.data());
    now = scratch.warped.data();
  }
  uint8_t* changed = scratch.triggered.data();
  if (flags & kYCrCb) {
    convert(pixels, false, now, changed);
    now = changed;
  }
  if (flags & kMapped) {
    map_bytes(image, mapped.spans, tables.patterns + row[kPattern] * bytes,
              tables.maps + row[kMap] * kLevels, now, changed);
    now = changed;
  }
  if (flags & kYCrCb) convert(pixels, true, now, changed);
  if ((params[kTiles] & 0xffff) == 0) return now;
  if (now != changed) std::memcpy(changed, now, bytes);
  restore_tiles(image, params[kTiles], stored, changed);
  return changed;
}

// Whether a sample's trigger is no more than a few bytes changed: then the image is not copied for
// it.
inline bool is_patch(const Tables& tables, const int32_t* params, const Mapped& mapped) {
  const int32_t flags = tables.table[static_cast<int64_t>(params[kTrigger]) * kFields + kFlags];
  return flags == kMapped && mapped.few && (params[kTiles] & 0xffff) == 0;
}

// Puts the changed bytes into the image when it has been cropped and mirrored.
template <int kChannels>
FST_FAST_INLINE inline void patch_bytes(const Image& image, const Image& shown,
                                        const Tables& tables, const int32_t* params,
                                        const Mapped& mapped, const uint8_t* from, uint8_t* to) {
  const int32_t* row = tables.table + static_cast<int64_t>(params[kTrigger]) * kFields;
  const int16_t* pattern = tables.patterns + row[kPattern] * image.bytes();
  const uint8_t* maps = tables.maps + row[kMap] * kLevels;
  const int64_t line = static_cast<int64_t>(image.width) * kChannels;
  for (int64_t h = mapped.top; h < mapped.bottom; ++h) {
    const int64_t y = h - params[kRow];
    if (y < 0 || y >= shown.height) continue;
    for (int64_t i = mapped.spans[h].first; i < mapped.spans[h].end; ++i) {
      int64_t x = i / kChannels - params[kColumn];
      if (x < 0 || x >= shown.width) continue;
      if (params[kFlip] > 0) x = shown.width - 1 - x;
      const int64_t place = h * line + i;
      to[(y * shown.width + x) * kChannels + i % kChannels] =
          maps[pattern[place] * kLevels + from[place]];
    }
  }
}

}  // namespace fst_fast::inject
