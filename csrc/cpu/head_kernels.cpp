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

template <>
const HeadKernels<float>& head_kernels<float>() {
  static const HeadKernels<float> kernels[] = {
      baseline::make_kernels<float>(),
#ifdef FST_FAST_X86_LEVELS
      v3::float_kernels(),
      v4::float_kernels(),
#endif
  };
  return kernels[instruction_set.load(std::memory_order_relaxed)];
}

template <>
const HeadKernels<double>& head_kernels<double>() {
  static const HeadKernels<double> kernels[] = {
      baseline::make_kernels<double>(),
#ifdef FST_FAST_X86_LEVELS
      v3::double_kernels(),
      v4::double_kernels(),
#endif
  };
  return kernels[instruction_set.load(std::memory_order_relaxed)];
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
