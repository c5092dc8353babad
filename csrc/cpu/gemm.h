// Included once per instruction set, after pack.h; see vector.h.

namespace fst_fast::FST_FAST_ISA {

template <typename compute_t>
struct Pack;

template <>
struct Pack<double> {
  template <typename Dot, typename... Rest>
  static void run(const Operand& operand, Rest... rest) {
    pack_as<Dot, double>(operand, rest...);
  }
};

template <>
struct Pack<float> {
  template <typename Dot, typename... Rest>
  static void run(const Operand& operand, Rest... rest) {
    if (operand.type == Element::kFloat) return pack_as<Dot, float>(operand, rest...);
    if (operand.type == Element::kBFloat16) return pack_as<Dot, BFloat16>(operand, rest...);
    // Pairs are of bfloat16, and never asked to hold the float16 that they would cut short.
    if constexpr (Dot::kDepth == 1) pack_as<Dot, Half>(operand, rest...);
  }
};

// What becomes of a block of sums: c = [c +] sums + factor * addend.
template <typename compute_t>
struct Target {
  compute_t* c;
  int64_t c_stride;
  bool accumulate;
  const compute_t* addend;
  int64_t addend_stride;
  compute_t factor;
  int64_t M, N;  // of the block that lie within c
};

// `rows` rows by `vectors` vectors of c, in registers.
template <typename Dot, int rows, int vectors>
void multiply_block(int64_t words, const typename Dot::word_t* a, const typename Dot::word_t* b,
                    const Target<typename Dot::word_t>& target) {
  using V = typename Dot::V;
  typename V::reg sums[rows][vectors];
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sums[i][v] = V::set(0);
  }
  for (int64_t word = 0; word < words; ++word) {
    typename V::reg columns[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) columns[v] = V::load(b + v * V::kWidth);
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const auto row = V::set(a[i]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[i][v] = Dot::dot(row, columns[v], sums[i][v]);
    }
    a += V::kRows;
    b += 2 * V::kWidth;
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    if (i >= target.M) break;
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const int64_t n = target.N - v * V::kWidth;
      auto* c = target.c + i * target.c_stride + v * V::kWidth;
      auto sum = sums[i][v];
      const bool whole = n >= V::kWidth;
      if (target.accumulate) sum = V::add(whole ? V::load(c) : V::load(c, n), sum);
      if (target.addend != nullptr) {
        const auto* addend = target.addend + i * target.addend_stride + v * V::kWidth;
        sum = V::fma(V::set(target.factor), whole ? V::load(addend) : V::load(addend, n), sum);
      }
      if (whole) {
        V::store(c, sum);
      } else {
        V::store(c, sum, n);
      }
    }
  }
}

template <typename Dot, int rows>
void multiply_rows(int64_t words, const typename Dot::word_t* a, const typename Dot::word_t* b,
                   const Target<typename Dot::word_t>& target) {
  if (target.N > Dot::V::kWidth) {
    multiply_block<Dot, rows, 2>(words, a, b, target);
  } else {
    multiply_block<Dot, rows, 1>(words, a, b, target);
  }
}

template <typename Dot>
void multiply(int64_t words, const typename Dot::word_t* a, const typename Dot::word_t* b,
              const Target<typename Dot::word_t>& target) {
  constexpr int rows = Dot::V::kRows;
  constexpr int few = rows / 3, more = 2 * rows / 3;
  if (target.M > more) {
    multiply_rows<Dot, rows>(words, a, b, target);
  } else if (target.M > few) {
    multiply_rows<Dot, more>(words, a, b, target);
  } else {
    multiply_rows<Dot, few>(words, a, b, target);
  }
}

// All of M against columns [column, column + columns) of b, whose panels are packed in `b`.
template <typename Dot>
void multiply_panels(const Gemm<typename Dot::word_t>& g, int64_t column, int64_t columns,
                     int64_t begin, int64_t depth, const typename Dot::word_t* b,
                     typename Dot::word_t* a) {
  using V = typename Dot::V;
  constexpr int panel = 2 * V::kWidth;
  const int64_t words = (depth + Dot::kDepth - 1) / Dot::kDepth;
  const bool accumulate = g.accumulate || begin > 0;
  // Last of all: what is added after a large addend is rounded to its size, block after block.
  const bool last = begin + depth == g.depth && g.addend != nullptr;
  for (int64_t row = 0; row < g.M; row += V::kRows) {
    Pack<typename Dot::word_t>::template run<Dot>(g.a, row, g.M - row, begin, depth, V::kRows, a);
    for (int64_t n = 0; n < columns; n += panel) {
      auto* c = g.c + row * g.c_stride + column + n;
      const auto* addend = last ? g.addend + row * g.addend_stride + column + n : nullptr;
      multiply<Dot>(
          words, a, b + n * words,
          {c, g.c_stride, accumulate, addend, g.addend_stride, g.factor, g.M - row, columns - n});
    }
  }
}

template <typename Dot>
void gemm(const Gemm<typename Dot::word_t>& g, typename Dot::word_t* scratch) {
  using V = typename Dot::V;
  constexpr int panel = 2 * V::kWidth;
  constexpr int64_t block = kGemmWords * Dot::kDepth;
  auto* a = scratch;
  auto* b = scratch + kGemmWords * V::kRows + 4 * panel;
  for (int64_t column = 0; column < g.N; column += kGemmColumns) {
    const int64_t columns = std::min(kGemmColumns, g.N - column);
    for (int64_t begin = 0; begin < g.depth; begin += block) {
      const int64_t depth = std::min(block, g.depth - begin);
      const int64_t words = (depth + Dot::kDepth - 1) / Dot::kDepth;
      for (int64_t n = 0; n < columns; n += panel) {
        Pack<typename Dot::word_t>::template run<Dot>(g.b, column + n, columns - n, begin, depth,
                                                      panel, b + n * words);
      }
      multiply_panels<Dot>(g, column, columns, begin, depth, b, a);
    }
  }
}

}  // namespace fst_fast::FST_FAST_ISA
