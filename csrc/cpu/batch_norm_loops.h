#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../batch_norm_act.h"
#include "isa.h"

// The loops of batch_norm_act on a CPU. A channel's values are added up within a part in the order
// of memory, in lanes where they are neighbours, and then part by part: neither the instruction set
// nor the number of threads changes a bit.
namespace fst_fast {

// A slab of so many rows and kTile channels stays in a first-level cache between two passes.
constexpr int64_t kPartRows = 128;
constexpr int64_t kTile = 32;
// Rows of a slab whose mean is near enough that of all of them.
constexpr int64_t kCenterRows = 8;
constexpr int64_t kSumLanes = 32;

// The parts that x is divided into: blocks of rows if channels-last, else images.
struct NormParts {
  explicit NormParts(const BatchNormLayout& layout)
      : layout(layout),
        count(layout.channels_last ? (layout.rows() + kPartRows - 1) / kPartRows : layout.images),
        tasks(layout.channels_last ? count : layout.images * layout.channels),
        elements(layout.rows() * layout.channels) {}

  int64_t rows_of(int64_t part) const {
    if (!layout.channels_last) return layout.pixels;
    return std::min(kPartRows, layout.rows() - part * kPartRows);
  }

  BatchNormLayout layout;
  int64_t count, tasks, elements;
};

// What each channel is multiplied by and moved by: y = (x - mean) * scale + bias.
template <typename acc_t>
struct NormLine {
  NormLine(int64_t channels, const acc_t* mean, const acc_t* var, const acc_t* weight,
           const acc_t* bias, double eps)
      : mean(mean, mean + channels), scale(channels), bias(channels), rstd(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      rstd[c] = 1 / std::sqrt(var[c] + static_cast<acc_t>(eps));
      scale[c] = weight == nullptr ? rstd[c] : weight[c] * rstd[c];
      this->bias[c] = bias == nullptr ? acc_t(0) : bias[c];
    }
  }

  // From the parts' sums of g and of g * (x - mean), in their order; d_weight and d_bias or null.
  void take_gradients(const NormParts& parts, const std::vector<acc_t>& partials, acc_t* d_weight,
                      acc_t* d_bias) {
    const int64_t C = parts.layout.channels;
    std::vector<double> sums(2 * C);
    for (int64_t part = 0; part < parts.count; ++part) {
      const acc_t* of_part = partials.data() + part * 2 * C;
      for (int64_t i = 0; i < 2 * C; ++i) sums[i] += static_cast<double>(of_part[i]);
    }
    const double count = static_cast<double>(parts.layout.rows());
    mean_gradient.resize(C);
    slope.resize(C);
    for (int64_t c = 0; c < C; ++c) {
      const double r = rstd[c];
      if (d_bias != nullptr) d_bias[c] = static_cast<acc_t>(sums[c]);
      if (d_weight != nullptr) d_weight[c] = static_cast<acc_t>(sums[C + c] * r);
      mean_gradient[c] = static_cast<acc_t>(sums[c] / count);
      slope[c] = static_cast<acc_t>(sums[C + c] * r * r / count);
    }
  }

  std::vector<acc_t> mean, scale, bias, rstd;
  std::vector<acc_t> mean_gradient, slope;  // of take_gradients
};

template <typename acc_t>
FST_FAST_INLINE inline acc_t normalized(acc_t x, acc_t mean, acc_t scale, acc_t bias) {
  return (x - mean) * scale + bias;
}

// Calls body(channel, integral_constant width or int64_t) for tiles that cover all channels.
template <typename Body>
FST_FAST_INLINE inline void for_each_tile(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kTile <= channels; c += kTile) body(c, std::integral_constant<int64_t, kTile>());
  if (c + 16 <= channels) {
    body(c, std::integral_constant<int64_t, 16>());
    c += 16;
  }
  if (c < channels) body(c, channels - c);
}

