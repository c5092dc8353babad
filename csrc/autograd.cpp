#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "head_deviation_loss.h"

// The derivative of fst_fast_native::head_deviation_loss in eager mode, on any device. By hand, not
// by torch::autograd::Function, whose bookkeeping costs a small head as much as its loss.
namespace fst_fast {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

using Optional = std::optional<at::Tensor>;

HeadDeviationResult call_native(const HeadDeviationArguments& a) {
  using Signature = HeadDeviationResult(const at::Tensor&, const at::Tensor&, const Optional&,
                                        const at::Tensor&, const Optional&, const Optional&,
                                        const Optional&, const Optional&, const Optional&, double,
                                        std::string_view, double, int64_t, std::array<bool, 3>);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fst_fast_native::head_deviation_loss", "")
                             .typed<Signature>();
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(a.features, a.weight, a.bias, a.labels, a.weight0, a.class_weight, a.row_grad,
                 a.weight_scale, a.alpha_scale, a.alpha, a.reduction, a.label_smoothing,
                 a.ignore_index, a.output_mask);
}

void rescale(const variable_list& gradients, const at::Tensor& factor) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fst_fast_native::rescale_", "")
                             .typed<void(at::TensorList, const at::Tensor&)>();
  variable_list defined;
  for (const auto& gradient : gradients) {
    if (gradient.defined()) defined.push_back(gradient);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.call(defined, factor);
}

// PyTorch keeps nodes in std::shared_ptr or c10::intrusive_ptr, by version.
template <typename T, typename Pointer = decltype(torch::autograd::Edge::function),
          typename... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return std::shared_ptr<T>(new T(std::forward<Arguments>(arguments)...),
                              [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
  }
}

struct HeadDeviationBackward : public Node {
  explicit HeadDeviationBackward(const HeadDeviationArguments& a)
      : features(a.features, false),
        weight(a.weight, false),
        bias(a.bias, false),
        labels(a.labels, false),
        weight0(a.weight0, false),
        class_weight(a.class_weight, false),
        weight_scale(a.weight_scale, false),
        alpha_scale(a.alpha_scale, false),
        alpha(a.alpha),
        reduction(a.reduction),
        label_smoothing(a.label_smoothing),
        ignore_index(a.ignore_index) {}

  std::string name() const override { return "HeadDeviationBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&features, &weight, &bias, &labels, &weight0, &class_weight, &weight_scale,
                        &alpha_scale}) {
      saved->reset_data();
    }
    gradients.clear();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto& grad = grads[0];
    if (!grad.defined()) return variable_list(3);
    auto result = reduction == "none" ? recompute(grad.detach().contiguous()) : once(grad);
    for (size_t i = 0; i < 3; ++i) {
      if (!task_should_compute_output(i)) result[i].reset();
    }
    return torch::autograd::GradMode::is_enabled() ? refuse_second(std::move(result), grad)
                                                   : result;
  }

  // Of the first backward the forward's own buffers, which leaves them for AccumulateGrad to take.
  variable_list once(const at::Tensor& grad) {
    auto result = gradients.empty() ? recompute(std::nullopt) : std::move(gradients);
    gradients.clear();
    rescale(result, grad.detach());
    return result;
  }

  variable_list recompute(const Optional& row_grad) {
    const auto unpack = [](const SavedVariable& saved) -> Optional {
      auto tensor = saved.unpack();
      return tensor.defined() ? Optional(std::move(tensor)) : std::nullopt;
    };
    const auto x = features.unpack(), w = weight.unpack(), y = labels.unpack();
    const auto b = unpack(bias), w0 = unpack(weight0), per_class = unpack(class_weight);
    const auto scale = unpack(weight_scale), factor = unpack(alpha_scale);
    std::array<bool, 3> mask;
    for (size_t i = 0; i < 3; ++i) mask[i] = task_should_compute_output(i);
    auto output = call_native({x, w, b, y, w0, per_class, row_grad, scale, factor, alpha, reduction,
                               label_smoothing, ignore_index, mask});
    return gradients_of(output, mask);
  }

  static variable_list gradients_of(HeadDeviationResult& output, const std::array<bool, 3>& mask) {
    variable_list result(3);
    if (mask[0]) result[0] = std::move(std::get<5>(output));
    if (mask[1]) result[1] = std::move(std::get<6>(output));
    if (mask[2]) result[2] = std::move(std::get<7>(output));
    return result;
  }

  // Joined to all that the gradients depend on, so that no way to differentiate them is silent.
  variable_list refuse_second(variable_list&& result, const at::Tensor& grad) {
    auto edges = next_edges();
    edges.push_back(torch::autograd::impl::gradient_edge(grad));
    const auto refuse = make_node<torch::autograd::Error>(
        "head_deviation_loss: has no second derivative; use the PyTorch formula of its docstring",
        std::move(edges));
    for (auto& gradient : result) {
      if (!gradient.defined()) continue;
      gradient = gradient.detach();
      torch::autograd::set_history(gradient, refuse);
    }
    return result;
  }

  SavedVariable features, weight, bias, labels, weight0, class_weight, weight_scale, alpha_scale;
  double alpha;
  std::string reduction;
  double label_smoothing;
  int64_t ignore_index;
  variable_list gradients;  // of the loss; empty once backward has run
};

// Differentiates only in reverse: a tangent would be lost without a word.
void refuse_tangents(const HeadDeviationArguments& a) {
  using torch::autograd::isFwGradDefined;
  TORCH_CHECK_NOT_IMPLEMENTED(
      !isFwGradDefined(a.features) && !isFwGradDefined(a.weight) && !isFwGradDefined(a.bias),
      "head_deviation_loss: has no forward-mode derivative; use the PyTorch formula of its "
      "docstring");
}

// The arguments are checked by the native op.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> head_deviation_autograd(
    const at::Tensor& features, const at::Tensor& weight, const Optional& bias,
    const at::Tensor& labels, const Optional& weight0, const Optional& class_weight,
    const Optional& weight_scale, const Optional& alpha_scale, double alpha,
    std::string_view reduction, double label_smoothing, int64_t ignore_index) {
  const Optional none;
  HeadDeviationArguments a{
      features,     weight,      bias,  labels,    weight0,         class_weight, none,
      weight_scale, alpha_scale, alpha, reduction, label_smoothing, ignore_index, {}};
  refuse_tangents(a);
  const bool enabled = torch::autograd::GradMode::is_enabled();
  const std::array<bool, 3> needs{enabled && features.requires_grad(),
                                  enabled && weight.requires_grad(),
                                  enabled && bias.has_value() && bias->requires_grad()};
  const bool differentiable = needs[0] || needs[1] || needs[2];
  // The gradient of a sum over rows needs the rows' own gradients, which only backward knows.
  if (reduction != "none") a.output_mask = needs;
  auto output = call_native(a);
  auto& loss = std::get<0>(output);
  if (differentiable) {
    const auto node = make_node<HeadDeviationBackward>(a);
    node->set_next_edges(torch::autograd::collect_next_edges(features, weight, bias));
    if (reduction != "none") node->gradients = node->gradients_of(output, needs);
    torch::autograd::set_history(loss, node);
  }
  return {std::move(loss), std::move(std::get<1>(output)), std::move(std::get<2>(output)),
          std::move(std::get<3>(output)), std::move(std::get<4>(output))};
}

}  // namespace

TORCH_LIBRARY_IMPL(fst_fast_native, CompositeImplicitAutograd, m) {
  m.impl("head_deviation_autograd", &head_deviation_autograd);
}

}  // namespace fst_fast
