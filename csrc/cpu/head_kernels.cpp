#include "head_kernels.h"

#include "isa.h"

#define FST_FAST_ISA baseline
#define FST_FAST_LEVEL 0
#include "head_kernels_all.h"

namespace fst_fast {

#ifdef FST_FAST_X86_LEVELS
namespace v3 {
HeadKernels<float> float_kernels();
HeadKernels<double> double_kernels();
}  // namespace v3
namespace v4 {
HeadKernels<float> float_kernels();
HeadKernels<double> double_kernels();
}  // namespace v4
namespace v4_bfloat16 {
GemmBFloat16 gemm_pairs();
}
#endif

// A set's table is made by code of that set, which other processors cannot run.
template <>
const HeadKernels<float>& head_kernels<float>() {
#ifdef FST_FAST_X86_LEVELS
  const int chosen = instruction_set.load(std::memory_order_relaxed);
  if (chosen == 2) {
    static const HeadKernels<float> kernels = v4::float_kernels();
    return kernels;
  }
  if (chosen == 1) {
    static const HeadKernels<float> kernels = v3::float_kernels();
    return kernels;
  }
#endif
  static const HeadKernels<float> kernels = baseline::make_kernels<float>();
  return kernels;
}

template <>
const HeadKernels<double>& head_kernels<double>() {
#ifdef FST_FAST_X86_LEVELS
  const int chosen = instruction_set.load(std::memory_order_relaxed);
  if (chosen == 2) {
    static const HeadKernels<double> kernels = v4::double_kernels();
    return kernels;
  }
  if (chosen == 1) {
    static const HeadKernels<double> kernels = v3::double_kernels();
    return kernels;
  }
#endif
  static const HeadKernels<double> kernels = baseline::make_kernels<double>();
  return kernels;
}

GemmBFloat16 gemm_bfloat16() {
#ifdef FST_FAST_X86_LEVELS
  static const bool able = __builtin_cpu_supports("avx512bf16");
  if (able && instruction_set.load(std::memory_order_relaxed) == 2) {
    return v4_bfloat16::gemm_pairs();
  }
#endif
  return nullptr;
}

}  // namespace fst_fast
