// Included once per instruction set, after vector.h; see there.

namespace fst_fast::FST_FAST_ISA {

// Lanes added in a fixed order.
template <typename V, typename T>
FST_FAST_INLINE inline T sum_lanes(typename V::reg r, T) {
  T all[V::kWidth];
  V::store(all, r);
  for (int half = V::kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) all[i] += all[i + half];
  }
  return all[0];
}

template <typename T>
T largest(const T* z, int64_t K) {
  using V = Vector<T>;
  auto lanes = V::set(-std::numeric_limits<T>::infinity()), others = lanes;
  int64_t k = 0;
  for (; k + 2 * V::kWidth <= K; k += 2 * V::kWidth) {
    lanes = V::max(lanes, V::load(z + k));
    others = V::max(others, V::load(z + k + V::kWidth));
  }
  T all[V::kWidth];
  V::store(all, V::max(lanes, others));
  T most = all[0];
  for (const T x : all) most = x > most ? x : most;
  for (; k < K; ++k) most = z[k] > most ? z[k] : most;
  return most;
}

// Is the labelled logit the first of the largest, and none a NaN?
template <typename T>
bool is_hit(const T* z, int64_t stride, int64_t K, int64_t label, T most) {
  if (z[label * stride] != most) return false;
  int wrong = 0;
  for (int64_t k = 0; k < K; ++k) wrong |= z[k * stride] != z[k * stride];
  for (int64_t k = 0; k < label; ++k) wrong |= z[k * stride] == most;
  return wrong == 0;
}

template <typename T>
struct Sums {
  T exp;       // sum of exp(z - most)
  T weighted;  // sum of class_weight * (z - most)
};

// z = exp(z - most).
template <typename T>
Sums<T> exponentials(const Softmax<T>& s, T* z, T most) {
  using V = Vector<T>;
  const bool smoothing = s.smoothing != 0;
  auto sums = V::set(0), weighted = V::set(0);
  for (int64_t k = 0; k < s.K; k += V::kWidth) {
    const int64_t n = s.K - k;
    const bool whole = n >= V::kWidth;
    const auto shifted = V::sub(whole ? V::load(z + k) : V::load(z + k, n), V::set(most));
    const auto e = V::exp(shifted);
    if (whole) {
      V::store(z + k, e);
      sums = V::add(sums, e);
    } else {
      V::store(z + k, e, n);
      sums = V::add(sums, V::load(z + k, n));
    }
    if (!smoothing) continue;
    T terms[V::kWidth];
    V::store(terms, shifted);
    for (int64_t i = n; i < V::kWidth; ++i) terms[i] = 0;
    auto weight = V::set(1);
    if (s.class_weight != nullptr) {
      weight = whole ? V::load(s.class_weight + k) : V::load(s.class_weight + k, n);
    }
    weighted = V::fma(weight, V::load(terms), weighted);
  }
  return {sum_lanes<V>(sums, T(0)), smoothing ? sum_lanes<V>(weighted, T(0)) : T(0)};
}

// z = z * factor - share * class_weight
template <typename T>
void scale_row(const Softmax<T>& s, T* z, T factor, T share) {
  using V = Vector<T>;
  for (int64_t k = 0; k < s.K; k += V::kWidth) {
    const int64_t n = s.K - k;
    const bool whole = n >= V::kWidth;
    auto g = V::mul(whole ? V::load(z + k) : V::load(z + k, n), V::set(factor));
    if (s.smoothing != 0) {
      auto weight = V::set(1);
      if (s.class_weight != nullptr) {
        weight = whole ? V::load(s.class_weight + k) : V::load(s.class_weight + k, n);
      }
      g = V::fma(V::set(-share), weight, g);
    }
    if (whole) {
      V::store(z + k, g);
    } else {
      V::store(z + k, g, n);
    }
  }
}

template <typename T>
void offset_row(const Softmax<T>& s, T* z) {
  using V = Vector<T>;
  for (int64_t k = 0; k < s.K; k += V::kWidth) {
    const int64_t n = s.K - k;
    const auto offset = s.bias == nullptr ? V::set(0) : V::load(s.bias + k, n);
    V::store(z + k, V::fma(V::set(s.scale), V::load(z + k, n), offset), n);
  }
}

template <typename T>
struct RowTerms {
  T label_weight;  // of the labelled class, less what smoothing takes
  T loss;
  T factor;  // of the exponentials, in the gradient
  T share;   // of the class weights, in the gradient
};

template <typename T>
FST_FAST_INLINE inline RowTerms<T> row_terms(const Softmax<T>& s, int64_t label, T row_scale,
                                             T shifted, Sums<T> sums) {
  const T part = s.smoothing / T(s.K);
  const T weight = s.class_weight == nullptr ? T(1) : s.class_weight[label];
  const T label_weight = (1 - s.smoothing) * weight;
  const T log_sum = std::log(sums.exp);
  T loss = -label_weight * (shifted - log_sum);
  T total = label_weight;
  if (s.smoothing != 0) {
    loss -= part * (sums.weighted - s.class_weight_sum * log_sum);
    total += part * s.class_weight_sum;
  }
  return {label_weight, loss, total * row_scale / sums.exp, part * row_scale};
}

template <typename T>
void softmax(const Softmax<T>& s) {
  for (int64_t row = 0; row < s.rows; ++row) {
    T* z = s.logits + row * s.K;
    const int64_t label = s.labels[row];
    if (label == s.ignore_index) {
      s.losses[row] = 0;
      s.hits[row] = false;
      if (s.gradient) std::memset(z, 0, s.K * sizeof(T));
      continue;
    }
    if (s.scale != 1 || s.bias != nullptr) offset_row(s, z);
    const T most = largest(z, s.K);
    s.hits[row] = is_hit(z, 1, s.K, label, most);
    const T shifted = z[label] - most;
    const auto sums = exponentials(s, z, most);
    const auto terms = row_terms(s, label, s.row_scale[row], shifted, sums);
    s.losses[row] = terms.loss;
    if (!s.gradient) continue;
    scale_row(s, z, terms.factor, terms.share);
    z[label] -= terms.label_weight * s.row_scale[row];
  }
}

}  // namespace fst_fast::FST_FAST_ISA
