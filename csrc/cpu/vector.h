// Included once per instruction set, within its namespace FST_FAST_ISA and its target options, so
// without a guard; FST_FAST_LEVEL is 0, 1 (AVX2) or 2 (AVX-512).

namespace fst_fast::FST_FAST_ISA {

// Any scalar, and as many as fill 16 bytes: what the compiler makes of plain loops.
template <typename T>
struct Vector {
  using scalar = T;
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kRows = 4;  // of the block that the micro-kernel keeps in registers
  struct reg {
    T v[kWidth];
  };
  template <typename F>
  static FST_FAST_INLINE reg make(const F& f) {
    reg r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = f(i);
    return r;
  }
  static FST_FAST_INLINE reg set(T x) {
    return make([&](int) { return x; });
  }
  template <typename S>
  static FST_FAST_INLINE reg load(const S* p) {
    return make([&](int i) { return widen_one<T>(p[i]); });
  }
  template <typename S>
  static FST_FAST_INLINE reg load(const S* p, int64_t n) {
    return make([&](int i) { return i < n ? widen_one<T>(p[i]) : T(0); });
  }
  template <typename S>
  static FST_FAST_INLINE void store(S* p, reg r, int64_t n = kWidth) {
    for (int i = 0; i < kWidth && i < n; ++i) narrow_one(r.v[i], p + i);
  }
  static FST_FAST_INLINE reg fma(reg a, reg b, reg c) {
    return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static FST_FAST_INLINE reg add(reg a, reg b) {
    return make([&](int i) { return a.v[i] + b.v[i]; });
  }
  static FST_FAST_INLINE reg sub(reg a, reg b) {
    return make([&](int i) { return a.v[i] - b.v[i]; });
  }
  static FST_FAST_INLINE reg mul(reg a, reg b) {
    return make([&](int i) { return a.v[i] * b.v[i]; });
  }
  static FST_FAST_INLINE reg max(reg a, reg b) {
    return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static FST_FAST_INLINE reg exp(reg a) {
    return make([&](int i) { return std::exp(a.v[i]); });
  }
};

#if FST_FAST_LEVEL == 1
template <>
struct Vector<float> {
  using scalar = float;
  static constexpr int kWidth = 8;
  static constexpr int kRows = 6;
  using reg = __m256;
  static FST_FAST_INLINE __m256i mask(int64_t n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes);
  }
  static FST_FAST_INLINE reg set(float x) { return _mm256_set1_ps(x); }
  static FST_FAST_INLINE reg load(const float* p) { return _mm256_loadu_ps(p); }
  static FST_FAST_INLINE reg load(const float* p, int64_t n) {
    return _mm256_maskload_ps(p, mask(n));
  }
  static FST_FAST_INLINE reg load(const BFloat16* p) {
    const auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static FST_FAST_INLINE reg load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <typename S>
  static FST_FAST_INLINE reg load(const S* p, int64_t n) {
    S all[kWidth] = {};
    for (int64_t i = 0; i < kWidth && i < n; ++i) all[i] = p[i];
    return load(all);
  }
  static FST_FAST_INLINE void store(float* p, reg r) { _mm256_storeu_ps(p, r); }
  static FST_FAST_INLINE void store(float* p, reg r, int64_t n) {
    _mm256_maskstore_ps(p, mask(n), r);
  }
  static FST_FAST_INLINE void store(Half* p, reg r) {
    const auto half = _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
  static FST_FAST_INLINE void store(BFloat16* p, reg r) {
    float all[kWidth];
    store(all, r);
    for (int i = 0; i < kWidth; ++i) narrow_one(all[i], p + i);
  }
  template <typename S>
  static FST_FAST_INLINE void store(S* p, reg r, int64_t n) {
    S all[kWidth];
    store(all, r);
    for (int64_t i = 0; i < kWidth && i < n; ++i) p[i] = all[i];
  }
  static FST_FAST_INLINE reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static FST_FAST_INLINE reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static FST_FAST_INLINE reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static FST_FAST_INLINE reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  // The second if either is NaN.
  static FST_FAST_INLINE reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
  static FST_FAST_INLINE reg round(reg a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // a * 2^n in two steps, as 2^n alone may be too small for a normal number.
  static FST_FAST_INLINE reg scale(reg a, reg n) {
    const __m256i all = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(all, 1);
    return mul(mul(a, power(half)), power(_mm256_sub_epi32(all, half)));
  }
  static FST_FAST_INLINE reg power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  static FST_FAST_INLINE reg exp(reg a) { return exp_of<Vector>(a); }
};
#endif

#if FST_FAST_LEVEL == 2
template <>
struct Vector<float> {
  using scalar = float;
  static constexpr int kWidth = 16;
  static constexpr int kRows = 12;
  using reg = __m512;
  static FST_FAST_INLINE __mmask16 mask(int64_t n) {
    return n >= kWidth ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
  }
  static FST_FAST_INLINE reg set(float x) { return _mm512_set1_ps(x); }
  static FST_FAST_INLINE reg load(const float* p) { return _mm512_loadu_ps(p); }
  static FST_FAST_INLINE reg load(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(mask(n), p);
  }
  static FST_FAST_INLINE __m256i half(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static FST_FAST_INLINE __m256i half(const void* p, int64_t n) {
    return _mm256_maskz_loadu_epi16(mask(n), p);
  }
  static FST_FAST_INLINE reg widen(__m256i bits, const BFloat16*) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static FST_FAST_INLINE reg widen(__m256i bits, const Half*) { return _mm512_cvtph_ps(bits); }
  template <typename S>
  static FST_FAST_INLINE reg load(const S* p) {
    return widen(half(p), p);
  }
  template <typename S>
  static FST_FAST_INLINE reg load(const S* p, int64_t n) {
    return widen(half(p, n), p);
  }
  static FST_FAST_INLINE __m256i narrow(reg r, const Half*) {
    return _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static FST_FAST_INLINE __m256i narrow(reg r, const BFloat16*) {
    const __m512i bits = _mm512_castps_si512(r);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const auto nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7fc0));
  }
  static FST_FAST_INLINE void store(float* p, reg r) { _mm512_storeu_ps(p, r); }
  static FST_FAST_INLINE void store(float* p, reg r, int64_t n) {
    _mm512_mask_storeu_ps(p, mask(n), r);
  }
  template <typename S>
  static FST_FAST_INLINE void store(S* p, reg r, int64_t n = kWidth) {
    _mm256_mask_storeu_epi16(p, mask(n), narrow(r, p));
  }
  static FST_FAST_INLINE reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static FST_FAST_INLINE reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static FST_FAST_INLINE reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static FST_FAST_INLINE reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  // The second if either is NaN.
  static FST_FAST_INLINE reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
  static FST_FAST_INLINE reg round(reg a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT);
  }
  static FST_FAST_INLINE reg scale(reg a, reg n) { return _mm512_scalef_ps(a, n); }
  static FST_FAST_INLINE reg exp(reg a) { return exp_of<Vector>(a); }
};

template <>
struct Vector<double> {
  using scalar = double;
  static constexpr int kWidth = 8;
  static constexpr int kRows = 8;
  using reg = __m512d;
  static FST_FAST_INLINE __mmask8 mask(int64_t n) {
    return n >= kWidth ? 0xff : static_cast<__mmask8>((1u << n) - 1);
  }
  static FST_FAST_INLINE reg set(double x) { return _mm512_set1_pd(x); }
  static FST_FAST_INLINE reg load(const double* p) { return _mm512_loadu_pd(p); }
  static FST_FAST_INLINE reg load(const double* p, int64_t n) {
    return _mm512_maskz_loadu_pd(mask(n), p);
  }
  static FST_FAST_INLINE void store(double* p, reg r) { _mm512_storeu_pd(p, r); }
  static FST_FAST_INLINE void store(double* p, reg r, int64_t n) {
    _mm512_mask_storeu_pd(p, mask(n), r);
  }
  static FST_FAST_INLINE reg fma(reg a, reg b, reg c) { return _mm512_fmadd_pd(a, b, c); }
  static FST_FAST_INLINE reg add(reg a, reg b) { return _mm512_add_pd(a, b); }
  static FST_FAST_INLINE reg sub(reg a, reg b) { return _mm512_sub_pd(a, b); }
  static FST_FAST_INLINE reg mul(reg a, reg b) { return _mm512_mul_pd(a, b); }
  static FST_FAST_INLINE reg max(reg a, reg b) { return _mm512_max_pd(a, b); }
  static FST_FAST_INLINE reg exp(reg a) {
    double all[kWidth];
    store(all, a);
    for (double& x : all) x = std::exp(x);
    return load(all);
  }
};
#endif

}  // namespace fst_fast::FST_FAST_ISA
