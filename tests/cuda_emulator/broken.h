// Kernels with the faults that the emulation is there to find, one for each kind.
#pragma once

#include <ATen/core/Tensor.h>
#include <cooperative_groups.h>

namespace emulator {

struct BrokenArguments {
  float* values;  // [64]; becomes its own reverse
  std::int64_t kind;
};

inline void broken_kernel(BrokenArguments a) {
  auto* shared = reinterpret_cast<float*>(fst_fast::shared_memory);
  const unsigned i = threadIdx.x;
  shared[i] = a.values[i];
  if (a.kind == 1) __syncwarp();                 // a barrier of too few threads
  if (a.kind == 2 && i < 40) __syncthreads();    // a barrier that some never reach
  if (a.kind == 3 && i % 32 < 31) __syncwarp();  // a shuffle with a lane missing
  if (a.kind == 4) shared[i + 1] = 0;            // past the shared memory asked for
  if (a.kind == 5 && i == 0) a.values[64] = 0;   // past the tensor
  if (a.kind == 6) cooperative_groups::this_grid().sync();
  if (a.kind != 1) __syncthreads();
  a.values[i] = shared[63 - i];
}

inline void broken(const at::Tensor& values, std::int64_t kind) {
  const BrokenArguments arguments{values.mutable_data_ptr<float>(), kind};
  run(broken_kernel, 1, 64, 64 * sizeof(float), arguments, false);
}

}  // namespace emulator
