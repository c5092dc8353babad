// Included once per instruction set, after vector.h; see there.

namespace fst_fast::FST_FAST_ISA {

template <typename T, typename S>
void widen_as(const S* from, T* to, int64_t count) {
  using V = Vector<T>;
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) V::store(to + i, V::load(from + i));
  for (; i < count; ++i) to[i] = widen_one<T>(from[i]);
}

template <typename T, typename S>
void narrow_as(const T* from, T scale, const S* addend, T factor, S* to, int64_t count) {
  using V = Vector<T>;
  for (int64_t i = 0; i < count; i += V::kWidth) {
    const int64_t n = std::min<int64_t>(V::kWidth, count - i);
    auto value = V::mul(V::load(from + i, n), V::set(scale));
    if (addend != nullptr) value = V::fma(V::set(factor), V::load(addend + i, n), value);
    V::store(to + i, value, n);
  }
}

// In 16 doubles, added up in a fixed order.
template <typename S>
double dot_as(const S* a, const S* b, int64_t count) {
  constexpr int lanes = 16;
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      sums[lane] += widen_one<double>(a[i + lane]) * widen_one<double>(b[i + lane]);
    }
  }
  for (; i < count; ++i) sums[i % lanes] += widen_one<double>(a[i]) * widen_one<double>(b[i]);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <typename T>
void add_rows(const T* z, int64_t rows, int64_t stride, int64_t K, double* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < K; ++k) sums[k] += z[row * stride + k];
  }
}

// Calls body with a null pointer to the type that `type` names.
template <typename T, typename Body>
FST_FAST_INLINE inline auto with_type(Element type, const Body& body) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return body(static_cast<const double*>(nullptr));
  } else {
    if (type == Element::kBFloat16) return body(static_cast<const BFloat16*>(nullptr));
    if (type == Element::kHalf) return body(static_cast<const Half*>(nullptr));
    return body(static_cast<const float*>(nullptr));
  }
}

template <typename T>
void widen(Element type, const void* from, T* to, int64_t count) {
  with_type<T>(type, [&](auto* s) { widen_as(static_cast<decltype(s)>(from), to, count); });
}

template <typename T>
void narrow(Element type, const T* from, T scale, const void* addend, T factor, void* to,
            int64_t count) {
  with_type<T>(type, [&](auto* s) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
    narrow_as(from, scale, static_cast<const S*>(addend), factor, static_cast<S*>(to), count);
  });
}

template <typename T>
double dot(Element type, const void* a, const void* b, int64_t count) {
  return with_type<T>(type, [&](auto* s) {
    return dot_as(static_cast<decltype(s)>(a), static_cast<decltype(s)>(b), count);
  });
}

}  // namespace fst_fast::FST_FAST_ISA
