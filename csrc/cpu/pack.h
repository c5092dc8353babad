// Included once per instruction set, after vector.h; see there.

namespace fst_fast::FST_FAST_ISA {

// A transposed block of words, through memory where there is nothing better.
template <typename V>
FST_FAST_INLINE inline void transpose(typename V::reg* r) {
  constexpr int n = V::kWidth;
  typename V::scalar from[n][n], to[n];
  for (int i = 0; i < n; ++i) V::store(from[i], r[i]);
  for (int j = 0; j < n; ++j) {
    for (int i = 0; i < n; ++i) to[i] = from[i][j];
    r[j] = V::load(to);
  }
}

#if FST_FAST_LEVEL == 1
template <>
FST_FAST_INLINE inline void transpose<Vector<float>>(__m256* r) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif

#if FST_FAST_LEVEL == 2
template <>
FST_FAST_INLINE inline void transpose<Vector<float>>(__m512* r) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  // r[4 a + b] holds, in its lane l of 128 bits, column 4 l + b of rows 4 a to 4 a + 3.
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    t[b] = _mm512_shuffle_f32x4(r[b], r[4 + b], 0x88);
    t[4 + b] = _mm512_shuffle_f32x4(r[b], r[4 + b], 0xdd);
    t[8 + b] = _mm512_shuffle_f32x4(r[8 + b], r[12 + b], 0x88);
    t[12 + b] = _mm512_shuffle_f32x4(r[8 + b], r[12 + b], 0xdd);
  }
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    r[b] = _mm512_shuffle_f32x4(t[b], t[8 + b], 0x88);
    r[8 + b] = _mm512_shuffle_f32x4(t[b], t[8 + b], 0xdd);
    r[4 + b] = _mm512_shuffle_f32x4(t[4 + b], t[12 + b], 0x88);
    r[12 + b] = _mm512_shuffle_f32x4(t[4 + b], t[12 + b], 0xdd);
  }
}
#endif

// One element of a sum per word, multiplied and added in compute_t.
template <typename compute_t>
struct Single {
  using V = Vector<compute_t>;
  using reg = typename V::reg;
  using word_t = compute_t;
  static constexpr int kDepth = 1;

  // Words along a row, zeros past its end.
  template <typename S>
  static FST_FAST_INLINE reg along(const S* row, int64_t n) {
    return n >= V::kWidth ? V::load(row) : V::load(row, n);
  }

  // The word of each of n neighbouring columns.
  template <typename S>
  static FST_FAST_INLINE reg across(const S* p, int64_t, int64_t, const bool* skip, int64_t n) {
    if (skip != nullptr && *skip) return V::set(0);
    return n >= V::kWidth ? V::load(p) : V::load(p, n);
  }

  static FST_FAST_INLINE reg dot(reg a, reg b, reg c) { return V::fma(a, b, c); }
};

#ifdef FST_FAST_PAIRS
// Two neighbours of a sum per word, in bfloat16; products are added in float32.
struct Pairs {
  using V = Vector<float>;
  using reg = __m512;
  using word_t = float;
  static constexpr int kDepth = 2;

  static FST_FAST_INLINE __mmask32 mask(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }
  static FST_FAST_INLINE reg along(const BFloat16* row, int64_t n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask(n), row));
  }
  static FST_FAST_INLINE reg along(const float* row, int64_t n) {
    const reg low = V::load(row, n);
    const reg high = n > 16 ? V::load(row + 16, n - 16) : V::set(0);
    return reg(_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low)));
  }
  static FST_FAST_INLINE __m256i half(const BFloat16* p, int64_t n) { return V::half(p, n); }
  static FST_FAST_INLINE __m256i half(const float* p, int64_t n) {
    return (__m256i)_mm512_cvtneps_pbh(V::load(p, n));
  }
  template <typename S>
  static FST_FAST_INLINE reg across(const S* p, int64_t stride, int64_t depth, const bool* skip,
                                    int64_t n) {
    const __m256i zero = _mm256_setzero_si256();
    const bool first = skip == nullptr || !skip[0];
    const bool second = depth > 1 && (skip == nullptr || !skip[1]);
    const __m512i low = _mm512_cvtepu16_epi32(first ? half(p, n) : zero);
    const __m512i high = _mm512_cvtepu16_epi32(second ? half(p + stride, n) : zero);
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static FST_FAST_INLINE reg dot(reg a, reg b, reg c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// A panel holds `lanes` neighbouring rows of a or columns of b, word by word of the depth, so that
// the micro-kernel reads it front to back. Lanes past `valid` are zeros or, past the panel's width,
// overwritten by the next word: a panel needs a vector of slack behind it.
template <typename Dot, typename S>
void pack_along(const S* from, int64_t stride, int64_t valid, int64_t depth, int lanes,
                typename Dot::word_t* to) {
  using V = typename Dot::V;
  constexpr int width = V::kWidth;
  const int64_t words = (depth + Dot::kDepth - 1) / Dot::kDepth;
  for (int lane = 0; lane < lanes; lane += width) {
    for (int64_t word = 0; word < words; word += width) {
      typename V::reg r[width];
      const int64_t begin = word * Dot::kDepth;
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) {
        const bool some = lane + i < valid && lane + i < lanes;
        r[i] = some ? Dot::along(from + (lane + i) * stride + begin, depth - begin) : V::set(0);
      }
      transpose<V>(r);
      const int64_t count = std::min<int64_t>(width, words - word);
      for (int i = 0; i < count; ++i) V::store(to + (word + i) * lanes + lane, r[i]);
    }
  }
}

template <typename Dot, typename S>
void pack_across(const S* from, int64_t stride, int64_t valid, int64_t depth, const bool* skip,
                 int lanes, typename Dot::word_t* to) {
  using V = typename Dot::V;
  for (int64_t begin = 0; begin < depth; begin += Dot::kDepth) {
    for (int lane = 0; lane < lanes; lane += V::kWidth) {
      const int64_t n = std::max<int64_t>(valid - lane, 0);
      V::store(to + lane, Dot::across(from + begin * stride + lane, stride, depth - begin,
                                      skip == nullptr ? nullptr : skip + begin, n));
    }
    to += lanes;
  }
}

// Lanes [first, first + valid) over [begin, begin + depth) of an operand.
template <typename Dot, typename S>
void pack_as(const Operand& operand, int64_t first, int64_t valid, int64_t begin, int64_t depth,
             int lanes, typename Dot::word_t* to) {
  const auto* from = static_cast<const S*>(operand.data);
  if (operand.depth_contiguous) {
    from += first * operand.stride + begin;
    pack_along<Dot>(from, operand.stride, valid, depth, lanes, to);
  } else {
    from += begin * operand.stride + first;
    const bool* skip = operand.skip == nullptr ? nullptr : operand.skip + begin;
    pack_across<Dot>(from, operand.stride, valid, depth, skip, lanes, to);
  }
}

}  // namespace fst_fast::FST_FAST_ISA
