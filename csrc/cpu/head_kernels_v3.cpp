#include "head_kernels.h"
#include "isa.h"

#ifdef FST_FAST_X86_LEVELS
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define FST_FAST_ISA v3
#define FST_FAST_LEVEL 1
#include "head_kernels_all.h"

namespace fst_fast::v3 {

HeadKernels<float> float_kernels() { return make_kernels<float>(); }
HeadKernels<double> double_kernels() { return make_kernels<double>(); }

}  // namespace fst_fast::v3
#pragma GCC pop_options
#endif