// A center near the mean of each channel of a tile of a block of rows; the sums of the distances to
// it, and of their squares. A sum of squares around zero would lose the digits of a small variance.
template <typename scalar_t, typename acc_t, typename Width>
FST_FAST_INLINE inline void collect_tile(const scalar_t* x, int64_t rows, int64_t stride,
                                         Width width, acc_t* centers, acc_t* sums, acc_t* squares) {
  const int64_t some = std::min(rows, kCenterRows);
  acc_t center[kTile] = {}, sum[kTile] = {}, square[kTile] = {};
  for (int64_t row = 0; row < some; ++row) {
    const scalar_t* at = x + row * stride;
    for (int64_t c = 0; c < width; ++c) center[c] += static_cast<acc_t>(at[c]);
  }
  for (int64_t c = 0; c < width; ++c) center[c] /= static_cast<acc_t>(some);
  for (int64_t row = 0; row < rows; ++row) {
    const scalar_t* at = x + row * stride;
    for (int64_t c = 0; c < width; ++c) {
      const acc_t apart = static_cast<acc_t>(at[c]) - center[c];
      sum[c] += apart;
      square[c] += apart * apart;
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    centers[c] = center[c];
    sums[c] = sum[c];
    squares[c] = square[c];
  }
}

// The sum of f(i) over i < count, in kSumLanes lanes.
template <typename acc_t, typename F>
FST_FAST_INLINE inline acc_t lane_sum(int64_t count, const F& f) {
  acc_t lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int64_t lane = 0; lane < kSumLanes; ++lane) lanes[lane] += f(i + lane);
  }
  for (int64_t lane = 0; i + lane < count; ++lane) lanes[lane] += f(i + lane);
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// partials: [parts, 3, C], the parts' centers, and sums of the distances to them and of squares.
template <typename scalar_t, typename acc_t>
FST_FAST_INLINE inline void collect(const NormParts& parts, int64_t task, const scalar_t* x,
                                    acc_t* partials) {
  const int64_t C = parts.layout.channels;
  if (parts.layout.channels_last) {
    const scalar_t* from = x + task * kPartRows * C;
    acc_t* to = partials + task * 3 * C;
    for_each_tile(C, [&](int64_t c, auto width) FST_FAST_INLINE {
      collect_tile(from + c, parts.rows_of(task), C, width, to + c, to + C + c, to + 2 * C + c);
    });
    return;
  }
  const int64_t pixels = parts.layout.pixels;
  const scalar_t* from = x + task * pixels;
  acc_t* to = partials + task / C * 3 * C + task % C;
  const auto value = [&](int64_t i) FST_FAST_INLINE { return static_cast<acc_t>(from[i]); };
  const acc_t center = lane_sum<acc_t>(pixels, value) / static_cast<acc_t>(pixels);
  const auto apart = [&](int64_t i) FST_FAST_INLINE { return value(i) - center; };
  to[0] = center;
  to[C] = lane_sum<acc_t>(pixels, apart);
  to[2 * C] =
      lane_sum<acc_t>(pixels, [&](int64_t i) FST_FAST_INLINE { return apart(i) * apart(i); });
}

// The flags of a loop as types: is there a residual, is there a ReLU?
template <typename Body>
FST_FAST_INLINE inline void with_flags(bool residual, bool relu, const Body& body) {
  using std::bool_constant;
  if (residual && relu) return body(bool_constant<true>(), bool_constant<true>());
  if (residual) return body(bool_constant<true>(), bool_constant<false>());
  if (relu) return body(bool_constant<false>(), bool_constant<true>());
  body(bool_constant<false>(), bool_constant<false>());
}

// Calls body(first element, neighbours, channel, step from a neighbour's channel to the next one's)
// for every run of neighbours of a task.
template <typename Body>
FST_FAST_INLINE inline void for_each_run(const NormParts& parts, int64_t task, const Body& body) {
  const int64_t C = parts.layout.channels;
  if (!parts.layout.channels_last) {
    const int64_t pixels = parts.layout.pixels;
    return body(task * pixels, pixels, task % C, std::integral_constant<int64_t, 0>());
  }
  const int64_t rows = parts.rows_of(task);
  for (int64_t row = 0; row < rows; ++row) {
    body((task * kPartRows + row) * C, C, int64_t(0), std::integral_constant<int64_t, 1>());
  }
}

template <typename scalar_t, typename acc_t>
FST_FAST_INLINE inline void apply(const NormParts& parts, int64_t task, const NormLine<acc_t>& line,
                                  const scalar_t* x, const scalar_t* residual, bool relu,
                                  scalar_t* y) {
  const acc_t *mean = line.mean.data(), *scale = line.scale.data(), *bias = line.bias.data();
  with_flags(residual != nullptr, relu, [&](auto adds, auto cuts) FST_FAST_INLINE {
    for_each_run(parts, task, [&](int64_t at, int64_t n, int64_t c0, auto step) FST_FAST_INLINE {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t c = c0 + i * step;
        acc_t v = normalized(static_cast<acc_t>(x[at + i]), mean[c], scale[c], bias[c]);
        if constexpr (adds) v += static_cast<acc_t>(residual[at + i]);
        // NaN stays NaN.
        if constexpr (cuts) v = v <= 0 ? acc_t(0) : v;
        y[at + i] = static_cast<scalar_t>(v);
      }
    });
  });
}

