// The CUDA ops as ops on CPU tensors, torch.ops.fst_fast_emulated: their own host code and kernels,
// with the stand-ins of this folder for CUDA.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstdlib>
#include <utility>

#include "launch.h"

// Registered for the CPU, and beside the real ops.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, k, m) _TORCH_LIBRARY_IMPL(fst_fast_emulated, CPU, m, C10_UID)

#include "../../csrc/cuda/head_deviation_loss.cu"
#include "../../csrc/cuda/head_deviation_many.cu"
#include "../../csrc/cuda/head_step.cu"
#include "../../csrc/cuda/inject.cu"
#include "../../csrc/cuda/rescale.cu"
#include "../../csrc/schemas.h"
#include "broken.h"

namespace {

// Memory between guards, so that a write past the end of any tensor shows.
class GuardedAllocator final : public at::Allocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    auto* memory = static_cast<unsigned char*>(
        std::aligned_alloc(64, (kBefore + bytes + kBehind + 63) / 64 * 64));
    std::memset(memory, kGuard, kBefore);
    std::memcpy(memory, &bytes, sizeof(bytes));
    std::memset(memory + kBefore, 0xff, bytes);
    std::memset(memory + kBefore + bytes, kGuard, kBehind);
    return {memory + kBefore, memory + kBefore, &release, at::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    std::memcpy(to, from, count);
  }

 private:
  static constexpr unsigned char kGuard = 0xa5;
  static constexpr size_t kBefore = 64;
  static constexpr size_t kBehind = 4096;

  static void release(void* pointer) {
    auto* memory = static_cast<unsigned char*>(pointer) - kBefore;
    size_t bytes;
    std::memcpy(&bytes, memory, sizeof(bytes));
    for (size_t i = sizeof(bytes); i < kBefore; ++i) check(memory[i]);
    for (size_t i = 0; i < kBehind; ++i) check(memory[kBefore + bytes + i]);
    std::free(memory);
  }
  static void check(unsigned char byte) { damaged |= byte != kGuard; }

 public:
  inline static bool damaged = false;
};

GuardedAllocator guarded;
at::Allocator* ordinary = nullptr;

// All tensors made until the next call with false have guards, and NaN where nothing is written.
// That call fails if a guard of one that is gone was written over.
void use_guards(bool on) {
  if (ordinary == nullptr) ordinary = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &guarded : ordinary, 1);
  const bool damaged = std::exchange(GuardedAllocator::damaged, false);
  TORCH_CHECK(on || !damaged, "emulated: something was written outside a tensor");
}

// 0 leaves a limit as it is; few_products of -1 sends every head to the kernels for many classes.
void set_limits(bool descending, int64_t resident, int64_t few_products, int64_t logits_bytes,
                int64_t chunk_rows) {
  emulator::descending = descending;
  emulator::resident = static_cast<int>(resident);
  fst_fast::head_limits = fst_fast::HeadLimits{};
  if (few_products != 0) fst_fast::head_limits.few_products = few_products;
  if (logits_bytes != 0) fst_fast::head_limits.logits_bytes = logits_bytes;
  if (chunk_rows != 0) fst_fast::head_limits.chunk_rows = chunk_rows;
}

}  // namespace

TORCH_LIBRARY(fst_fast_emulated, m) {
  fst_fast::define_kernels(m);
  m.def("broken(Tensor(a!) values, int kind) -> ()", &emulator::broken);
  m.def("use_guards(bool on) -> ()", &use_guards);
  m.def("launches() -> int", [] { return emulator::launches; });
  m.def(
      "set_limits(bool descending, int resident, int few_products, int logits_bytes, "
      "int chunk_rows) -> ()",
      &set_limits);
}
