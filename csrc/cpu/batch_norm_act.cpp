#include "../batch_norm_act.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "batch_norm_loops.h"

namespace fst_fast {
namespace {

// Elements of a task for one thread: less is not worth waking one for.
constexpr int64_t kGrain = 32768;

template <typename scalar_t>
const scalar_t* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<scalar_t>() : nullptr;
}

// Calls body(task) for all parts, on all threads. A part is a block of rows with all channels, or
// one channel of an image. What models are tuned in runs with the best instruction set; every set
// takes the compiler half a minute, so other dtypes have the baseline, with the same bits.
template <typename scalar_t, typename Body>
void for_each_part(const NormParts& parts, const Body& body) {
  constexpr bool kOften = std::is_same_v<scalar_t, float> || std::is_same_v<scalar_t, at::BFloat16>;
  const int64_t per_part = std::max<int64_t>(1, parts.elements / std::max<int64_t>(1, parts.tasks));
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, per_part));
  at::parallel_for(0, parts.tasks, grain, [&](int64_t first, int64_t last) {
    const auto all = [&]() FST_FAST_INLINE {
      for (int64_t task = first; task < last; ++task) body(task);
    };
    if constexpr (kOften) {
      run_best(all);
    } else {
      all();
    }
  });
}

// Mean and variance (not corrected) of every channel from what `collect` found, part by part.
template <typename acc_t>
void merge_statistics(const NormParts& parts, const std::vector<acc_t>& partials, acc_t* mean,
                      acc_t* var) {
  const int64_t C = parts.layout.channels;
  std::vector<double> means(C), squares(C);
  const auto mean_of = [&](const acc_t* of_part, double rows, int64_t c) {
    return static_cast<double>(of_part[c]) + static_cast<double>(of_part[C + c]) / rows;
  };
  for (int64_t part = 0; part < parts.count; ++part) {
    const acc_t* of_part = partials.data() + part * 3 * C;
    const double rows = static_cast<double>(parts.rows_of(part));
    for (int64_t c = 0; c < C; ++c) means[c] += rows * mean_of(of_part, rows, c);
  }
  const double count = static_cast<double>(parts.layout.rows());
  for (int64_t c = 0; c < C; ++c) means[c] /= count;
  for (int64_t part = 0; part < parts.count; ++part) {
    const acc_t* of_part = partials.data() + part * 3 * C;
    const double rows = static_cast<double>(parts.rows_of(part));
    for (int64_t c = 0; c < C; ++c) {
      const double sum = of_part[C + c], apart = mean_of(of_part, rows, c) - means[c];
      squares[c] += of_part[2 * C + c] - sum * sum / rows + rows * apart * apart;
    }
  }
  for (int64_t c = 0; c < C; ++c) {
    mean[c] = static_cast<acc_t>(means[c]);
    // Rounding may leave less than nothing; this form lets NaN pass.
    var[c] = squares[c] < 0 ? acc_t(0) : static_cast<acc_t>(squares[c] / count);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_act_cpu(
    const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, bool relu,
    double eps) {
  const BatchNormArguments a{x, weight, bias, residual, relu, eps};
  const NormParts parts(check_batch_norm("batch_norm_act", a));
  const int64_t C = parts.layout.channels;
  const auto options = x.options().dtype(batch_norm_compute(x));
  auto y = at::empty_like(x);
  auto mean = at::empty({C}, options), var = at::empty({C}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "batch_norm_act", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto* values = x.const_data_ptr<scalar_t>();
    std::vector<acc_t> partials(parts.count * 3 * C);
    for_each_part<scalar_t>(parts, [&](int64_t task) FST_FAST_INLINE {
      collect(parts, task, values, partials.data());
    });
    merge_statistics(parts, partials, mean.mutable_data_ptr<acc_t>(),
                     var.mutable_data_ptr<acc_t>());
    const NormLine<acc_t> line(C, mean.const_data_ptr<acc_t>(), var.const_data_ptr<acc_t>(),
                               data_or_null<acc_t>(weight), data_or_null<acc_t>(bias), eps);
    const auto* added = data_or_null<scalar_t>(residual);
    auto* out = y.mutable_data_ptr<scalar_t>();
    for_each_part<scalar_t>(parts, [&](int64_t task) FST_FAST_INLINE {
      apply(parts, task, line, values, added, relu, out);
    });
  });
  return {y, mean, var};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_act_backward_cpu(
    const at::Tensor& d_y, const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
    const at::Tensor& mean, const at::Tensor& var, bool relu, double eps,
    std::array<bool, 3> output_mask) {
  const BatchNormArguments a{x, weight, bias, residual, relu, eps};
  const NormParts parts(check_batch_norm_backward("batch_norm_act_backward", a, d_y, mean, var));
  const int64_t C = parts.layout.channels;
  const auto nothing = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
  auto d_x = output_mask[0] ? at::empty_like(x) : nothing(x);
  // Without a ReLU the residual's gradient is d_y itself.
  auto d_residual = output_mask[2] ? at::empty_like(x) : nothing(x);
  auto d_weight = output_mask[1] ? at::empty_like(mean) : nothing(mean);
  auto d_bias = output_mask[1] ? at::empty_like(mean) : nothing(mean);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "batch_norm_act_backward", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        NormLine<acc_t> line(C, mean.const_data_ptr<acc_t>(), var.const_data_ptr<acc_t>(),
                             data_or_null<acc_t>(weight), data_or_null<acc_t>(bias), eps);
        const auto* values = x.const_data_ptr<scalar_t>();
        const auto* added = data_or_null<scalar_t>(residual);
        const auto* gradient = d_y.const_data_ptr<scalar_t>();
        auto* passed = output_mask[2] ? d_residual.mutable_data_ptr<scalar_t>() : nullptr;
        std::vector<acc_t> partials(parts.count * 2 * C);
        for_each_part<scalar_t>(parts, [&](int64_t task) FST_FAST_INLINE {
          collect_gradients(parts, task, line, values, added, gradient, relu, passed,
                            partials.data());
        });
        line.take_gradients(parts, partials,
                            output_mask[1] ? d_weight.mutable_data_ptr<acc_t>() : nullptr,
                            output_mask[1] ? d_bias.mutable_data_ptr<acc_t>() : nullptr);
        if (!output_mask[0]) return;
        auto* out = d_x.mutable_data_ptr<scalar_t>();
        // What the ReLU let pass is there already.
        const bool masked = passed != nullptr || !relu;
        for_each_part<scalar_t>(parts, [&](int64_t task) FST_FAST_INLINE {
          apply_gradients(parts, task, line, values, masked ? nullptr : added,
                          passed != nullptr ? passed : gradient, !masked, out);
        });
      });
  return {d_x, d_weight, d_bias, d_residual};
}

