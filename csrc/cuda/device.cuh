#pragma once

#include <cstdint>
#include <cstring>

// Device code that several kernels share. No ATen and no CUDA host calls here.
namespace fst_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// The shared memory that a launch asks for.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  return shared_memory;
}

// What sums are added up in.
template <typename scalar_t>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename scalar_t>
using compute_of = typename ComputeOf<scalar_t>::type;

// kVector neighbours that move with one load or store, or with several of 16 bytes.
template <typename scalar_t, int kVector>
struct alignas(sizeof(scalar_t) * kVector < 16 ? sizeof(scalar_t) * kVector : 16) Pack {
  scalar_t at[kVector];
};

template <int kVector, typename scalar_t>
__device__ inline Pack<scalar_t, kVector> load_pack(const scalar_t* pointer) {
  return *reinterpret_cast<const Pack<scalar_t, kVector>*>(pointer);
}

template <int kVector, typename scalar_t>
__device__ inline void store_pack(scalar_t* pointer, const Pack<scalar_t, kVector>& pack) {
  *reinterpret_cast<Pack<scalar_t, kVector>*>(pointer) = pack;
}

// 16 bytes of global memory in one store. The compiler may not merge it with stores of its parts in
// another branch, which would take it apart.
template <typename scalar_t>
__device__ inline void store_16_bytes(scalar_t* pointer,
                                      const Pack<scalar_t, 16 / sizeof(scalar_t)>& pack) {
#ifdef __CUDA_ARCH__
  uint32_t words[4];
  memcpy(words, pack.at, 16);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(pointer)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  store_pack(pointer, pack);
#endif
}

// Every lane gets the sum over the warp, added in a fixed order.
template <typename value_t>
__device__ inline value_t warp_sum(value_t value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Of kCount sums over the warp, each added in a fixed order, a lane gets that of the value number
// lane / (kWarp / kCount).
template <int kCount, typename value_t>
__device__ inline value_t warp_sums(value_t (&values)[kCount]) {
  int offset = kWarp / 2;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = (threadIdx.x & offset) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const value_t sent = upper ? values[i] : values[i + half];
      const value_t kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, offset);
    }
    offset /= 2;
  }
#pragma unroll
  for (; offset > 0; offset /= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
  return values[0];
}

__device__ inline int64_t warp_min(int64_t value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other < value ? other : value;
  }
  return value;
}

// Every thread gets the sum over the block, added in a fixed order. parts: one per warp.
__device__ inline double block_sum(double value, double* parts) {
  value = warp_sum(value);
  // A thread may still be reading what an earlier call left in parts.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < blockDim.x / kWarp; ++warp) sum += parts[warp];
  return sum;
}

// Whether all other blocks have called this before, of one launch in which each block does once;
// the last one sees what they have written. finished: 0 before the launch.
__device__ inline bool is_last_block(unsigned* finished) {
  auto* place = reinterpret_cast<unsigned*>(dynamic_shared());
  // All threads have written, and none reads the shared memory any more.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *place = atomicAdd(finished, 1u);
  }
  __syncthreads();
  const bool last = *place == gridDim.x - 1;
  __threadfence();
  __syncthreads();
  return last;
}

}  // namespace fst_fast