// What of a gradient passes the ReLU, whose input is computed anew with the bits of `apply`.
template <bool kAdds, bool kCuts, typename acc_t>
FST_FAST_INLINE inline acc_t passing(acc_t gradient, acc_t x, acc_t residual, acc_t mean,
                                     acc_t scale, acc_t bias) {
  if constexpr (!kCuts) return gradient;
  acc_t v = normalized(x, mean, scale, bias);
  if constexpr (kAdds) v += residual;
  return v <= 0 ? acc_t(0) : gradient;
}

template <bool kAdds, typename scalar_t, typename acc_t>
FST_FAST_INLINE inline acc_t added(const scalar_t* residual, int64_t at) {
  if constexpr (kAdds) return static_cast<acc_t>(residual[at]);
  return acc_t(0);
}

// The sums of g and of g * (x - mean) over a task, into partials [parts, 2, C]. passed: where to
// put g, or null.
template <typename scalar_t, typename acc_t>
FST_FAST_INLINE inline void collect_gradients(const NormParts& parts, int64_t task,
                                              const NormLine<acc_t>& line,
                                              const scalar_t* __restrict x,
                                              const scalar_t* __restrict residual,
                                              const scalar_t* __restrict d_y, bool relu,
                                              scalar_t* __restrict passed, acc_t* partials) {
  const int64_t C = parts.layout.channels;
  const acc_t *mean = line.mean.data(), *scale = line.scale.data(), *bias = line.bias.data();
  with_flags(residual != nullptr, relu, [&](auto adds, auto cuts) FST_FAST_INLINE {
    const auto g_at = [&](int64_t at, int64_t c) FST_FAST_INLINE {
      return passing<adds, cuts>(static_cast<acc_t>(d_y[at]), static_cast<acc_t>(x[at]),
                                 added<adds, scalar_t, acc_t>(residual, at), mean[c], scale[c],
                                 bias[c]);
    };
    if (!parts.layout.channels_last) {
      const int64_t pixels = parts.layout.pixels, image = task / C, c = task % C;
      const int64_t first = task * pixels;
      if (passed != nullptr) {
        for (int64_t i = 0; i < pixels; ++i) {
          passed[first + i] = static_cast<scalar_t>(g_at(first + i, c));
        }
      }
      partials[image * 2 * C + c] =
          lane_sum<acc_t>(pixels, [&](int64_t i) FST_FAST_INLINE { return g_at(first + i, c); });
      partials[image * 2 * C + C + c] = lane_sum<acc_t>(pixels, [&](int64_t i) FST_FAST_INLINE {
        return g_at(first + i, c) * (static_cast<acc_t>(x[first + i]) - mean[c]);
      });
      return;
    }
    const int64_t rows = parts.rows_of(task), first = task * kPartRows * C;
    acc_t* to = partials + task * 2 * C;
    const auto add_up = [&](auto writes) FST_FAST_INLINE {
      for_each_tile(C, [&](int64_t c0, auto width) FST_FAST_INLINE {
        acc_t sums[kTile] = {}, products[kTile] = {};
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t at = first + row * C + c0;
          for (int64_t c = 0; c < width; ++c) {
            const acc_t g = g_at(at + c, c0 + c);
            sums[c] += g;
            products[c] += g * (static_cast<acc_t>(x[at + c]) - mean[c0 + c]);
            if constexpr (writes) passed[at + c] = static_cast<scalar_t>(g);
          }
        }
        for (int64_t c = 0; c < width; ++c) {
          to[c0 + c] = sums[c];
          to[C + c0 + c] = products[c];
        }
      });
    };
    if constexpr (cuts) {
      if (passed != nullptr) return add_up(std::true_type());
    }
    add_up(std::false_type());
  });
}

template <typename scalar_t, typename acc_t>
FST_FAST_INLINE inline void apply_gradients(const NormParts& parts, int64_t task,
                                            const NormLine<acc_t>& line, const scalar_t* x,
                                            const scalar_t* residual, const scalar_t* d_y,
                                            bool relu, scalar_t* d_x) {
  const acc_t *mean = line.mean.data(), *scale = line.scale.data(), *bias = line.bias.data();
  const acc_t *center = line.mean_gradient.data(), *slope = line.slope.data();
  with_flags(residual != nullptr, relu, [&](auto adds, auto cuts) FST_FAST_INLINE {
    for_each_run(parts, task, [&](int64_t at, int64_t n, int64_t c0, auto step) FST_FAST_INLINE {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t c = c0 + i * step;
        const acc_t value = static_cast<acc_t>(x[at + i]);
        const acc_t g = passing<adds, cuts>(static_cast<acc_t>(d_y[at + i]), value,
                                            added<adds, scalar_t, acc_t>(residual, at + i), mean[c],
                                            scale[c], bias[c]);
        d_x[at + i] =
            static_cast<scalar_t>((g - center[c] - (value - mean[c]) * slope[c]) * scale[c]);
      }
    });
  });
}

}  // namespace fst_fast
