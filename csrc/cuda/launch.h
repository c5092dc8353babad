// What host code needs of CUDA and cuBLAS. Not #pragma once: tests/cuda_emulator puts its own
// functions of the same names in place of this file, by defining the guard first.
#ifndef FST_FAST_CUDA_LAUNCH_H
#define FST_FAST_CUDA_LAUNCH_H

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <atomic>

namespace fst_fast {

using DeviceGuard = c10::cuda::CUDAGuard;

template <typename Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes,
            const Arguments& arguments) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// All blocks run at the same time and may wait for each other: see resident_blocks.
template <typename Arguments>
void launch_together(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes,
                     Arguments arguments) {
  void* pointers[] = {&arguments};
  C10_CUDA_CHECK(cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(threads),
      pointers, shared_bytes, c10::cuda::getCurrentCUDAStream()));
}

// attribute: where the returned configuration points to.
inline cudaLaunchConfig_t cluster_config(int blocks, int threads, size_t shared_bytes,
                                         cudaLaunchAttribute& attribute) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = c10::cuda::getCurrentCUDAStream();
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

// All blocks are one cluster, the kernel's only one: see cluster_fits.
template <typename Arguments>
void launch_cluster(void (*kernel)(Arguments), int blocks, int threads, size_t shared_bytes,
                    const Arguments& arguments) {
  cudaLaunchAttribute attribute;
  const auto config = cluster_config(blocks, threads, shared_bytes, attribute);
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments));
}

// One for each kernel: asking the driver takes longer than a small head.
using Residency = std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS>;

// How many blocks fit on the device at once: a grid-wide barrier waits for ever with more.
template <typename Arguments>
int resident_blocks(void (*kernel)(Arguments), int threads, size_t shared_bytes, int device,
                    Residency& known) {
  int blocks = known.at(device);
  if (blocks == 0) {
    int per_multiprocessor = 0;
    int multiprocessors = 0;
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel,
                                                                 threads, shared_bytes));
    C10_CUDA_CHECK(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    blocks = per_multiprocessor * multiprocessors;
    known[device] = blocks;
  }
  return blocks;
}

// Whether the device can run a cluster of so many blocks, more than all that have clusters can, and
// the kernel was compiled for one that can: older PTX has no such barrier, whatever it runs on.
template <typename Arguments>
bool cluster_fits(void (*kernel)(Arguments), int blocks, int threads, size_t shared_bytes,
                  int device, Residency& known) {
  constexpr int kNo = -1;
  int clusters = known.at(device);
  if (clusters == 0) {
    int able = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&able, cudaDevAttrClusterLaunch, device));
    cudaFuncAttributes compiled{};
    C10_CUDA_CHECK(cudaFuncGetAttributes(&compiled, kernel));
    if (able == 0 || compiled.ptxVersion < 90) {
      clusters = kNo;
    } else {
      cudaLaunchAttribute attribute;
      const auto config = cluster_config(blocks, threads, shared_bytes, attribute);
      auto error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
      if (error != cudaSuccess) {
        cudaGetLastError();  // a refusal is an answer: no later call shall report it
        clusters = 0;
      }
      if (clusters == 0) clusters = kNo;
    }
    known[device] = clusters;
  }
  return clusters != kNo;
}

// out = a b, or out += a b. A float32 out of bfloat16 or float16 factors is never rounded to them.
inline void product(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add) {
  const bool widen = out.scalar_type() != a.scalar_type();
  if (widen && add) {
    at::addmm_out(out, out, a, b, out.scalar_type());
  } else if (widen) {
    at::mm_out(out, a, b, out.scalar_type());
  } else if (add) {
    at::addmm_out(out, out, a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

}  // namespace fst_fast

#endif  // FST_FAST_CUDA_LAUNCH_H
