#pragma once

#include "head_deviation_begin.cuh"

// The rows of logits of a head of many classes. No ATen and no CUDA host calls here.
namespace fst_fast {

constexpr int kRowThreads = 512;  // at most, for one row of logits
constexpr int kRowPack = 8;       // logits of a thread at a time

// Rows of logits become rows of d_logits in the same memory, which may be of a narrower type: each
// block takes one row from left to right, and what it writes never reaches what it has yet to read.
template <typename scalar_t>
struct RowArguments {
  using compute_t = compute_of<scalar_t>;

  LossTerms<compute_t> terms;
  const compute_t* logits;  // [blocks, pitch]; pitch is a multiple of kRowPack
  scalar_t* d_logits;       // [blocks, grad_pitch]; null: not wanted
  int64_t pitch;
  int64_t grad_pitch;
  int64_t first_row;
  const compute_t* bias;  // null: none
  const compute_t* weight_scale;
  const Totals<compute_t>* totals;
  compute_t* losses;  // [rows]
  uint8_t* correct;   // [rows]
};

// values[k, k + kRowPack), and zeros from `limit` on.
template <typename value_t>
__device__ Pack<value_t, kRowPack> load_up_to(const value_t* values, int64_t k, int64_t limit) {
  const auto* pointer = values + k;
  const bool whole = k + kRowPack <= limit && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  if (whole) return load_pack<kRowPack>(pointer);
  Pack<value_t, kRowPack> pack;
#pragma unroll
  for (int i = 0; i < kRowPack; ++i) pack.at[i] = k + i < limit ? pointer[i] : value_t(0);
  return pack;
}

// Logits [k, k + kRowPack) of a row, scaled and with bias.
template <typename scalar_t>
__device__ Pack<compute_of<scalar_t>, kRowPack> load_logits(const RowArguments<scalar_t>& a,
                                                            const compute_of<scalar_t>* row,
                                                            compute_of<scalar_t> scale, int64_t k) {
  auto z = load_pack<kRowPack>(row + k);
#pragma unroll
  for (int i = 0; i < kRowPack; ++i) z.at[i] *= scale;
  if (a.bias != nullptr) {
    const auto bias = load_up_to(a.bias, k, a.terms.classes);
#pragma unroll
    for (int i = 0; i < kRowPack; ++i) z.at[i] += bias.at[i];
  }
  return z;
}

template <typename compute_t>
struct RowShared {
  double warp_sums[kRowThreads / kWarp];
  compute_t largest[kRowThreads / kWarp];
  compute_t sum[kRowThreads / kWarp];
  int first[kRowThreads / kWarp];
};

// Every thread gets the softmax over the block.
template <typename compute_t>
__device__ void merge_block(Softmax<compute_t>& softmax, RowShared<compute_t>& shared) {
  softmax.merge_warp();
  const int own = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    shared.largest[own] = softmax.largest;
    shared.sum[own] = softmax.sum;
    shared.first[own] = softmax.first;
  }
  __syncthreads();
  softmax = Softmax<compute_t>();
  for (int warp = 0; warp < blockDim.x / kWarp; ++warp) {
    softmax.merge(shared.largest[warp], shared.sum[warp], shared.first[warp]);
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kRowThreads) head_deviation_row_kernel(RowArguments<scalar_t> a) {
  using compute_t = compute_of<scalar_t>;
  auto& shared = *reinterpret_cast<RowShared<compute_t>*>(dynamic_shared());
  const auto& terms = a.terms;
  const int64_t row = a.first_row + blockIdx.x;
  const compute_t* logits = a.logits + blockIdx.x * a.pitch;
  const compute_t scale = a.weight_scale == nullptr ? compute_t(1) : *a.weight_scale;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kRowPack;

  Softmax<compute_t> softmax;
  for (int64_t k = threadIdx.x * kRowPack; k < terms.classes; k += step) {
    const auto z = load_logits(a, logits, scale, k);
#pragma unroll
    for (int i = 0; i < kRowPack; ++i) {
      if (k + i < terms.classes) softmax.add(z.at[i], static_cast<int>(k + i));
    }
  }
  merge_block(softmax, shared);
  const RowLoss<compute_t> loss(terms, row, softmax, 1, a.totals->class_weights);
  compute_t label_z = scale * logits[loss.target.label];
  if (a.bias != nullptr) label_z += a.bias[loss.target.label];
  // Nobody may write d_logits before all have read the label's logit.
  __syncthreads();

  compute_t smoothed = 0;
  const bool again = a.d_logits != nullptr || loss.smooth > 0;
  for (int64_t start = 0; again && start < terms.classes; start += step) {
    const int64_t k0 = start + threadIdx.x * kRowPack;
    Pack<scalar_t, kRowPack> d;
    if (k0 < terms.classes) {
      const auto z = load_logits(a, logits, scale, k0);
#pragma unroll
      for (int i = 0; i < kRowPack; ++i) {
        const int64_t k = k0 + i < terms.classes ? k0 + i : terms.classes - 1;
        const compute_t log_p = loss.log_probability(z.at[i]);
        if (loss.smooth > 0 && k == k0 + i) smoothed += terms.weight_of(k) * log_p;
        // Zeros behind the last class are factors of the products.
        const compute_t gradient = k == k0 + i ? loss.gradient(terms, log_p, k) : compute_t(0);
        d.at[i] = static_cast<scalar_t>(gradient);
      }
    }
    // Narrower d_logits lie over logits of this step that other threads read.
    if (sizeof(scalar_t) != sizeof(compute_t)) __syncthreads();
    if (a.d_logits != nullptr && k0 < terms.classes) {
      store_pack(a.d_logits + blockIdx.x * a.grad_pitch + k0, d);
    }
  }
  if (loss.smooth > 0) smoothed = static_cast<compute_t>(block_sum(smoothed, shared.warp_sums));
  if (threadIdx.x != 0) return;
  a.losses[row] = loss.loss(loss.log_probability(label_z), smoothed);
  a.correct[row] = loss.correct;
}

}  // namespace fst_fast
