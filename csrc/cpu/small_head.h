// Included once per instruction set, after softmax.h; see vector.h.

namespace fst_fast::FST_FAST_ISA {

// Classes whose sums are kept in registers together, for four rows each.
constexpr int kGroup = 6;

// Calls body(first class, std::integral_constant<int, classes>) for groups of nearly equal size.
template <typename Body>
FST_FAST_INLINE inline void for_each_group(int64_t K, const Body& body) {
  const int64_t groups = (K + kGroup - 1) / kGroup;
  for (int64_t group = 0, k = 0; group < groups; ++group) {
    const int64_t size = K / groups + (group < K % groups ? 1 : 0);
    if (size == 1) body(k, std::integral_constant<int, 1>());
    if (size == 2) body(k, std::integral_constant<int, 2>());
    if (size == 3) body(k, std::integral_constant<int, 3>());
    if (size == 4) body(k, std::integral_constant<int, 4>());
    if (size == 5) body(k, std::integral_constant<int, 5>());
    if (size == 6) body(k, std::integral_constant<int, 6>());
    k += size;
  }
}

// The sums of four vectors.
template <typename V>
FST_FAST_INLINE inline void store_sums(const typename V::reg* r, typename V::scalar* to) {
  for (int i = 0; i < 4; ++i) to[i] = sum_lanes<V>(r[i], typename V::scalar(0));
}

#if FST_FAST_LEVEL == 2
template <>
FST_FAST_INLINE inline void store_sums<Vector<float>>(const __m512* r, float* to) {
  const __m512d low = _mm512_castps_pd(
      _mm512_add_ps(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1])));
  const __m512d high = _mm512_castps_pd(
      _mm512_add_ps(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3])));
  const __m512 fours = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps(fours, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#endif

// Logits of four rows and `classes` classes.
template <typename T, int classes>
void small_products(const T* const* x, const T* w, int64_t D, T* z) {
  using V = Vector<T>;
  typename V::reg sums[classes][4];
#pragma GCC unroll 6
  for (int k = 0; k < classes; ++k) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[k][i] = V::set(0);
  }
  const auto advance = [&](int64_t d, auto load) FST_FAST_INLINE {
    typename V::reg rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) rows[i] = load(x[i] + d);
#pragma GCC unroll 6
    for (int k = 0; k < classes; ++k) {
      const auto column = load(w + k * D + d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[k][i] = V::fma(rows[i], column, sums[k][i]);
    }
  };
  int64_t d = 0;
  for (; d + V::kWidth <= D; d += V::kWidth) {
    advance(d, [&](const T* p) FST_FAST_INLINE { return V::load(p); });
  }
  if (d < D) advance(d, [&](const T* p) FST_FAST_INLINE { return V::load(p, D - d); });
#pragma GCC unroll 6
  for (int k = 0; k < classes; ++k) store_sums<V>(sums[k], z + k * kSmallRows);
}

template <typename T>
void small_logits(const SmallHead<T>& s) {
  for (int64_t row = 0; row < s.rows; row += 4) {
    const T* x[4];
    for (int64_t i = 0; i < 4; ++i) x[i] = s.x + std::min(row + i, s.rows - 1) * s.D;
    for_each_group(s.K, [&](int64_t k, auto classes) FST_FAST_INLINE {
      small_products<T, classes.value>(x, s.w + k * s.D, s.D, s.z + k * kSmallRows + row);
    });
  }
}

// d_x of four rows: vectors at once of each, then what is left of them.
template <typename T, int vectors>
FST_FAST_INLINE inline void small_d_block(const SmallHead<T>& s, const int64_t* rows, int64_t d,
                                          int64_t n, T scale, T* d_x) {
  using V = Vector<T>;
  typename V::reg sums[4][vectors];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[i][v] = V::set(0);
  }
  for (int64_t k = 0; k < s.K; ++k) {
    const T* w = s.w + k * s.D + d;
    typename V::reg columns[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      columns[v] = vectors == 1 ? V::load(w, n) : V::load(w + v * V::kWidth);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto g = V::set(s.z[k * kSmallRows + rows[i]]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[i][v] = V::fma(g, columns[v], sums[i][v]);
    }
  }
  const auto factor = V::set(scale);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    T* to = d_x + rows[i] * s.D + d;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const auto sum = V::mul(sums[i][v], factor);
      if constexpr (vectors == 1) {
        V::store(to, sum, n);
      } else {
        V::store(to + v * V::kWidth, sum);
      }
    }
  }
}

template <typename T>
void small_d_features(const SmallHead<T>& s, T scale, T* d_x) {
  constexpr int64_t width = Vector<T>::kWidth;
  for (int64_t row = 0; row < s.rows; row += 4) {
    int64_t rows[4];
    for (int64_t i = 0; i < 4; ++i) rows[i] = std::min(row + i, s.rows - 1);
    int64_t d = 0;
    for (; d + 4 * width <= s.D; d += 4 * width) {
      small_d_block<T, 4>(s, rows, d, 0, scale, d_x);
    }
    for (; d < s.D; d += width) {
      small_d_block<T, 1>(s, rows, d, std::min(width, s.D - d), scale, d_x);
    }
  }
}

