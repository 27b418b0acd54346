#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/matrix_unit.h"
#include "cpu/packed_product.h"
#include "cpu/patches.h"
#include "hfh/params.h"

// The kernels of one instruction set, as a table of functions: the only thing the rest of the
// library knows of them. Pointers are raw; float is what float32 and bfloat16 tensors compute in,
// double what float64 tensors do (chosen by `VirtualWeight::pool_dtype`).

namespace hfh::cpu {

/// Rows [row, row + rows) and columns [col, col + cols) of a virtual weight.
struct TileBounds {
  int64_t row, rows, col, cols;
};

/// Operands of a product with a virtual weight; all contiguous.
template <class T>
struct LinearOperands {
  const T* input;     // [batch, in_features]
  const float* bias;  // [out_features] or null
  T* output;          // [batch, out_features]
  int64_t batch, in_features, out_features;
};
using LinearBatch = LinearOperands<float>;
using BFloat16Batch = LinearOperands<BFloat16>;

/// What the gradient of a weight is the product of; contiguous.
struct BFloat16Gradient {
  const BFloat16* grad_output;  // [batch, out_features]
  const BFloat16* input;        // [batch, in_features]
  int64_t batch, out_features, in_features;
};

/// Tiles of a weight's gradient, at most.
struct GradientTile {
  static constexpr int64_t kRows = 64, kCols = 512;
};

/// Starts outputs [row_begin, row_end) of inputs [first, first + count) at the bias.
inline void set_bias(const LinearBatch& args, int64_t first, int64_t count, int64_t row_begin,
                     int64_t row_end) {
  for (int64_t m = first; m < first + count; ++m) {
    float* out = args.output + m * args.out_features;
    for (int64_t row = row_begin; row < row_end; ++row) {
      out[row] = args.bias != nullptr ? args.bias[row] : 0.0f;
    }
  }
}

/// Products of every slot of the pool with `num_blocks` blocks of columns of every input:
/// values[(input * num_blocks + block - first_block) * stride + slot].
struct SlotProducts {
  float* values;
  int64_t stride, first_block, num_blocks;
};

/// The same for kInputs inputs at once, which lie side by side:
/// values[((block - first_block) * num_slots + slot) * kInputs + input].
struct BatchSlotProducts {
  static constexpr int kInputs = 32;
  float* values;
  int64_t num_slots, first_block, num_blocks;
};

/// What a tile adds to the pool's gradient: at once, to `sum`; or, where `sum` is null, as a list,
/// whose entry i adds `length` values to the pool from offset[i] on.
struct PoolContributions {
  void* sum;
  uint32_t* offset;
  void* values;
  int64_t count;
  int32_t length;
};

/// Rows of a virtual weight looked up: entry i is row `row[i]` of it, `row_offset` included, and
/// belongs at element `place[i]` of an array. Of the `listed` rows those after `count` come later:
/// what they need is fetched ahead.
struct RowLookups {
  const uint32_t* row;
  const int64_t* place;
  int64_t count, listed;
};

/// Single elements of a virtual weight and the gradient of each (double for double kernels).
struct ElementGradients {
  const uint32_t* row;  // `row_offset` included
  const uint32_t* col;  // `col_offset` included
  const void* gradient;
  int64_t count;
};

struct Kernels {
  const char* capability;
  int lanes;
  /// Products of bfloat16 that one instruction adds to a lane's sum; 1 where all is in float32.
  int bfloat16_products;

  /// Writes the tile to `out`, row-major, `stride` elements from row to row. `meanwhile` is called
  /// once for each block of a row, or for each vector where blocks are shorter.
  void (*reconstruct)(const VirtualWeight&, const TileBounds&, void* out, int64_t stride,
                      Meanwhile meanwhile);

  /// output = input V^T + bias, for output features [row_begin, row_end).
  void (*linear)(const VirtualWeight&, const LinearBatch&, int64_t row_begin, int64_t row_end,
                 float* scratch);
  /// output = input V, where `input` is the gradient of a layer's output and `output` that of its
  /// input: V has as many rows as `in_features`. For columns [col_begin, col_end).
  void (*linear_backward_input)(const VirtualWeight&, const LinearBatch&, int64_t col_begin,
                                int64_t col_end, float* scratch);
  /// Floats of scratch that either takes: a constant.
  size_t (*linear_scratch)();

