#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/ptx.h"
#include "cuda/weight.h"

// Virtual weights one at a time in float32: csrc/hfh/reconstruct.h for a thread of its own.

namespace hfh {

template <class V>
__device__ __forceinline__ V splat(float x) {
  return x;
}
__device__ __forceinline__ float relu(float x) { return x > 0.0f || x != x ? x : 0.0f; }
__device__ __forceinline__ float tanh_lanes(float x) { return tanhf(x); }
__device__ __forceinline__ float zero_where_not_positive(float y, float x) {
  return y > 0.0f ? x : 0.0f;
}

}  // namespace hfh

#include "hfh/reconstruct.h"

namespace hfh::cuda {

/// Calls f(shape) with g's shape as a constant, and returns true, if kernels are made for it.
/// Unrolled kernels cost build time; Triton compiles the other shapes as they come.
template <class F>
bool with_shape(const VirtualWeight& weight, const F& f) {
  bool found = false;
  const auto try_shape = [&]<int kHashes, int kDepth, int kWidth, Activation kActivation>(
                             const FixedShape<kHashes, kDepth, kWidth, kActivation>& shape) {
    const ReconstructParams& g = weight.reconstruct;
    const bool same_network = kDepth == 1 || (g.width == kWidth && g.activation == kActivation);
    if (weight.hash.num_hashes == kHashes && g.depth == kDepth && same_network) {
      found = true;
      f(shape);
    }
  };
  try_shape(FixedShape<1, 1, 1, Activation::kReLU>(weight));
  try_shape(FixedShape<2, 1, 1, Activation::kReLU>(weight));
  try_shape(FixedShape<4, 1, 1, Activation::kReLU>(weight));
  try_shape(FixedShape<8, 1, 1, Activation::kReLU>(weight));
  try_shape(FixedShape<2, 2, 4, Activation::kReLU>(weight));
  try_shape(FixedShape<4, 2, 4, Activation::kReLU>(weight));
  try_shape(FixedShape<4, 2, 4, Activation::kTanh>(weight));
  try_shape(FixedShape<4, 2, 8, Activation::kReLU>(weight));
  return found;
}

/// Why with_shape finds nothing; empty where it finds.
inline std::string why_not_shape(const VirtualWeight& weight) {
  if (with_shape(weight, [](auto) {})) return "";
  const ReconstructParams& g = weight.reconstruct;
  return "it has no kernel for num_hashes " + std::to_string(weight.hash.num_hashes) + ", depth " +
         std::to_string(g.depth) + ", width " + std::to_string(g.width) + ", " +
         (g.activation == Activation::kTanh ? "tanh" : "relu");
}

}  // namespace hfh::cuda
