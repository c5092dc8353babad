// Included once per instruction set, before vector.h; see there.

namespace fst_fast::FST_FAST_ISA {

// Other names for what c10 has, as its own conversions would stay on the baseline.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
FST_FAST_INLINE inline T widen_one(float x) {
  return x;
}
template <typename T>
FST_FAST_INLINE inline T widen_one(double x) {
  return static_cast<T>(x);
}
template <typename T>
FST_FAST_INLINE inline T widen_one(BFloat16 x) {
  return c10::detail::f32_from_bits(x.bits);
}
template <typename T>
FST_FAST_INLINE inline T widen_one(Half x) {
  return c10::detail::fp16_ieee_to_fp32_value(x.bits);
}

template <typename T>
FST_FAST_INLINE inline void narrow_one(T x, T* to) {
  *to = x;
}
FST_FAST_INLINE inline void narrow_one(float x, BFloat16* to) {
  to->bits = c10::detail::round_to_nearest_even(x);
}
FST_FAST_INLINE inline void narrow_one(float x, Half* to) {
  to->bits = c10::detail::fp16_ieee_from_fp32_value(x);
}

// exp in float32, good to about 1 ulp: x = n ln 2 + r, exp x = 2^n exp r (Cephes' polynomial).
template <typename V>
FST_FAST_INLINE inline typename V::reg exp_of(typename V::reg x) {
  // Past these the result is 0 or infinity anyway; NaN, as the second operand, stays.
  x = V::max(V::set(-105.0f), x);
  x = V::sub(V::set(0.0f), V::max(V::set(-89.0f), V::sub(V::set(0.0f), x)));
  const auto n = V::round(V::mul(x, V::set(1.44269504088896341f)));
  auto r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  auto p = V::fma(V::set(1.9875691500e-4f), r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::fma(p, V::mul(r, r), r);
  return V::scale(V::add(p, V::set(1.0f)), n);
}

}  // namespace fst_fast::FST_FAST_ISA
