#pragma once

#include <cmath>

#include "device.cuh"

// One row of logits: softmax, loss and gradient. No ATen and no CUDA host calls here.
namespace fst_fast {

enum class Reduction { mean, sum, none };

// What the loss of a row depends on, apart from its logits.
template <typename compute_t>
struct LossTerms {
  const int64_t* labels;          // [rows]
  const compute_t* class_weight;  // [classes]; null: ones
  const compute_t* row_grad;      // [rows]; null: ones
  compute_t label_smoothing;
  int64_t ignore_index;
  int64_t rows;
  int64_t classes;
  Reduction reduction;

  __device__ bool ignored(int64_t row) const { return labels[row] == ignore_index; }

  __device__ compute_t weight_of(int64_t k) const {
    return class_weight == nullptr ? compute_t(1) : class_weight[k];
  }
};

// A label, checked: nothing is read through one that is out of range.
template <typename compute_t>
struct Target {
  int64_t label;
  bool ignored;
  bool bad;
  compute_t weight;  // of the class; of class 0 for a bad label, as in the reference

  __device__ Target(const LossTerms<compute_t>& terms, int64_t given) {
    ignored = given == terms.ignore_index;
    bad = !ignored && (given < 0 || given >= terms.classes);
    label = bad || ignored ? 0 : given;
    weight = ignored ? compute_t(0) : terms.weight_of(label);
  }
};

// A maximum, where it first is, and the sum of exp(z - maximum), over some of a row's logits.
template <typename compute_t>
struct Softmax {
  static constexpr int kNowhere = 0x7fffffff;
  static constexpr int kNan = -1;

  compute_t largest = -INFINITY;
  compute_t sum = 0;
  int first = kNowhere;

  // Logits come in ascending order of k.
  __device__ void add(compute_t z, int k) {
    if (z > largest) {
      sum *= exp(largest - z);
      largest = z;
      if (first != kNan) first = k;
    } else if (z != z) {
      first = kNan;
    } else if (first == kNowhere) {
      first = k;
    }
    // While all are -inf the difference would be NaN.
    if (z != -INFINITY) sum += exp(z - largest);
  }

  __device__ void merge(compute_t other_largest, compute_t other_sum, int other_first) {
    const compute_t both = other_largest > largest ? other_largest : largest;
    const compute_t mine = largest == both ? compute_t(1) : exp(largest - both);
    const compute_t theirs = other_largest == both ? compute_t(1) : exp(other_largest - both);
    sum = sum * mine + other_sum * theirs;
    if (first == kNan || other_first == kNan) {
      first = kNan;
    } else if (other_largest == largest) {
      first = other_first < first ? other_first : first;
    } else if (other_largest > largest) {
      first = other_first;
    }
    largest = both;
  }

  // Not unrolled: a kernel that runs once pays more for the instructions than for the jumps.
  __device__ void merge_warp() {
#pragma unroll 1
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const compute_t other_largest = __shfl_xor_sync(kAllLanes, largest, offset);
      const compute_t other_sum = __shfl_xor_sync(kAllLanes, sum, offset);
      merge(other_largest, other_sum, __shfl_xor_sync(kAllLanes, first, offset));
    }
  }
};

// Loss and gradient of one row, once its softmax is known.
template <typename compute_t>
struct RowLoss {
  Target<compute_t> target;
  compute_t largest;
  compute_t log_sum;
  compute_t hit;     // share of the labelled class
  compute_t smooth;  // share of every class, before class_weight
  compute_t total;   // all shares
  compute_t scale;   // of the gradient
  bool correct;

  // scale: of every row's gradient; class_weights: their sum, needed with label smoothing only.
  __device__ RowLoss(const LossTerms<compute_t>& terms, int64_t row,
                     const Softmax<compute_t>& softmax, compute_t scale, compute_t class_weights)
      : target(terms, terms.labels[row]) {
    largest = softmax.largest;
    log_sum = log(softmax.sum);
    hit = (1 - terms.label_smoothing) * target.weight;
    smooth = terms.label_smoothing / static_cast<compute_t>(terms.classes);
    total = smooth > 0 ? hit + smooth * class_weights : hit;
    if (terms.row_grad != nullptr) scale *= terms.row_grad[row];
    this->scale = target.bad ? compute_t(NAN) : scale;
    correct = !target.ignored && !target.bad && softmax.first == target.label;
  }

  __device__ compute_t log_probability(compute_t z) const { return (z - largest) - log_sum; }

  __device__ compute_t gradient(const LossTerms<compute_t>& terms, compute_t log_p,
                                int64_t k) const {
    // Not a product with 0: an ignored row may hold NaN.
    if (target.ignored) return 0;
    compute_t d = exp(log_p) * total;
    if (k == target.label) d -= hit;
    if (smooth > 0) d -= smooth * terms.weight_of(k);
    return d * scale;
  }

  // smoothed: the sum of class_weight * log_p, needed with label smoothing only.
  __device__ compute_t loss(compute_t log_p_label, compute_t smoothed) const {
    if (target.ignored) return 0;
    if (target.bad) return NAN;
    const compute_t loss = -hit * log_p_label;
    return smooth > 0 ? loss - smooth * smoothed : loss;
  }
};

}  // namespace fst_fast
