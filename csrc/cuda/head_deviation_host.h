#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>

#include "../head_deviation_loss.h"
#include "head_deviation_row.cuh"

// The host side that heads of few and of many classes share.
namespace fst_fast {

// The arguments as kernels take them: contiguous, and undefined where there is none.
struct HeadInputs {
  at::Tensor features, weight, bias, labels, weight0, class_weight, row_grad, weight_scale,
      alpha_scale;
  double alpha;
  double label_smoothing;
  int64_t ignore_index;
  Reduction reduction;
  std::array<bool, 3> wanted;  // d_features, d_weight, d_bias
  int64_t B, D, K;
};

struct HeadOutputs {
  at::Tensor loss, cross_entropy, penalty, correct, invalid, d_features, d_weight, d_bias;
};

// Where the choice between the kernels lies. Variables, so that tests reach all with small heads.
struct HeadLimits {
  int64_t few_classes = 256;       // at most 256
  int64_t few_rows = 1024;         // of a head of few classes: every block reads all labels
  int64_t few_products = 1 << 22;  // B * D * K, above which cuBLAS wins
  // B * D * K, above which more multiprocessors win over a cluster's faster barrier.
  int64_t cluster_products = 1 << 21;
  int64_t logits_bytes = 64 << 20;  // memory for logits, even where it is over a quarter of them
  int64_t chunk_rows = 128;         // a chunk of rows is a multiple of this
};
inline HeadLimits head_limits;

void head_of_few_classes(const HeadInputs& in, const HeadOutputs& out);
void head_of_many_classes(const HeadInputs& in, const HeadOutputs& out);

inline int64_t rounded_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The classes of a head of many as its products see them: of 16-bit types cuBLAS multiplies several
// times as slowly where their number is odd, so up to 7 of weight 0 are added.
inline int64_t product_classes(const HeadInputs& in) {
  return c10::elementSize(in.features.scalar_type()) == 2 ? rounded_up(in.K, 8) : in.K;
}

template <typename value_t>
const value_t* read(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<value_t>() : nullptr;
}

// Null for a gradient that is not wanted.
template <typename value_t>
value_t* write(const at::Tensor& tensor) {
  return tensor.numel() > 0 ? tensor.mutable_data_ptr<value_t>() : nullptr;
}

template <typename compute_t>
LossTerms<compute_t> loss_terms(const HeadInputs& in) {
  LossTerms<compute_t> terms{};
  terms.labels = read<int64_t>(in.labels);
  terms.class_weight = read<compute_t>(in.class_weight);
  terms.row_grad = read<compute_t>(in.row_grad);
  terms.label_smoothing = static_cast<compute_t>(in.label_smoothing);
  terms.ignore_index = in.ignore_index;
  terms.rows = in.B;
  terms.classes = in.K;
  terms.reduction = in.reduction;
  return terms;
}

// Whether all move in packs of `elements` of their own dtype: rows of D, each 16 bytes aligned.
inline bool packs_fit(std::initializer_list<at::Tensor> tensors, int64_t elements) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& tensor) {
    return !tensor.defined() || tensor.numel() == 0 ||
           (tensor.size(-1) % elements == 0 &&
            reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0);
  });
}

}  // namespace fst_fast
