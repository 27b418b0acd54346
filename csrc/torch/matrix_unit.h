#pragma once

#include "cpu/kernels.h"

// Products with a virtual weight on the machine's matrix unit. Each returns whether it is done: it
// is not where the unit is missing or slower than the plain kernels, nor where something is not
// finite, as infinite numbers do not survive being cut into pieces. Then the plain kernels must
// run.

namespace hfh::torch_ops {

bool prefers_matrix_unit(int64_t batch);

/// Whether bfloat16 products are left to the platform's GEMM, which multiplies them on the unit.
bool prefers_platform_bfloat16(int64_t batch);

/// output = input V^T + bias
bool matrix_unit_forward(const VirtualWeight& weight, const cpu::LinearBatch& args);

/// As `Kernels::linear_backward_input`, for all columns.
bool matrix_unit_backward_input(const VirtualWeight& weight, const cpu::LinearBatch& args);

/// Tiles of the weight's gradient, grad_output^T input, column by column of tiles.
class MatrixUnitGradient {
 public:
  static constexpr int64_t kMaxBatch = 512;

  /// grad_output [batch, out_features], input [batch, in_features]; batch is at most kMaxBatch.
  MatrixUnitGradient(const float* grad_output, int64_t out_features, const float* input,
                     int64_t in_features, int64_t batch);

  /// Chooses the columns of the tiles to come. Not to be called in a parallel region.
  void select_columns(int64_t col, int64_t cols);
  /// out[rows, cols] = grad_output[:, row:row + rows]^T input[:, the columns selected]
  bool multiply(int64_t row, int64_t rows, float* out, int64_t stride) const;

 private:
  const float *grad_output_, *input_;
  int64_t out_features_, in_features_, batch_, cols_ = 0;
  char* packed_input_ = nullptr;
};

}  // namespace hfh::torch_ops
