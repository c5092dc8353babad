#include "head_kernels.h"
#include "isa.h"

#ifdef FST_FAST_X86_LEVELS
#include <immintrin.h>

// GCC's own intrinsics start from vectors that they leave undefined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define FST_FAST_ISA v4_bfloat16
#define FST_FAST_LEVEL 2
#define FST_FAST_PAIRS 1
// Each needs those above it.
// clang-format off
#include "vector_math.h"
#include "vector.h"
#include "pack.h"
#include "gemm.h"
// clang-format on

namespace fst_fast::v4_bfloat16 {

GemmBFloat16 gemm_pairs() { return gemm<Pairs>; }

}  // namespace fst_fast::v4_bfloat16
#pragma GCC pop_options
#endif
