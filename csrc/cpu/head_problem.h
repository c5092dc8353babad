#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "head_kernels.h"

namespace fst_fast {

// Memory for one call: many small pieces out of few tensors.
class Arena {
 public:
  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    if (bytes > left_) {
      left_ = std::max<int64_t>(bytes, 1 << 16);
      tensors_.push_back(at::empty({left_}, at::kByte));
      next_ = static_cast<char*>(tensors_.back().mutable_data_ptr());
    }
    auto* piece = reinterpret_cast<T*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return piece;
  }

 private:
  std::vector<at::Tensor> tensors_;
  char* next_ = nullptr;
  int64_t left_ = 0;
};

// What both ways to compute the loss work on. Matrices are contiguous.
template <typename compute_t>
struct HeadProblem {
  int64_t B, D, K;
  Element features_type, weight_type;
  const void* features;
  const void* weight;
  const void* weight0;  // null unless the penalty counts
  compute_t share;      // of weight0 in d_weight
  compute_t scale;      // of weight
  const compute_t* bias;
  const compute_t* class_weight;
  compute_t class_weight_sum, smoothing;
  const int64_t* labels;
  int64_t ignore_index;
  const compute_t* row_scale;
  const bool* skip;  // [B], or null if no row is ignored
  compute_t* losses;
  bool* hits;
  // Null if not asked for.
  void* d_features;
  void* d_weight;
  double* d_bias;

  bool gradient() const {
    return d_features != nullptr || d_weight != nullptr || d_bias != nullptr;
  }

  Softmax<compute_t> softmax(compute_t* logits, int64_t row, int64_t rows) const {
    return {logits,
            rows,
            K,
            scale,
            bias,
            class_weight,
            class_weight_sum,
            smoothing,
            labels + row,
            row_scale + row,
            ignore_index,
            gradient(),
            losses + row,
            hits + row};
  }
};

inline int64_t element_size(Element type) {
  return type == Element::kDouble ? 8 : type == Element::kFloat ? 4 : 2;
}

inline const void* advance(const void* data, Element type, int64_t count) {
  return static_cast<const char*>(data) + count * element_size(type);
}
inline void* advance(void* data, Element type, int64_t count) {
  return static_cast<char*>(data) + count * element_size(type);
}

template <typename compute_t>
constexpr Element compute_element = sizeof(compute_t) == 8 ? Element::kDouble : Element::kFloat;

// Below this many operations per thread, waking one costs more than it saves.
constexpr double kGrainOperations = 1 << 19;

inline int64_t grain(double operations_each) {
  return std::max<int64_t>(1, static_cast<int64_t>(kGrainOperations / operations_each));
}

template <typename compute_t>
void narrow_rows(Element type, const compute_t* from, compute_t scale, const void* addend,
                 compute_t factor, void* to, int64_t rows, int64_t columns) {
  const auto& kernels = head_kernels<compute_t>();
  at::parallel_for(0, rows, grain(8.0 * columns), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * columns;
    kernels.narrow(type, from + first, scale,
                   addend == nullptr ? nullptr : advance(addend, type, first), factor,
                   advance(to, type, first), (end - begin) * columns);
  });
}

}  // namespace fst_fast