template <typename T, int classes, int vectors>
FST_FAST_INLINE inline void small_outer(const SmallHead<T>& s, const bool* skip, int64_t k,
                                        int64_t d, int64_t n, const T* addend, T factor, T* d_w) {
  using V = Vector<T>;
  typename V::reg sums[classes][vectors];
#pragma GCC unroll 6
  for (int i = 0; i < classes; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[i][v] = V::set(0);
  }
  for (int64_t row = 0; row < s.rows; ++row) {
    if (skip != nullptr && skip[row]) continue;
    const T* x = s.x + row * s.D + d;
    const T* g = s.z + k * kSmallRows + row;
    typename V::reg columns[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      columns[v] = vectors == 1 ? V::load(x, n) : V::load(x + v * V::kWidth);
    }
#pragma GCC unroll 6
    for (int i = 0; i < classes; ++i) {
      const auto scale = V::set(g[i * kSmallRows]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[i][v] = V::fma(scale, columns[v], sums[i][v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < classes; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = (k + i) * s.D + d + v * V::kWidth;
      const int64_t count = vectors == 1 ? n : V::kWidth;
      auto sum = sums[i][v];
      if (addend != nullptr) sum = V::fma(V::set(factor), V::load(addend + at, count), sum);
      V::store(d_w + at, sum, count);
    }
  }
}

template <typename T>
void small_d_weight(const SmallHead<T>& s, const bool* skip, int64_t begin, int64_t end,
                    const T* addend, T factor, T* d_w) {
  constexpr int64_t width = Vector<T>::kWidth;
  for_each_group(s.K, [&](int64_t k, auto classes) FST_FAST_INLINE {
    int64_t d = begin;
    for (; d + 4 * width <= end; d += 4 * width) {
      small_outer<T, classes.value, 4>(s, skip, k, d, 0, addend, factor, d_w);
    }
    for (; d < end; d += width) {
      const int64_t n = std::min(width, end - d);
      small_outer<T, classes.value, 1>(s, skip, k, d, n, addend, factor, d_w);
    }
  });
}

// softmax with a row per lane; the gradient of an ignored row is zero.
template <typename T>
void small_softmax_lanes(const Softmax<T>& s, int64_t row) {
  using V = Vector<T>;
  T* z = s.logits + row;
  auto most = V::set(-std::numeric_limits<T>::infinity());
  for (int64_t k = 0; k < s.K; ++k) {
    const auto offset = V::set(s.bias == nullptr ? T(0) : s.bias[k]);
    const auto logit = V::fma(V::set(s.scale), V::load(z + k * kSmallRows), offset);
    V::store(z + k * kSmallRows, logit);
    most = V::max(most, logit);
  }
  const int64_t rows = std::min<int64_t>(V::kWidth, s.rows - row);
  T mosts[V::kWidth], shifted[V::kWidth];
  V::store(mosts, most);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = s.labels[row + i];
    const bool ignored = label == s.ignore_index;
    s.hits[row + i] = !ignored && is_hit(z + i, kSmallRows, s.K, label, mosts[i]);
    shifted[i] = ignored ? T(0) : z[label * kSmallRows + i] - mosts[i];
  }
  auto sums = V::set(0), weighted = V::set(0);
  for (int64_t k = 0; k < s.K; ++k) {
    const auto difference = V::sub(V::load(z + k * kSmallRows), most);
    const auto e = V::exp(difference);
    V::store(z + k * kSmallRows, e);
    sums = V::add(sums, e);
    if (s.smoothing == 0) continue;
    const auto weight = V::set(s.class_weight == nullptr ? T(1) : s.class_weight[k]);
    weighted = V::fma(weight, difference, weighted);
  }
  T all_sums[V::kWidth], all_weighted[V::kWidth], factors[V::kWidth] = {}, shares[V::kWidth] = {};
  T label_terms[V::kWidth] = {};
  V::store(all_sums, sums);
  V::store(all_weighted, weighted);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = s.labels[row + i];
    s.losses[row + i] = 0;
    if (label == s.ignore_index) continue;
    const T scale = s.row_scale[row + i];
    const auto terms = row_terms(s, label, scale, shifted[i], {all_sums[i], all_weighted[i]});
    s.losses[row + i] = terms.loss;
    factors[i] = terms.factor;
    shares[i] = terms.share;
    label_terms[i] = terms.label_weight * scale;
  }
  if (!s.gradient) return;
  for (int64_t k = 0; k < s.K; ++k) {
    const auto weight = V::set(s.class_weight == nullptr ? T(1) : s.class_weight[k]);
    auto g = V::mul(V::load(z + k * kSmallRows), V::load(factors));
    if (s.smoothing != 0) g = V::sub(g, V::mul(weight, V::load(shares)));
    V::store(z + k * kSmallRows, g);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = s.labels[row + i];
    if (label != s.ignore_index) {
      z[label * kSmallRows + i] -= label_terms[i];
      continue;
    }
    for (int64_t k = 0; k < s.K; ++k) z[k * kSmallRows + i] = 0;
  }
}

template <typename T>
void small_softmax(const Softmax<T>& s) {
  for (int64_t row = 0; row < s.rows; row += Vector<T>::kWidth) small_softmax_lanes(s, row);
}

}  // namespace fst_fast::FST_FAST_ISA
