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
inline int64_t max_small_batch(const HashParams& hash) { return hash.num_hashes > 4 ? 16 : 32; }

/// Why `write_panel` has no kernel for a layer; empty where it has.
std::string why_not_panel(const DeviceWeight& weight, const LayerSize& size);

/// Why `linear_small` has no kernel for a product; empty where it has.
std::string why_not_linear_small(const DeviceWeight& weight, const LayerSize& size, int64_t batch);

/// In how many parts of the columns `linear_small` cuts its sums.
int num_parts_of_linear(const DeviceWeight& weight, const LayerSize& size, int64_t batch,
                        const Device& device);

/// input [batch, in_features] times the weight's transpose, both in the pool's dtype, in parts:
/// `parts` [num_parts_of_linear, batch, out_features] are to be added up. `batch` is from 1 to
/// max_small_batch, no size is 0, `input` is aligned to 16 bytes and so is the pool.
void linear_small(const DeviceWeight& weight, const LayerSize& size, const void* input,
                  int64_t batch, float* parts, const Device& device, cudaStream_t stream);

/// Rows [row_begin, row_begin + rows) of the weight to `panel` [rows, in_features], in the pool's
/// dtype; no size is 0, both are aligned to 16 bytes.
void write_panel(const DeviceWeight& weight, const LayerSize& size, int64_t row_begin, int64_t rows,
                 void* panel, const Device& device, cudaStream_t stream);

}  // namespace hfh::cuda
