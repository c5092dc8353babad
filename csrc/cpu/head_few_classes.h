#pragma once

#include "head_problem.h"

namespace fst_fast {

// At most kSmallClasses classes: blocks of kSmallRows rows go through logits, softmax and
// d_features while they are in the cache; then d_weight, by columns, adds the blocks up in order.
template <typename compute_t>
class FewClasses {
 public:
  explicit FewClasses(const HeadProblem<compute_t>& problem) : p(problem) {
    const auto compute = compute_element<compute_t>;
    rows_ = std::min(p.B, kRowsAtATime);
    z_ = arena_.take<compute_t>((rows_ + kSmallRows - 1) / kSmallRows * p.K * kSmallRows);
    w_ = static_cast<const compute_t*>(p.weight);
    w0_ = static_cast<const compute_t*>(p.weight0);
    d_w_ = static_cast<compute_t*>(p.d_weight);
    if (p.weight_type != compute) {
      w_ = widen(p.weight);
      if (p.weight0 != nullptr) w0_ = widen(p.weight0);
      if (p.d_weight != nullptr) d_w_ = arena_.take<compute_t>(p.K * p.D);
    }
    if (p.features_type != compute) {
      x_copy_ = arena_.take<compute_t>(rows_ * p.D);
      d_x_copy_ = arena_.take<compute_t>(rows_ * p.D);
    }
  }

  void run() {
    for (int64_t row = 0; row < p.B; row += rows_) run_rows(row, std::min(rows_, p.B - row));
    if (p.d_weight != nullptr && static_cast<void*>(d_w_) != p.d_weight) {
      kernels_.narrow(p.weight_type, d_w_, 1, nullptr, 0, p.d_weight, p.K * p.D);
    }
  }

 private:
  // Enough for many threads; few enough for their gradients to stay in the cache.
  static constexpr int64_t kRowsAtATime = 2048;
  static constexpr int64_t kColumns = 64;

  const compute_t* widen(const void* from) {
    auto* to = arena_.take<compute_t>(p.K * p.D);
    kernels_.widen(p.weight_type, from, to, p.K * p.D);
    return to;
  }

  SmallHead<compute_t> block(int64_t first, int64_t rows, int64_t index) const {
    const int64_t at = index * kSmallRows;
    const auto* x = x_copy_ != nullptr
                        ? x_copy_ + at * p.D
                        : static_cast<const compute_t*>(p.features) + (first + at) * p.D;
    return {x, w_, z_ + at * p.K, std::min(kSmallRows, rows - at), p.K, p.D};
  }

  void run_rows(int64_t first, int64_t rows) {
    const int64_t blocks = (rows + kSmallRows - 1) / kSmallRows;
    at::parallel_for(0, blocks, grain(4.0 * kSmallRows * p.K * p.D), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) run_block(first + i * kSmallRows, block(first, rows, i));
    });
    if (p.d_weight != nullptr) {
      const int64_t strips = (p.D + kColumns - 1) / kColumns;
      at::parallel_for(0, strips, grain(2.0 * rows * p.K * kColumns), [&](int64_t b, int64_t e) {
        d_weight(first, rows, b * kColumns, std::min(e * kColumns, p.D));
      });
    }
    if (p.d_bias == nullptr) return;
    for (int64_t i = 0; i < blocks; ++i) {
      const auto s = block(first, rows, i);
      for (int64_t k = 0; k < p.K; ++k) p.d_bias[k] += sum(s.z + k * kSmallRows, s.rows);
    }
  }

  static double sum(const compute_t* z, int64_t count) {
    double sums[4] = {};
    for (int64_t i = 0; i < count; ++i) sums[i % 4] += z[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  void run_block(int64_t row, const SmallHead<compute_t>& s) {
    if (x_copy_ != nullptr) {
      kernels_.widen(p.features_type, advance(p.features, p.features_type, row * p.D),
                     const_cast<compute_t*>(s.x), s.rows * p.D);
    }
    kernels_.small_logits(s);
    kernels_.small_softmax(p.softmax(s.z, row, s.rows));
    if (p.d_features == nullptr) return;
    if (x_copy_ == nullptr) {
      auto* d_x = static_cast<compute_t*>(p.d_features) + row * p.D;
      return kernels_.small_d_features(s, p.scale, d_x);
    }
    auto* d_x = d_x_copy_ + (s.x - x_copy_);
    kernels_.small_d_features(s, p.scale, d_x);
    kernels_.narrow(p.features_type, d_x, 1, nullptr, 0,
                    advance(p.d_features, p.features_type, row * p.D), s.rows * p.D);
  }

  void d_weight(int64_t first, int64_t rows, int64_t begin, int64_t end) {
    for (int64_t at = 0; at < rows; at += kSmallRows) {
      const auto s = block(first, rows, at / kSmallRows);
      const bool start = first + at == 0;
      const auto* skip = p.skip == nullptr ? nullptr : p.skip + first + at;
      kernels_.small_d_weight(s, skip, begin, end, start ? w0_ : d_w_,
                              start ? p.share : compute_t(1), d_w_);
    }
  }

  const HeadProblem<compute_t>& p;
  const HeadKernels<compute_t>& kernels_ = head_kernels<compute_t>();
  Arena arena_;
  int64_t rows_;
  compute_t* z_;
  const compute_t* w_;
  const compute_t* w0_;
  compute_t* d_w_;
  compute_t* x_copy_ = nullptr;
  compute_t* d_x_copy_ = nullptr;
};

}  // namespace fst_fast
