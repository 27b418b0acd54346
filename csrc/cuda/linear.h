#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/launch.h"
#include "cuda/weight.h"

// Products of few rows by a virtual weight that lives in registers, and panels of the weight for
// products of many.

namespace hfh::cuda {

/// A layer: the weight's first row and column are its offsets.
struct LayerSize {
  int64_t out_features;
  int64_t in_features;
};

/// Rows of input that `linear_small` can take: as many as there are registers for.
inline int64_t max_small_batch(const VirtualWeight& weight) {
  const bool wide = weight.reconstruct.depth > 1 && weight.reconstruct.width > 4;
  return weight.hash.num_hashes > 4 || wide ? 16 : 32;
}

/// Why `write_panel` has no kernel for a layer; empty where it has.
std::string why_not_panel(const DeviceWeight& weight, const LayerSize& size);

/// Why `linear_small` has no kernel for a product; empty where it has.
std::string why_not_linear_small(const DeviceWeight& weight, const LayerSize& size, int64_t batch);

/// output [batch, out_features] = input [batch, in_features] V^T + bias, all in the pool's dtype.
/// `batch` is from 1 to max_small_batch, no size is 0, input and pool are aligned to 16 bytes.
struct LinearSmall {
  LayerSize size;
  int64_t batch;
  const void* input;
  const void* bias;  // or null
  void* output;
};

/// float32 numbers that the launch needs to work in.
int64_t linear_small_workspace(const DeviceWeight& weight, const LinearSmall& linear,
                               const Device& device);

/// `workspace` is what linear_small_workspace asks for; the sums are the same in every run.
void linear_small(const DeviceWeight& weight, const LinearSmall& linear, float* workspace,
                  const Device& device, cudaStream_t stream);

/// Rows [row_begin, row_begin + rows) of the weight to `panel` [rows, in_features], in the pool's
/// dtype; no size is 0, both are aligned to 16 bytes.
void write_panel(const DeviceWeight& weight, const LayerSize& size, int64_t row_begin, int64_t rows,
                 void* panel, const Device& device, cudaStream_t stream);

}  // namespace hfh::cuda
