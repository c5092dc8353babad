#pragma once

#include "inject_problem.cuh"

// The trigger of a sample, on the rows of its image that a block needs, in shared memory.
namespace fst_fast::inject::device {

template <int kChannels>
struct Pixel {
  uint8_t at[kChannels];
};

template <int kChannels>
__device__ Pixel<kChannels> read_pixel(const uint8_t* image, int pixel) {
  Pixel<kChannels> value;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) value.at[c] = __ldg(image + pixel * kChannels + c);
  return value;
}

// A stored pixel, or the one that the gather puts in its place.
template <int kChannels>
__device__ Pixel<kChannels> gathered(const Trigger& trigger, const uint8_t* image, int pixel,
                                     int pixels) {
  if (trigger.flags & kGather) {
    pixel = __ldg(trigger.sources + pixel);
    // Black is -1; so is what lies beyond the image, and nothing is read there.
    if (!inside(pixel, pixels)) return {};
  }
  return read_pixel<kChannels>(image, pixel);
}

struct Place {
  float row, column;
};

// nvcc would fuse a * b + c, and then the bits would differ from the reference's.
__device__ inline float noisy(float at, float least, float span, float share, int side) {
  at = __fadd_rn(at, __fadd_rn(least, __fmul_rn(share, span)));
  return fminf(fmaxf(at, 0.0f), static_cast<float>(side - 1));
}

template <typename out_t>
__device__ Place place(const Problem<out_t>& a, const Sample& sample, const Trigger& trigger,
                       int pixel) {
  Place at{__ldg(trigger.coords + 2 * pixel), __ldg(trigger.coords + 2 * pixel + 1)};
  if (trigger.flags & kNoise) {
    const float* noise = a.tables.noise + static_cast<int64_t>(sample.trigger) * 4;
    const auto key = static_cast<uint32_t>(sample.key);
    const auto element = static_cast<uint32_t>(2 * pixel);
    at.row = noisy(at.row, __ldg(noise), __ldg(noise + 1), uniform(trigger.seed, key, element),
                   a.height);
    at.column = noisy(at.column, __ldg(noise + 2), __ldg(noise + 3),
                      uniform(trigger.seed, key, element + 1), a.width);
  }
  return at;
}

// ((p00 w00 + p01 w01) + p10 w10) + p11 w11, every operation rounded.
template <int kChannels>
__device__ Pixel<kChannels> bilinear(const Trigger& trigger, const uint8_t* image, Place at,
                                     int height, int width) {
  const float top = floorf(at.row), left = floorf(at.column);
  const float down = __fsub_rn(at.row, top), right = __fsub_rn(at.column, left);
  const float up = __fsub_rn(1.0f, down), before = __fsub_rn(1.0f, right);
  float total[kChannels] = {};
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    const float row = top + static_cast<float>(tap / 2),
                column = left + static_cast<float>(tap % 2);
    Pixel<kChannels> pixel{};
    // Compared as floats: NaN and what no integer holds are outside.
    if (row >= 0 && row < height && column >= 0 && column < width) {
      const int number = static_cast<int>(row) * width + static_cast<int>(column);
      pixel = gathered<kChannels>(trigger, image, number, height * width);
    }
    const float weight = __fmul_rn(tap / 2 ? down : up, tap % 2 ? right : before);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      total[c] = __fadd_rn(total[c], __fmul_rn(static_cast<float>(pixel.at[c]), weight));
    }
  }
  const float half = trigger.flags & kRound ? 0.5f : 0.0f;
  Pixel<kChannels> value;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    // Never negative, so the conversion is the floor.
    value.at[c] = to_byte(static_cast<int>(__fadd_rn(total[c], half)));
  }
  return value;
}

// The stages that change a pixel by itself.
template <int kChannels>
__device__ Pixel<kChannels> recoloured(const Trigger& trigger, const Tables& tables,
                                       Pixel<kChannels> pixel, int number) {
  if constexpr (kChannels == 3) {
    const Pixel<3> rgb = pixel;
    if (trigger.flags & kYCrCb) to_ycrcb(rgb.at, pixel.at);
  }
  if (trigger.flags & kMapped) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int64_t level = trigger.first_map + __ldg(trigger.pattern + number * kChannels + c);
      // A pattern that names no map gets the nearest: nothing outside is read.
      const int64_t last = tables.map_count - 1;
      const int64_t map = level < 0 ? 0 : level > last ? last : level;
      pixel.at[c] = __ldg(tables.maps + map * kLevels + pixel.at[c]);
    }
  }
  if constexpr (kChannels == 3) {
    const Pixel<3> ycrcb = pixel;
    if (trigger.flags & kYCrCb) from_ycrcb(ycrcb.at, pixel.at);
  }
  return pixel;
}

// Whether a pixel's new value depends on its staged one alone.
__device__ inline bool in_place(const Trigger& trigger, const Sample& sample) {
  if (trigger.flags & (kGather | kBilinear)) return false;
  return !(trigger.flags & kLookup) || (sample.tiles & 0xffff) == 0;
}

// Makes `band` the triggered rows [top, bottom) of an image, each thread its own pixels. If
// in_place, band holds the rows of `image` already. stored: the image itself; image: that, or the
// one looked up.
template <int kChannels, typename out_t>
__device__ void trigger_rows(const Problem<out_t>& a, const Sample& sample, const Trigger& trigger,
                             const uint8_t* stored, const uint8_t* image, int top, int bottom,
                             unsigned char* band) {
  const bool staged = in_place(trigger, sample);
  const bool tiled = (sample.tiles & 0xffff) != 0;
  const int first = top * a.width, end = bottom * a.width;
  for (int number = first + static_cast<int>(threadIdx.x); number < end; number += kThreads) {
    auto* to = reinterpret_cast<Pixel<kChannels>*>(band + (number - first) * kChannels);
    const int h = tiled ? number / a.width : 0;
    if (tiled && left_out(sample.tiles, h, number - h * a.width, a.height, a.width)) {
      if (!staged) *to = read_pixel<kChannels>(stored, number);
      continue;
    }
    Pixel<kChannels> pixel;
    if (staged) {
      pixel = *to;
    } else if (trigger.flags & kBilinear) {
      const Place at = place(a, sample, trigger, number);
      pixel = bilinear<kChannels>(trigger, image, at, a.height, a.width);
    } else {
      pixel = gathered<kChannels>(trigger, image, number, a.height * a.width);
    }
    *to = recoloured<kChannels>(trigger, a.tables, pixel, number);
  }
}

}  // namespace fst_fast::inject::device
