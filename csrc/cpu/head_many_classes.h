#pragma once

#include "head_problem.h"

namespace fst_fast {

// Any number of classes: three matrix products and a softmax for as many rows at a time as leave
// the logits small.
template <typename compute_t>
class ManyClasses {
 public:
  explicit ManyClasses(const HeadProblem<compute_t>& problem) : p(problem) {
    if constexpr (std::is_same_v<compute_t, float>) {
      const auto pairs = gemm_bfloat16();
      if (p.features_type == Element::kBFloat16 && pairs != nullptr) gemm_ = pairs;
    }
    const int64_t fit = kLogitsBytes / static_cast<int64_t>(p.K * sizeof(compute_t));
    rows_ = std::min(p.B, std::max(fit / kRowUnit, int64_t(1)) * kRowUnit);
    logits_ = arena_.take<compute_t>(rows_ * p.K);
    const bool copy_x = p.features_type != kCompute && p.d_features != nullptr;
    d_x_copy_ = copy_x ? arena_.take<compute_t>(rows_ * p.D) : nullptr;
    const bool copy_w = p.weight_type != kCompute && p.d_weight != nullptr;
    d_w_copy_ = copy_w ? arena_.take<compute_t>(p.K * p.D) : nullptr;
    scratch_size_ = gemm_scratch(std::max(p.K, p.D), std::max({p.K, p.D, rows_}));
    scratch_ = arena_.take<compute_t>(at::get_num_threads() * scratch_size_);
  }

  void run() {
    for (int64_t row = 0; row < p.B; row += rows_) {
      const int64_t rows = std::min(rows_, p.B - row);
      logits(row, rows);
      softmax(row, rows);
      if (p.d_features != nullptr) d_features(row, rows);
      if (p.d_weight != nullptr) d_weight(row, rows);
      if (p.d_bias != nullptr) d_bias(rows);
    }
    if (d_w_copy_ != nullptr) {
      narrow_rows(p.weight_type, d_w_copy_, compute_t(1), p.weight0, p.share, p.d_weight, p.K, p.D);
    }
  }

 private:
  static constexpr Element kCompute = compute_element<compute_t>;
  // Above a core's caches, so that the weight is read and d_weight updated for many rows at once.
  static constexpr int64_t kLogitsBytes = 48 << 20;
  static constexpr int64_t kRowUnit = 24;  // whole panels of the micro-kernels

  Operand features(int64_t row, bool depth_contiguous) const {
    return {advance(p.features, p.features_type, row * p.D), p.features_type, p.D,
            depth_contiguous};
  }

  void logits(int64_t row, int64_t rows) {
    // A scaled weight gets its bias when it is scaled: in the softmax.
    const auto* bias = p.scale == 1 ? p.bias : nullptr;
    multiply({features(row, true),
              {p.weight, p.weight_type, p.D, true},
              logits_,
              p.K,
              bias,
              0,
              1,
              rows,
              p.K,
              p.D});
  }

  void softmax(int64_t row, int64_t rows) {
    at::parallel_for(0, rows, grain(32.0 * p.K), [&](int64_t begin, int64_t end) {
      auto part = p.softmax(logits_ + begin * p.K, row + begin, end - begin);
      if (p.scale == 1) part.bias = nullptr;
      kernels_.softmax(part);
    });
  }

  void d_features(int64_t row, int64_t rows) {
    auto* to = advance(p.d_features, p.features_type, row * p.D);
    auto* sums = d_x_copy_ != nullptr ? d_x_copy_ : static_cast<compute_t*>(to);
    multiply({{logits_, kCompute, p.K, true},
              {p.weight, p.weight_type, p.D, false},
              sums,
              p.D,
              nullptr,
              0,
              0,
              rows,
              p.D,
              p.K});
    if (d_x_copy_ != nullptr || p.scale != 1) {
      narrow_rows<compute_t>(p.features_type, sums, p.scale, nullptr, 0, to, rows, p.D);
    }
  }

  void d_weight(int64_t row, int64_t rows) {
    auto* sums = d_w_copy_ != nullptr ? d_w_copy_ : static_cast<compute_t*>(p.d_weight);
    const bool last = row + rows == p.B && d_w_copy_ == nullptr;
    auto x = features(row, false);
    x.skip = p.skip == nullptr ? nullptr : p.skip + row;
    multiply({{logits_, kCompute, p.K, false},
              x,
              sums,
              p.D,
              last ? static_cast<const compute_t*>(p.weight0) : nullptr,
              p.D,
              p.share,
              p.K,
              p.D,
              rows,
              row > 0});
  }

  void d_bias(int64_t rows) {
    at::parallel_for(0, p.K, std::max<int64_t>(256, grain(2.0 * rows)), [&](int64_t b, int64_t e) {
      kernels_.add_rows(logits_ + b, rows, p.K, e - b, p.d_bias + b);
    });
  }

  // Divides the rows or the columns of c among the threads.
  void multiply(const Gemm<compute_t>& g) {
    const double operations = 2.0 * g.M * g.N * g.depth;
    const int64_t most = static_cast<int64_t>(operations / kGrainOperations);
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), most));
    const bool by_rows = cost(g.M, kRowUnit / 6, threads) < cost(g.N, 16, threads);
    const int64_t length = by_rows ? g.M : g.N;
    const int64_t part = share(length, by_rows ? kRowUnit / 6 : 16, threads);
    at::parallel_for(0, (length + part - 1) / part, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t count = std::min(part, length - i * part);
        gemm_(by_rows ? rows_of(g, i * part, count) : columns_of(g, i * part, count),
              scratch_ + i * scratch_size_);
      }
    });
  }

  static int64_t share(int64_t length, int64_t unit, int64_t threads) {
    const int64_t units = (length + unit - 1) / unit;
    return (units + threads - 1) / threads * unit;
  }

  // Time by the largest part; what each thread packs for itself counts as 8 more rows or columns.
  static double cost(int64_t length, int64_t unit, int64_t threads) {
    return (share(length, unit, threads) * threads + 8.0 * (threads - 1)) / length;
  }

  static Gemm<compute_t> rows_of(Gemm<compute_t> g, int64_t first, int64_t count) {
    shift(g.a, first);
    g.c += first * g.c_stride;
    if (g.addend != nullptr) g.addend += first * g.addend_stride;
    g.M = count;
    return g;
  }

  static Gemm<compute_t> columns_of(Gemm<compute_t> g, int64_t first, int64_t count) {
    shift(g.b, first);
    g.c += first;
    if (g.addend != nullptr) g.addend += first;
    g.N = count;
    return g;
  }

  static void shift(Operand& operand, int64_t first) {
    const int64_t elements = operand.depth_contiguous ? first * operand.stride : first;
    operand.data = advance(operand.data, operand.type, elements);
  }

  const HeadProblem<compute_t>& p;
  const HeadKernels<compute_t>& kernels_ = head_kernels<compute_t>();
  void (*gemm_)(const Gemm<compute_t>&, compute_t*) = kernels_.gemm;
  Arena arena_;
  int64_t rows_, scratch_size_;
  compute_t* logits_;
  compute_t* d_x_copy_;
  compute_t* d_w_copy_;
  compute_t* scratch_;
};

}  // namespace fst_fast
