#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "head_deviation_host.h"
#include "head_deviation_small.cuh"
#include "launch.h"

namespace fst_fast {
namespace {

template <typename scalar_t, typename weight_t>
SmallHead<scalar_t, weight_t> small_head(const HeadInputs& in, const HeadOutputs& out) {
  using compute_t = compute_of<scalar_t>;
  SmallHead<scalar_t, weight_t> head{};
  head.terms = loss_terms<compute_t>(in);
  head.features = read<scalar_t>(in.features);
  head.weight = read<weight_t>(in.weight);
  head.bias = read<weight_t>(in.bias);
  head.weight0 = read<weight_t>(in.weight0);
  head.weight_scale = read<compute_t>(in.weight_scale);
  head.alpha_scale = read<compute_t>(in.alpha_scale);
  head.alpha = static_cast<compute_t>(in.alpha);
  head.columns = in.D;
  head.loss = write<compute_t>(out.loss);
  head.cross_entropy = write<compute_t>(out.cross_entropy);
  head.penalty = write<compute_t>(out.penalty);
  head.correct = write<int64_t>(out.correct);
  head.invalid = write<int64_t>(out.invalid);
  head.d_features = write<scalar_t>(out.d_features);
  head.d_weight = write<weight_t>(out.d_weight);
  head.d_bias = write<weight_t>(out.d_bias);
  return head;
}

template <typename Shape, typename scalar_t>
constexpr size_t kSmallBytes = sizeof(SmallShared<Shape, compute_of<scalar_t>>);

// Makes the room that the kernel needs beside its arguments. One allocation: on the host each takes
// as long as it does to launch.
template <typename scalar_t, typename weight_t>
at::Tensor make_scratch(SmallHead<scalar_t, weight_t>& head, const HeadInputs& in, int64_t blocks) {
  using compute_t = compute_of<scalar_t>;
  const int64_t parts = blocks * static_cast<int64_t>(sizeof(SmallPart));
  const int64_t d_logits = in.B * in.K * static_cast<int64_t>(sizeof(compute_t));
  const auto scratch = at::empty({parts + d_logits}, in.labels.options().dtype(at::kByte));
  auto* memory = static_cast<unsigned char*>(scratch.mutable_data_ptr());
  head.parts = reinterpret_cast<SmallPart*>(memory);
  head.d_logits = reinterpret_cast<compute_t*>(memory + parts);
  return scratch;
}

template <typename scalar_t, typename weight_t, int kVector>
void launch_small(SmallHead<scalar_t, weight_t> head, const HeadInputs& in) {
  constexpr size_t kCluster = kSmallBytes<ClusterShape, scalar_t>;
  constexpr size_t kGrid = kSmallBytes<GridShape, scalar_t>;
  static_assert(std::max(kCluster, kGrid) <= 48 * 1024, "more needs cudaFuncSetAttribute");
  static Residency clusters, residency;
  const auto device = in.features.get_device();
  const auto cluster = head_deviation_small_kernel<ClusterShape, scalar_t, weight_t, kVector>;
  // One tile of rows and one slice of columns for each block.
  if (in.B <= kClusterBlocks * ClusterShape::kRows &&
      in.D <= kClusterBlocks * ClusterShape::kColumns && in.K <= ClusterShape::kClasses &&
      in.B * in.D * in.K <= head_limits.cluster_products &&
      cluster_fits(cluster, kClusterBlocks, ClusterShape::kThreads, kCluster, device, clusters)) {
    const auto scratch = make_scratch(head, in, kClusterBlocks);
    launch_cluster(cluster, kClusterBlocks, ClusterShape::kThreads, kCluster, head);
    return;
  }
  const auto grid = head_deviation_small_kernel<GridShape, scalar_t, weight_t, kVector>;
  const int64_t tiles = (in.B + GridShape::kRows - 1) / GridShape::kRows;
  const int64_t slices = (in.D + GridShape::kColumns - 1) / GridShape::kColumns;
  const int64_t resident = resident_blocks(grid, GridShape::kThreads, kGrid, device, residency);
  const int64_t blocks = std::min(std::max(tiles, slices), resident);
  const auto scratch = make_scratch(head, in, blocks);
  launch_together(grid, blocks, GridShape::kThreads, kGrid, head);
}

template <typename scalar_t, typename weight_t>
void few_classes(const HeadInputs& in, const HeadOutputs& out) {
  constexpr int kVector = 16 / sizeof(scalar_t);
  const auto head = small_head<scalar_t, weight_t>(in, out);
  if (packs_fit({in.features, in.weight, in.weight0, out.d_features, out.d_weight}, kVector)) {
    launch_small<scalar_t, weight_t, kVector>(head, in);
  } else {
    launch_small<scalar_t, weight_t, 1>(head, in);
  }
}

at::Tensor contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->contiguous() : at::Tensor();
}

HeadInputs take_inputs(const HeadDeviationArguments& a) {
  // On a GPU the address of a tensor without elements is null, as if there were no row_grad.
  const bool no_grad = a.row_grad.has_value() && a.row_grad->numel() == 0;
  const bool penalty =
      a.weight0.has_value() && !no_grad && (a.alpha != 0 || a.alpha_scale.has_value());
  HeadInputs in{};
  in.features = a.features.contiguous();
  in.weight = a.weight.contiguous();
  in.bias = contiguous(a.bias);
  in.labels = a.labels.contiguous();
  in.weight0 = penalty ? contiguous(a.weight0) : at::Tensor();
  in.class_weight = contiguous(a.class_weight);
  in.row_grad = contiguous(a.row_grad);
  in.weight_scale = contiguous(a.weight_scale);
  in.alpha_scale = contiguous(a.alpha_scale);
  in.alpha = a.alpha;
  in.label_smoothing = a.label_smoothing;
  in.ignore_index = a.ignore_index;
  in.reduction = a.reduction == "mean"  ? Reduction::mean
                 : a.reduction == "sum" ? Reduction::sum
                                        : Reduction::none;
  in.wanted = a.output_mask;
  in.B = a.features.size(0);
  in.D = a.features.size(1);
  in.K = a.weight.size(0);
  return in;
}

// classes: that d_weight has room for.
HeadOutputs make_outputs(const HeadInputs& in, int64_t classes) {
  const auto compute = in.features.options().dtype(compute_type(in.features));
  const auto index = in.labels.options();
  const auto rows =
      in.reduction == Reduction::none ? std::vector<int64_t>{in.B} : std::vector<int64_t>{};
  const auto gradient = [&](bool wanted, at::IntArrayRef shape) {
    return at::empty(wanted ? shape : at::IntArrayRef{0}, in.weight.options());
  };
  HeadOutputs out;
  out.loss = at::empty(rows, compute);
  out.cross_entropy = at::empty(rows, compute);
  out.penalty = at::empty({}, compute);
  out.correct = at::empty({}, index);
  out.invalid = at::empty({}, index);
  out.d_features = in.wanted[0] ? at::empty({in.B, in.D}, in.features.options())
                                : at::empty({0}, in.features.options());
  out.d_weight = gradient(in.wanted[1], {classes, in.D});
  if (in.wanted[1] && classes != in.K) out.d_weight = out.d_weight.narrow(0, 0, in.K);
  out.d_bias = gradient(in.wanted[2], {in.K});
  return out;
}

HeadDeviationResult head_deviation_loss_cuda(
    const at::Tensor& features, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& labels, const std::optional<at::Tensor>& weight0,
    const std::optional<at::Tensor>& class_weight, const std::optional<at::Tensor>& row_grad,
    const std::optional<at::Tensor>& weight_scale, const std::optional<at::Tensor>& alpha_scale,
    double alpha, std::string_view reduction, double label_smoothing, int64_t ignore_index,
    std::array<bool, 3> output_mask) {
  const HeadDeviationArguments arguments{
      features,     weight,      bias,  labels,    weight0,         class_weight, row_grad,
      weight_scale, alpha_scale, alpha, reduction, label_smoothing, ignore_index, output_mask};
  check_head_deviation_loss(arguments);
  TORCH_CHECK_VALUE(weight.size(0) < Softmax<float>::kNowhere,
                    "head_deviation_loss: weight must have fewer than 2**31 rows on CUDA, got ",
                    weight.size(0));
  const DeviceGuard guard(features.device());
  // The products below are neither recorded for autograd nor cast by autocast.
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);

  const HeadInputs in = take_inputs(arguments);
  const bool few = in.K <= std::min<int64_t>(head_limits.few_classes, GridShape::kClasses) &&
                   in.B <= head_limits.few_rows && in.B * in.D * in.K <= head_limits.few_products;
  const HeadOutputs out = make_outputs(in, few ? in.K : product_classes(in));
  few ? head_of_few_classes(in, out) : head_of_many_classes(in, out);
  return {out.loss,    out.cross_entropy, out.penalty,  out.correct,
          out.invalid, out.d_features,    out.d_weight, out.d_bias};
}

}  // namespace

void head_of_few_classes(const HeadInputs& in, const HeadOutputs& out) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.features.scalar_type(),
                                  "head_deviation_loss", [&] {
                                    if (in.weight.scalar_type() == in.features.scalar_type()) {
                                      few_classes<scalar_t, scalar_t>(in, out);
                                    } else {
                                      few_classes<scalar_t, compute_of<scalar_t>>(in, out);
                                    }
                                  });
}

TORCH_LIBRARY_IMPL(fst_fast_native, CUDA, m) {
  m.impl("head_deviation_loss", &head_deviation_loss_cuda);
}

}  // namespace fst_fast
