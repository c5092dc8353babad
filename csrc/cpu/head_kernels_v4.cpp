#include "head_kernels.h"
#include "isa.h"

#ifdef FST_FAST_X86_LEVELS
#include <immintrin.h>

// GCC's own intrinsics start from vectors that they leave undefined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define FST_FAST_ISA v4
#define FST_FAST_LEVEL 2
#include "head_kernels_all.h"

namespace fst_fast::v4 {

HeadKernels<float> float_kernels() { return make_kernels<float>(); }
HeadKernels<double> double_kernels() { return make_kernels<double>(); }

}  // namespace fst_fast::v4
#pragma GCC pop_options
#endif
