#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
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

inline void gather_pixels(const Image& image, const int32_t* sources, const uint8_t* from,
                          uint8_t* to) {
  const int64_t pixels = image.pixels();
  for (int64_t i = 0; i < pixels; ++i) {
    // A source beyond the image is black as well: nothing outside is read.
    const bool inside = static_cast<uint64_t>(sources[i]) < static_cast<uint64_t>(pixels);
    for (int c = 0; c < image.channels; ++c) {
      to[i * image.channels + c] = inside ? from[sources[i] * image.channels + c] : 0;
    }
  }
}

struct Place {
  float row, column;
};

inline Place place(const Image& image, const float* coords, int64_t pixel, const float* noise,
                   uint32_t seed, uint32_t key) {
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
inline void sample_bilinear(const Image& image, const uint8_t* from, Place at, bool rounded,
                            uint8_t* to) {
  const float top = std::floor(at.row), left = std::floor(at.column);
  const float down = at.row - top, right = at.column - left;
  const float rows[2] = {1.0f - down, down}, columns[2] = {1.0f - right, right};
  float total[4] = {};
  bool first = true;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      const float row = top + static_cast<float>(i), column = left + static_cast<float>(j);
      const bool inside = row >= 0 && row < static_cast<float>(image.height) && column >= 0 &&
                          column < static_cast<float>(image.width);
      const float weight = rows[i] * columns[j];
      const int64_t offset =
          inside ? (static_cast<int64_t>(row) * image.width + static_cast<int64_t>(column)) *
                       image.channels
                 : 0;
      for (int c = 0; c < image.channels; ++c) {
        const float value = inside ? static_cast<float>(from[offset + c]) : 0.0f;
        const float part = value * weight;
        total[c] = first ? part : total[c] + part;
      }
      first = false;
    }
  }
  for (int c = 0; c < image.channels; ++c) {
    const float value = std::floor(rounded ? total[c] + 0.5f : total[c]);
    to[c] = static_cast<uint8_t>(std::min(std::max(value, 0.0f), 255.0f));
  }
}

// Whether every map from `first` on that the pattern names is there.
inline bool pattern_fits(const int16_t* pattern, int64_t count, int64_t maps) {
  int16_t least = 0, most = 0;
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, pattern[i]);
    most = std::max(most, pattern[i]);
  }
  return least >= 0 && most < maps;
}

inline void map_bytes(const Image& image, const int16_t* pattern, const uint8_t* maps, bool ycrcb,
                      const uint8_t* from, uint8_t* to) {
  if (!ycrcb) {
    const int64_t bytes = image.bytes();
    for (int64_t i = 0; i < bytes; ++i) to[i] = maps[pattern[i] * kLevels + from[i]];
    return;
  }
  for (int64_t i = 0; i < image.bytes(); i += 3) {
    uint8_t pixel[3] = {from[i], from[i + 1], from[i + 2]};
    to_ycrcb(pixel);
    for (int c = 0; c < 3; ++c) pixel[c] = maps[pattern[i + c] * kLevels + pixel[c]];
    from_ycrcb(pixel);
    std::memcpy(to + i, pixel, 3);
  }
}

// YCrCb and back changes a byte here and there even without a map.
inline void through_ycrcb(const Image& image, const uint8_t* from, uint8_t* to) {
  for (int64_t i = 0; i < image.bytes(); i += 3) {
    uint8_t pixel[3] = {from[i], from[i + 1], from[i + 2]};
    to_ycrcb(pixel);
    from_ycrcb(pixel);
    std::memcpy(to + i, pixel, 3);
  }
}

inline void restore_tiles(const Image& image, int32_t tiles, const uint8_t* from, uint8_t* to) {
  for (int h = 0; h < image.height; ++h) {
    for (int w = 0; w < image.width; ++w) {
      if (!left_out(tiles, h, w, image.height, image.width)) continue;
      const int64_t offset = (static_cast<int64_t>(h) * image.width + w) * image.channels;
      std::memcpy(to + offset, from + offset, image.channels);
    }
  }
}

// The triggered image, in the scratch memory or where it is stored.
inline const uint8_t* triggered(const Image& image, const Tables& tables, const int32_t* params,
                                const uint8_t* stored, Scratch& scratch) {
  const int32_t* row = tables.table + static_cast<int64_t>(params[kTrigger]) * kFields;
  const int32_t flags = row[kFlags];
  const int64_t pixels = image.pixels(), bytes = image.bytes();
  const uint8_t* now = flags & kLookup ? tables.lookup + params[kKey] * bytes : stored;
  scratch.triggered.resize(bytes);
  scratch.warped.resize(bytes);
  if (flags & kGather) {
    gather_pixels(image, tables.sources + row[kGathered] * pixels, now, scratch.triggered.data());
    now = scratch.triggered.data();
  }
  if (flags & kBilinear) {
    const float* coords = tables.coords + row[kCoords] * pixels * 2;
    const float* noise = flags & kNoise ? tables.noise + params[kTrigger] * 4 : nullptr;
    for (int64_t i = 0; i < pixels; ++i) {
      const Place at = place(image, coords, i, noise, static_cast<uint32_t>(row[kSeed]),
                             static_cast<uint32_t>(params[kKey]));
      sample_bilinear(image, now, at, flags & kRound,
                      scratch.warped.data() + i * image.channels);
    }
    now = scratch.warped.data();
  }
  if (flags & kMapped) {
    map_bytes(image, tables.patterns + row[kPattern] * bytes, tables.maps + row[kMap] * kLevels,
              flags & kYCrCb, now, scratch.triggered.data());
    now = scratch.triggered.data();
  } else if (flags & kYCrCb) {
    through_ycrcb(image, now, scratch.triggered.data());
    now = scratch.triggered.data();
  }
  if ((params[kTiles] & 0xffff) == 0) return now;
  if (now != scratch.triggered.data()) {
    std::memcpy(scratch.triggered.data(), now, bytes);
    now = scratch.triggered.data();
  }
  restore_tiles(image, params[kTiles], stored, scratch.triggered.data());
  return now;
}

}  // namespace fst_fast::inject
