#pragma once

#include "cuda/ptx.h"

namespace hfh::cuda {

/// Bytes of shared memory that sum_over_block takes.
constexpr size_t block_sum_bytes(int size, int threads) {
  return static_cast<size_t>(size) * (threads / kWarpSize) * sizeof(float);
}

/// Writes the sums of the terms of a block's threads, in a fixed order. All threads call it; what
/// shared memory held is gone.
template <int kSize>
__device__ __forceinline__ void sum_over_block(const float (&terms)[kSize], float* sums) {
  auto* of_warps = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    float sum = terms[i];
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, step);
    }
    if (lane == 0) of_warps[warp * kSize + i] = sum;
  }
  __syncthreads();
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  for (int i = static_cast<int>(threadIdx.x); i < kSize; i += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int w = 0; w < num_warps; ++w) sum += of_warps[w * kSize + i];
    sums[i] = sum;
  }
}

}  // namespace hfh::cuda