  /// `linear` and `linear_backward_input` of bfloat16, added up in float32.
  void (*linear_bfloat16)(const VirtualWeight&, const BFloat16Batch&, int64_t row_begin,
                          int64_t row_end, void* scratch);
  void (*linear_backward_input_bfloat16)(const VirtualWeight&, const BFloat16Batch&,
                                         int64_t col_begin, int64_t col_end, void* scratch);
  /// Writes a tile of the weight's gradient, grad_output^T input, at most a GradientTile.
  void (*weight_gradient_bfloat16)(const BFloat16Gradient&, const TileBounds&, float* gradient,
                                   int64_t stride, void* scratch);
  /// Bytes of scratch that each of them takes: a constant.
  size_t (*bfloat16_scratch)();

  /// Whether outputs can be added up from slot products (see slots.cpp); in_features must be a
  /// multiple of the block.
  bool (*has_slot_products)(const VirtualWeight&);
  /// Fills in the products of slots [slot_begin, slot_end). `scratch` holds
  /// `slot_products_scratch(batch * num_blocks)` floats.
  void (*slot_products)(const VirtualWeight&, const SlotProducts&, const LinearBatch&,
                        int64_t slot_begin, int64_t slot_end, float* scratch);
  size_t (*slot_products_scratch)(int64_t num_products);
  /// Adds to output features [row_begin, row_end) what those blocks contribute.
  void (*add_slot_products)(const VirtualWeight&, const SlotProducts&, const LinearBatch&,
                            int64_t row_begin, int64_t row_end);

  /// The same for up to BatchSlotProducts::kInputs inputs, which `turn_inputs` lays side by side,
  /// zero where there are fewer: turned[col * kInputs + input], with room for a multiple of the
  /// lanes. `inputs` are those of its blocks.
  void (*turn_inputs)(const float* input, int64_t stride, int64_t batch, int64_t cols,
                      float* turned);
  void (*batch_slot_products)(const VirtualWeight&, const BatchSlotProducts&, const float* inputs,
                              int64_t slot_begin, int64_t slot_end);
  void (*add_batch_slot_products)(const VirtualWeight&, const BatchSlotProducts&, float* output,
                                  int64_t stride, int64_t batch, int64_t row_begin,
                                  int64_t row_end);

  /// Backward through those products; see slots_backward.cpp. Adds to `sums`, laid out like the
  /// products, what rows [row_begin, row_end) pass on to blocks [block_begin, block_end):
  /// `grad_turned` is the gradient of their outputs, side by side, from row_begin on.
  void (*scatter_slots)(const VirtualWeight&, const BatchSlotProducts& sums,
                        const float* grad_turned, int64_t row_begin, int64_t row_end,
                        int64_t block_begin, int64_t block_end);
  /// Writes those blocks of the gradient of the input.
  void (*slots_backward_input)(const VirtualWeight&, const BatchSlotProducts& sums,
                               int64_t block_begin, int64_t block_end, float* grad_input,
                               int64_t stride, int64_t batch);
  /// Adds to slots [slot_begin, slot_end) of the pool's gradient; `input` is at the first block.
  void (*slots_backward_pool)(const VirtualWeight&, const BatchSlotProducts& sums,
                              const float* input, int64_t stride, int64_t batch, int64_t slot_begin,
                              int64_t slot_end, float* grad_pool);
  /// Adds to the gradient of g's parameters.
  void (*slots_backward_theta)(const VirtualWeight&, const BatchSlotProducts& products,
                               const float* grad_turned, int64_t row_begin, int64_t row_end,
                               double* grad_theta);

  bool (*all_finite)(const float* values, int64_t count);

  /// Given the tile's gradient (`gradient_dtype`, row-major with `stride`), adds to that of g's
  /// parameters and to the pool's, or lists that: `contribution_bounds` says how much it can be.
  void (*backward)(const VirtualWeight&, const TileBounds&, const void* gradient,
                   DType gradient_dtype, int64_t stride, double* grad_theta, PoolContributions*);
  /// Bounds of the entries of a tile and of their values.
  void (*contribution_bounds)(const VirtualWeight&, const TileBounds&, int64_t* entries,
                              int64_t* values);

