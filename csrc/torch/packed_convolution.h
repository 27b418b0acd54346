#pragma once

#include "cpu/kernels.h"
#include "torch/convolution.h"
#include "torch/parallel.h"

// Convolutions in float32 on vector units: packed products (see cpu/packed_product.h) of the
// virtual weight with patches of the images, of which a block of rows exists at a time.

namespace hfh::torch_ops {

/// The columns [col, col + cols), in whole channels, of the gradient grad_output^T patches of a
/// weight: summed over all positions.
class PackedGradient {
 public:
  PackedGradient(const PatchMatrix& grad_output, int64_t row, int64_t rows,
                 const PatchMatrix& patches);

  int64_t cols_at_once() const;
  void select_columns(int64_t col, int64_t cols);
  /// [rows, cols]
  float* sum() const { return sum_; }

 private:
  void add_positions(int64_t first, int64_t count, const cpu::PatchPart& part, bool is_first,
                     bool is_last);

  const cpu::Patches &grad_pixels_, &patches_;
  const float *grad_output_, *images_;
  int64_t row_, rows_;
  float* sum_;
};

}  // namespace hfh::torch_ops
