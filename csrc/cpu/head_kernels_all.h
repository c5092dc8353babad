// Included once per instruction set, by head_kernels*.cpp; see vector.h.

// Each needs those above it.
// clang-format off
#include "vector_math.h"
#include "vector.h"
#include "pack.h"
#include "gemm.h"
#include "softmax.h"
#include "small_head.h"
#include "stream.h"
// clang-format on

namespace fst_fast::FST_FAST_ISA {

template <typename T>
HeadKernels<T> make_kernels() {
  HeadKernels<T> kernels;
  kernels.gemm = gemm<Single<T>>;
  kernels.softmax = softmax<T>;
  kernels.small_logits = small_logits<T>;
  kernels.small_softmax = small_softmax<T>;
  kernels.small_d_features = small_d_features<T>;
  kernels.small_d_weight = small_d_weight<T>;
  kernels.add_rows = add_rows<T>;
  kernels.dot = dot<T>;
  kernels.widen = widen<T>;
  kernels.narrow = narrow<T>;
  return kernels;
}

}  // namespace fst_fast::FST_FAST_ISA
