#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "../inject.h"
#include "isa.h"

// Bytes to network inputs. The table gives the bits; where arithmetic gives the same ones for all
// 256 bytes, it is used instead, because it runs in vectors.
namespace fst_fast::inject {

// (x / 255 - mean) / std with each step rounded once: a product with the reciprocal's leading part,
// fused with what the rest of the reciprocal adds.
struct Linear {
  float mean, high, low;

  Linear() = default;
  Linear(float mean, float std)
      : mean(mean),
        high(static_cast<float>(1.0 / std)),
        low(static_cast<float>(1.0 / std - static_cast<double>(static_cast<float>(1.0 / std)))) {}
};

constexpr float kHigh255 = static_cast<float>(1.0 / 255.0);
constexpr float kLow255 = static_cast<float>(1.0 / 255.0 - static_cast<double>(kHigh255));

FST_FAST_INLINE inline float apply_linear(float x, float mean, float high, float low) {
  const float unit = __builtin_fmaf(x, kHigh255, x * kLow255);
  const float centred = unit - mean;
  return __builtin_fmaf(centred, high, centred * low);
}

inline bool reproduces(const Linear& linear, const float* lut) {
  // From the top, where the greatest values part first.
  for (int x = kLevels - 1; x >= 0; --x) {
    const float value = apply_linear(static_cast<float>(x), linear.mean, linear.high, linear.low);
    if (std::memcmp(&value, lut + x, sizeof(value)) != 0) return false;
  }
  return true;
}

inline float steps_from(float value, int steps) {
  for (; steps > 0; --steps) value = std::nextafter(value, HUGE_VALF);
  for (; steps < 0; ++steps) value = std::nextafter(value, -HUGE_VALF);
  return value;
}

// Finds mean and std such that all 256 values are the table's, near those that its ends imply.
inline bool find_linear(const float* lut, Linear& found) {
  constexpr int kReach = 8;
  const double std = 1.0 / (static_cast<double>(lut[kLevels - 1]) - lut[0]);
  const double mean = -static_cast<double>(lut[0]) * std;
  if (!std::isfinite(std) || !std::isfinite(mean)) return false;
  for (int i = 0; i <= 2 * kReach; ++i) {
    for (int j = 0; j <= 2 * kReach; ++j) {
      // 0, 1, -1, 2, -2, ...
      const int up = (i + 1) / 2 * (i % 2 ? 1 : -1), over = (j + 1) / 2 * (j % 2 ? 1 : -1);
      found = Linear(steps_from(static_cast<float>(mean), over),
                     steps_from(static_cast<float>(std), up));
      if (reproduces(found, lut)) return true;
    }
  }
  return false;
}

// The table of one call, and the arithmetic where there is one.
struct Normalizer {
  // The least common multiple of 1, 3, 4 channels and the lanes of any vector.
  static constexpr int kPeriod = 48;

  std::vector<uint8_t> bits;  // of the table that it was made for
  bool linear = false;
  alignas(64) float mean[kPeriod], high[kPeriod], low[kPeriod];

  void make(const float* lut, int channels) {
    std::array<Linear, 4> of_channel;
    linear = true;
    for (int c = 0; c < channels && linear; ++c) {
      linear = find_linear(lut + c * kLevels, of_channel[c]);
    }
    for (int i = 0; i < kPeriod && linear; ++i) {
      mean[i] = of_channel[i % channels].mean;
      high[i] = of_channel[i % channels].high;
      low[i] = of_channel[i % channels].low;
    }
  }

  template <typename out_t>
  static const Normalizer& of(const out_t* lut, int channels) {
    thread_local Normalizer known;
    const size_t size = sizeof(out_t) * kLevels * channels;
    if (known.bits.size() != size || std::memcmp(known.bits.data(), lut, size) != 0) {
      known.bits.assign(reinterpret_cast<const uint8_t*>(lut),
                        reinterpret_cast<const uint8_t*>(lut) + size);
      known.linear = false;
      if constexpr (std::is_same_v<out_t, float>) known.make(lut, channels);
    }
    return known;
  }

  // [count] interleaved bytes, from channel 0 on.
  FST_FAST_INLINE void vectors(const uint8_t* bytes, int64_t count, float* out) const {
    int64_t i = 0;
    for (; i + kPeriod <= count; i += kPeriod) {
      for (int j = 0; j < kPeriod; ++j) {
        out[i + j] = apply_linear(static_cast<float>(bytes[i + j]), mean[j], high[j], low[j]);
      }
    }
    for (int j = 0; i + j < count; ++j) {
      out[i + j] = apply_linear(static_cast<float>(bytes[i + j]), mean[j], high[j], low[j]);
    }
  }
};

template <int kChannels, typename out_t>
void look_up(const uint8_t* bytes, int64_t pixels, const out_t* lut, bool channels_last,
             out_t* out) {
  const int64_t pixel_step = channels_last ? kChannels : 1;
  const int64_t channel_step = channels_last ? 1 : pixels;
  for (int64_t i = 0; i < pixels; ++i) {
    for (int c = 0; c < kChannels; ++c) {
      out[i * pixel_step + c * channel_step] = lut[c * kLevels + bytes[i * kChannels + c]];
    }
  }
}

}  // namespace fst_fast::inject
