#pragma once

#include <cstddef>
#include <cstdint>

#include "hfh/params.h"

// The kernels of one instruction set, as a table of functions: the only thing the rest of the
// library knows of them. Pointers are raw; float is what float32 and bfloat16 tensors compute in,
// double what float64 tensors do (chosen by `VirtualWeight::pool_dtype`).

namespace hfh::cpu {

/// Rows [row, row + rows) and columns [col, col + cols) of a virtual weight.
struct TileBounds {
  int64_t row, rows, col, cols;
};

/// A batch small enough that each weight is best used as soon as it is made.
struct SmallBatch {
  const float* input;  // [batch, in_features], contiguous
  const float* bias;   // [out_features] or null
  void* output;        // [batch, out_features], contiguous
  DType output_dtype;
  int64_t batch, in_features, out_features;
};

/// What a tile adds to the pool's gradient: entry i adds `length` values to the pool from
/// offset[i] on.
struct PoolContributions {
  uint32_t* offset;
  void* values;
  int64_t count;
  int32_t length;
};

struct Kernels {
  const char* capability;
  int lanes;

  /// Writes the tile to `out`, row-major, `stride` elements from row to row.
  void (*reconstruct)(const VirtualWeight&, const TileBounds&, void* out, int64_t stride);

  /// Output features [row_begin, row_end) of the batch. `scratch` holds
  /// `small_batch_scratch(batch)` floats.
  void (*linear_small)(const VirtualWeight&, const SmallBatch&, int64_t row_begin, int64_t row_end,
                       float* scratch);
  size_t (*small_batch_scratch)(int64_t batch);

  /// Given the tile's gradient (`gradient_dtype`, row-major with `stride`), adds to that of g's
  /// parameters and lists the pool's. `contribution_bounds` says how much that can be.
  void (*backward)(const VirtualWeight&, const TileBounds&, const void* gradient,
                   DType gradient_dtype, int64_t stride, double* grad_theta, PoolContributions*);
  /// Bounds of the entries of a tile and of their values.
  void (*contribution_bounds)(const VirtualWeight&, const TileBounds&, int64_t* entries,
                              int64_t* values);

  /// Adds the contributions that start in [begin, end) to the pool's gradient, in their order.
  void (*scatter)(const PoolContributions&, DType pool_dtype, uint32_t begin, uint32_t end,
                  void* grad_pool);

  void (*round_to_bfloat16)(const float* source, BFloat16* target, int64_t count);
};

/// The kernels of the best instruction set that was built, that this machine has and that
/// HFH_CPU_CAPABILITY allows.
const Kernels& kernels();

/// Names of the instruction sets that were built, comma-separated, plainest first.
const char* built_capabilities();

}  // namespace hfh::cpu