void batch_norm_update_cpu(const at::Tensor& mean, const at::Tensor& var,
                           const at::Tensor& running_mean, const at::Tensor& running_var,
                           const std::optional<at::Tensor>& num_batches_tracked, int64_t count,
                           std::optional<double> momentum) {
  check_batch_norm_update(mean, var, running_mean, running_var, num_batches_tracked, count,
                          momentum);
  double share = momentum.value_or(0);
  if (num_batches_tracked.has_value()) {
    const int64_t batches = ++*num_batches_tracked->mutable_data_ptr<int64_t>();
    if (!momentum.has_value()) share = 1 / static_cast<double>(batches);
  }
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "batch_norm_update_", [&] {
    const auto now = static_cast<scalar_t>(share);
    const auto before = static_cast<scalar_t>(1 - share);
    // Of a sample, the variance of what it was drawn from.
    const auto unbiased = static_cast<scalar_t>(static_cast<double>(count) / (count - 1));
    const auto* means = mean.const_data_ptr<scalar_t>();
    const auto* vars = var.const_data_ptr<scalar_t>();
    auto* running_means = running_mean.mutable_data_ptr<scalar_t>();
    auto* running_vars = running_var.mutable_data_ptr<scalar_t>();
    for (int64_t c = 0; c < mean.numel(); ++c) {
      running_means[c] = now * means[c] + before * running_means[c];
      running_vars[c] = now * (vars[c] * unbiased) + before * running_vars[c];
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fst_fast_native, CPU, m) {
  m.impl("batch_norm_act", &batch_norm_act_cpu);
  m.impl("batch_norm_act_backward", &batch_norm_act_backward_cpu);
  m.impl("batch_norm_update_", &batch_norm_update_cpu);
}

}  // namespace fst_fast