  /// Adds the contributions that start in [begin, end) to the pool's gradient, in their order.
  void (*scatter)(const PoolContributions&, DType pool_dtype, uint32_t begin, uint32_t end,
                  void* grad_pool);

  /// Writes columns [col, col + cols) of each row looked up to `out`, from its place on. With
  /// `past_caches` places are multiples of cols, and the pool need not make room for the result.
  void (*lookup)(const VirtualWeight&, const RowLookups&, int64_t col, int64_t cols, void* out,
                 bool past_caches);
  /// Adds those columns of each row, times its factor where `factor` is not null, to `sums` from
  /// the row's place on: neighbours of the same place are added up first. Factors and sums are
  /// float, or double for double kernels.
  void (*add_lookups)(const VirtualWeight&, const RowLookups&, const void* factor, int64_t col,
                      int64_t cols, void* sums);
  /// The gradient of `lookup`, as of `backward`: that of each row begins at its place in
  /// `gradient`.
  void (*lookup_backward)(const VirtualWeight&, const RowLookups&, int64_t col, int64_t cols,
                          const void* gradient, DType gradient_dtype, double* grad_theta,
                          PoolContributions*);
  /// The same for single elements, each of which lists num_hashes entries of one value.
  void (*elements_backward)(const VirtualWeight&, const ElementGradients&, double* grad_theta,
                            PoolContributions*);
  /// best[c] = max(best[c], rows[i][c]) over all columns, and winner[c] = id[i] where that is
  /// greater; a negative winner is beaten by all.
  void (*max_rows)(DType, int64_t count, int64_t cols, const void* const* rows, const int64_t* id,
                   void* best, int64_t* winner);

  void (*round_to_bfloat16)(const float* source, BFloat16* target, int64_t count);

  /// Writes a block of the matrix of patches out of images of elements of any type.
  void (*gather_patches)(const Patches&, const void* images, int element_size, const PatchBlock&);
  /// The inverse for kernels of one tap, whose patches do not overlap.
  void (*scatter_positions)(const Patches&, const PatchBlock&, int element_size, void* images);
  /// Adds a block of the gradient of patches to that of the images, both float32 or float64.
  void (*add_patches)(const Patches&, const PatchBlock&, DType, void* images);

  // Operands of packed products, see packed_product.h. `scratch` holds PackedProduct::kPixelFloats
  // or kWeightFloats.

  /// Patches, as the left operand: row i of them as its row `place[i]`.
  void (*pack_patches_left)(const Patches&, const float* images, const PatchPart&,
                            const int64_t* place, float* packed, float* scratch);
  /// Patches, as rows from `first_row` on of a right operand of `depth` rows.
  void (*pack_patches_right)(const Patches&, const float* images, const PatchPart&,
                             int64_t first_row, int64_t depth, float* packed, float* scratch);
  /// Pixels (patches of one tap), as a left operand whose rows are the channels.
  void (*pack_channels)(const Patches& pixels, const float* images, const PatchPart&,
                        float* packed);
  /// A part of a weight, as a right operand.
  void (*pack_weight)(const VirtualWeight&, const WeightPart&, float* packed, float* scratch);
  /// out[out_row[i] * stride + j] += sum_k left[i][k] right[k][j] for the rows of each group, k in
  /// its ranges times `unit`.
  void (*multiply_packed)(const RowGroup* groups, int64_t num_groups, int64_t cols, int64_t depth,
                          int64_t unit, const float* left, const float* right, float* out,
                          const int64_t* out_row, int64_t stride);
  /// Turns columns in the order (tap, channel), at most PackedProduct::kDepth, into the weight's
  /// order, (channel, tap).
  void (*order_by_channel)(int64_t rows, int64_t channels, int64_t taps, float* data);

  /// Null where there is none.
  const MatrixUnit* matrix_unit;
};

/// The kernels of the best instruction set that was built, that this machine has and that
/// HFH_CPU_CAPABILITY allows.
const Kernels& kernels();

/// Names of the instruction sets that were built, comma-separated, plainest first.
const char* built_capabilities();

}  // namespace hfh::cpu
