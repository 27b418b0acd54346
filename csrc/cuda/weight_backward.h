#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/launch.h"
#include "cuda/weight.h"

// From the gradient of a virtual weight to those of its pool and of g's parameters.

namespace hfh::cuda {

/// The gradient of rows [row, row + rows) of a virtual weight of `cols` columns: a matrix whose
/// rows begin `row_stride` elements apart.
struct WeightGradient {
  const void* data;
  DType dtype;
  int64_t row_stride;
  int64_t row;
  int64_t rows, cols;
};

/// Where gradients are added up. Just one of `pool` and `pool_units` is not null.
struct PoolGradient {
  float* pool;                     // [pool_size], aligned to 16 bytes
  unsigned long long* pool_units;  // [pool_size]: integers, whose sums are the same in any order
  const float* units;              // with pool_units: how many of them make 1
  float* theta;                    // [blocks, theta_size], written and not added to: of g's
                                   // parameters with the scale folded in
};

/// How a launch divides the work. A task is a share of a window's rows, or of all rows; a warp
/// takes a part of a row at a time, which is a number of strips of columns.
struct BackwardPlan {
  unsigned blocks;
  int threads;
  size_t shared_bytes;
  bool shares_window;  // sums for a window, or for the whole pool, are in shared memory first
  int tasks;
  int shares;  // tasks of a window
  int strips;  // of a row
  int strips_of_part;
};

/// Why the kernels cannot take the weight; empty if they can.
std::string why_not_weight_backward(const VirtualWeight& weight, int64_t rows, int64_t cols);

BackwardPlan plan_weight_backward(const DeviceWeight& weight, const WeightGradient& gradient,
                                  bool in_units, const Device& device);

/// Adds to the pool's gradient, and writes the parts of theta's.
void weight_backward(const DeviceWeight& weight, const WeightGradient& gradient,
                     const PoolGradient& sums, const BackwardPlan& plan, cudaStream_t stream);

}  // namespace hfh::cuda
