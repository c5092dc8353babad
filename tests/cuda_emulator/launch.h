// Stands in for csrc/cuda/launch.h: the same functions, for CPU tensors and emulated kernels.
#pragma once

#define FST_FAST_CUDA_LAUNCH_H

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "emulator.h"

namespace fst_fast {

struct DeviceGuard {
  explicit DeviceGuard(at::Device) {}
};

template <typename Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes,
            const Arguments& arguments) {
  emulator::run(kernel, blocks, threads, shared_bytes, arguments, false);
}

template <typename Arguments>
void launch_together(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes,
                     Arguments arguments) {
  emulator::run(kernel, blocks, threads, shared_bytes, arguments, true);
}

// In a launch that is one cluster, its barrier is the grid's.
template <typename Arguments>
void launch_cluster(void (*kernel)(Arguments), int blocks, int threads, size_t shared_bytes,
                    const Arguments& arguments) {
  emulator::run(kernel, blocks, threads, shared_bytes, arguments, true);
}

struct Residency {};

template <typename Arguments>
int resident_blocks(void (*)(Arguments), int, size_t, int, Residency&) {
  return emulator::resident;
}

template <typename Arguments>
bool cluster_fits(void (*)(Arguments), int blocks, int, size_t, int, Residency&) {
  return blocks <= emulator::resident;
}

// PyTorch has products that widen on CUDA only.
inline void product(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add) {
  ++emulator::launches;
  const auto wide = out.scalar_type();
  if (add) {
    at::addmm_out(out, out, a.to(wide), b.to(wide));
  } else {
    at::mm_out(out, a.to(wide), b.to(wide));
  }
}

}  // namespace fst_fast
