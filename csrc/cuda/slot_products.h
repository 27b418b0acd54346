#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/launch.h"
#include "cuda/weight.h"

// Linear layers of linear g (depth 0 or 1) without weights, for small batches: an output is a
// signed mixture of products <slot of the pool, column block of the input>, and the rows of a
// window all draw from the same products. See also csrc/cpu/slots.cpp.

namespace hfh::cuda {

/// y [batch, out_features] = input [batch, in_features] V^T + bias, all of one type.
struct SlotProductsLinear {
  const void* input;
  const void* bias;  // or null
  void* output;
  DType dtype;
  int64_t batch, in_features, out_features;
};

/// How the work is spread over thread blocks.
struct SlotProductsPlan {
  int64_t num_windows;
  int groups_per_window;  // of rows; a thread block takes one group
  int rows_per_group;
  int num_parts;        // that the columns are split into
  int chunks_per_part;  // column blocks are multiplied chunk by chunk

  /// float32 numbers that the launch needs to work in.
  int64_t workspace(const SlotProductsLinear& linear) const {
    return num_parts == 1 ? 0 : num_parts * linear.batch * linear.out_features;
  }
};

/// Why the kernels cannot run, with the value that they refuse; empty if they can.
std::string why_not_slot_products(const DeviceWeight& weight, const SlotProductsLinear& linear);

SlotProductsPlan plan_slot_products(const DeviceWeight& weight, const SlotProductsLinear& linear,
                                    const Device& device);

/// `workspace` is what the plan asks for; the sums are the same in every run.
void slot_products(const DeviceWeight& weight, const SlotProductsLinear& linear,
                   const SlotProductsPlan& plan, float* workspace, cudaStream_t stream);

}  // namespace hfh::cuda
