#include "../head_step.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"

namespace fst_fast {
namespace {

// Squares are summed in kLanes doubles within a block and then block by block: an order that
// neither the instruction set nor the number of threads can change.
constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 4096;
// Below this many blocks per thread, waking a thread costs more than it saves.
constexpr int64_t kGrain = 64;

template <typename scalar_t>
struct Step {
  using compute_t = at::opmath_type<scalar_t>;

  scalar_t* value;
  const scalar_t* gradient;
  scalar_t* momentum_buffer;
  int64_t count;
  compute_t lr;
  compute_t momentum;
  compute_t value_scale = 1;  // kDeferred: the head is value_scale * value

  // m <- round(momentum * m + g); returns v^2 with v = w - lr * m. kDeferred writes v at once.
  template <bool kDeferred>
  FST_FAST_INLINE double advance(int64_t i) const {
    const auto product = momentum * static_cast<compute_t>(momentum_buffer[i]);
    momentum_buffer[i] = static_cast<scalar_t>(product + static_cast<compute_t>(gradient[i]));
    double v;
    if constexpr (kDeferred) {
      value[i] = static_cast<scalar_t>(value_scale * static_cast<compute_t>(value[i]) -
                                       lr * static_cast<compute_t>(momentum_buffer[i]));
      v = static_cast<compute_t>(value[i]);
    } else {
      v = moved(i);
    }
    return v * v;
  }

  FST_FAST_INLINE compute_t moved(int64_t i) const {
    return static_cast<compute_t>(value[i]) - lr * static_cast<compute_t>(momentum_buffer[i]);
  }

  template <bool kDeferred>
  FST_FAST_INLINE double advance_block(int64_t begin, int64_t end) const {
    double lanes[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += advance<kDeferred>(i + lane);
    }
    for (int64_t lane = 0; i + lane < end; ++lane) lanes[lane] += advance<kDeferred>(i + lane);
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
  }

  FST_FAST_INLINE void write_block(int64_t begin, int64_t end, compute_t scale) const {
    for (int64_t i = begin; i < end; ++i) value[i] = static_cast<scalar_t>(moved(i) * scale);
  }
};

// Calls body(block, begin, end) for every block of [0, count).
template <typename Body>
void for_each_block(int64_t count, const Body& body) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  at::parallel_for(0, blocks, kGrain, [&](int64_t first, int64_t last) {
    run_best([&]() FST_FAST_INLINE {
      for (int64_t block = first; block < last; ++block) {
        body(block, block * kBlock, std::min(count, (block + 1) * kBlock));
      }
    });
  });
}

template <bool kDeferred, typename scalar_t>
double advance(const Step<scalar_t>& step) {
  std::vector<double> partials((step.count + kBlock - 1) / kBlock);
  for_each_block(step.count, [&](int64_t block, int64_t begin, int64_t end) FST_FAST_INLINE {
    partials[block] = step.template advance_block<kDeferred>(begin, end);
  });
  double sum = 0;
  for (const double partial : partials) sum += partial;
  return sum;
}

template <typename scalar_t>
void write(const Step<scalar_t>& step, at::opmath_type<scalar_t> scale) {
  for_each_block(step.count, [&](int64_t, int64_t begin, int64_t end)
                                 FST_FAST_INLINE { step.write_block(begin, end, scale); });
}

void head_step_cpu(const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   const at::Tensor& d_weight, const std::optional<at::Tensor>& d_bias,
                   const at::Tensor& weight_momentum,
                   const std::optional<at::Tensor>& bias_momentum, const at::Tensor& lr,
                   double momentum, const std::optional<at::Tensor>& norm,
                   const std::optional<at::Tensor>& weight_scale,
                   const std::optional<at::Tensor>& found_inf) {
  check_head_step(weight, bias, d_weight, d_bias, weight_momentum, bias_momentum, lr, norm,
                  weight_scale, found_inf);
  if (weight.numel() == 0) return;
  if (found_inf.has_value() && *found_inf->const_data_ptr<float>() != 0) return;

  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, weight.scalar_type(), "head_step_", [&] {
        using compute_t = at::opmath_type<scalar_t>;
        const auto step_of = [&](const at::Tensor& value, const at::Tensor& gradient,
                                 const at::Tensor& buffer) {
          return Step<scalar_t>{
              value.mutable_data_ptr<scalar_t>(),  gradient.const_data_ptr<scalar_t>(),
              buffer.mutable_data_ptr<scalar_t>(), value.numel(),
              *lr.const_data_ptr<compute_t>(),     static_cast<compute_t>(momentum)};
        };
        auto step = step_of(weight, d_weight, weight_momentum);
        const bool deferred = weight_scale.has_value();
        if (deferred) step.value_scale = *weight_scale->const_data_ptr<compute_t>();
        const double squares = deferred ? advance<true>(step) : advance<false>(step);
        const bool project = norm.has_value() && squares != 0;
        const auto scale =
            project
                ? static_cast<compute_t>(*norm->const_data_ptr<compute_t>() / std::sqrt(squares))
                : compute_t(1);
        if (deferred) {
          *weight_scale->mutable_data_ptr<compute_t>() = scale;
        } else {
          write(step, scale);
        }
        if (bias.has_value()) {
          const auto bias_step = step_of(*bias, *d_bias, *bias_momentum);
          advance<false>(bias_step);
          write(bias_step, compute_t(1));
        }
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(fst_fast_native, CPU, m) { m.impl("head_step_", &head_step_cpu); }

}  // namespace fst_fast
