#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// The inner loops of head_deviation_loss, compiled once per instruction set. Nothing here knows of
// tensors or threads. `compute_t` is float or double: what products are added up in.
namespace fst_fast {

enum class Element { kDouble, kFloat, kBFloat16, kHalf };

// A matrix to be multiplied, of any element type that compute_t can hold.
struct Operand {
  const void* data;
  Element type;
  int64_t stride;
  bool depth_contiguous;       // are neighbours in memory neighbours in the sum?
  const bool* skip = nullptr;  // [depth]: rows that count as zeros, whatever they hold
};

// c[M, N] = sum over depth of a[M, depth] * b[depth, N], plus factor * addend[M, N]; on top of what
// is in c if `accumulate`.
// Each element is one chain of multiply-adds in the order of depth, whatever part of c is asked
// for, so that any division of the work gives the same bits.
template <typename compute_t>
struct Gemm {
  Operand a, b;
  compute_t* c;
  int64_t c_stride;
  const compute_t* addend;  // may be null
  int64_t addend_stride;
  compute_t factor;
  int64_t M, N, depth;
  bool accumulate = false;
};

// Logits to losses and to their gradient, in place.
template <typename compute_t>
struct Softmax {
  compute_t* logits;  // [rows, K]; [K, kSmallRows] in the kernel for few classes
  int64_t rows, K;
  compute_t scale;                // logits are scale * logits + bias
  const compute_t* bias;          // [K] or null
  const compute_t* class_weight;  // [K] or null
  compute_t class_weight_sum;
  compute_t smoothing;
  const int64_t* labels;       // [rows]
  const compute_t* row_scale;  // [rows]; gradient of the result by the row's loss
  int64_t ignore_index;
  bool gradient;
  compute_t* losses;  // [rows]
  bool* hits;         // [rows]
};

// Rows that the kernels for few classes take at a time, and the most classes that they take.
constexpr int64_t kSmallRows = 64;
constexpr int64_t kSmallClasses = 16;

template <typename compute_t>
struct SmallHead {
  const compute_t* x;  // [rows, D]
  const compute_t* w;  // [K, D]
  compute_t* z;        // [K, kSmallRows]: logits or their gradient
  int64_t rows, K, D;
};

template <typename compute_t>
struct HeadKernels {
  // The scratch holds gemm_scratch elements of compute_t, aligned to 64 bytes.
  void (*gemm)(const Gemm<compute_t>&, compute_t* scratch);
  void (*softmax)(const Softmax<compute_t>&);
  void (*small_logits)(const SmallHead<compute_t>&);
  void (*small_softmax)(const Softmax<compute_t>&);
  void (*small_d_features)(const SmallHead<compute_t>&, compute_t scale, compute_t* d_x);
  // Columns [begin, end) of d_w = z x + factor * addend, all [K, D].
  void (*small_d_weight)(const SmallHead<compute_t>&, const bool* skip, int64_t begin, int64_t end,
                         const compute_t* addend, compute_t factor, compute_t* d_w);
  // sums[k] += z[0, k] + ... + z[rows - 1, k]
  void (*add_rows)(const compute_t* z, int64_t rows, int64_t stride, int64_t K, double* sums);
  double (*dot)(Element, const void* a, const void* b, int64_t count);
  void (*widen)(Element, const void* from, compute_t* to, int64_t count);
  // to = round(scale * from + factor * addend); addend, of the type of `to`, may be null.
  void (*narrow)(Element, const compute_t* from, compute_t scale, const void* addend,
                 compute_t factor, void* to, int64_t count);
};

// A packed block of b, [words of depth, columns], stays in a second-level cache of 1 MB.
constexpr int64_t kGemmWords = 256;
constexpr int64_t kGemmColumns = 512;

// Elements of scratch that gemm needs on any instruction set.
inline int64_t gemm_scratch(int64_t N, int64_t depth) {
  const int64_t columns = (std::min(N, kGemmColumns) + 31) / 32 * 32;
  return 16 * kGemmWords + std::min(depth, kGemmWords) * columns;
}

// The kernels for the instruction set in use.
template <typename compute_t>
const HeadKernels<compute_t>& head_kernels();

// gemm with both operands rounded to bfloat16 and products added in float32; null where the
// processor cannot.
using GemmBFloat16 = void (*)(const Gemm<float>&, float* scratch);
GemmBFloat16 gemm_bfloat16();

}  // namespace fst_fast
