#pragma once

#include <ATen/core/Tensor.h>

namespace hfh::torch_ops {

/// A strided matrix in memory that somebody else owns.
struct Matrix {
  void* data;
  int64_t rows, cols, row_stride, col_stride;
  at::ScalarType dtype;

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride, dtype}; }
  /// Rows [row, row + num_rows) and columns [col, col + num_cols).
  Matrix slice(int64_t row, int64_t num_rows, int64_t col, int64_t num_cols) const;
};

Matrix matrix_of(const at::Tensor& tensor);

/// out = a b, or out += a b, through the platform's own GEMM. Inside a parallel region it runs on
/// the calling thread.
void gemm(const Matrix& a, const Matrix& b, const Matrix& out, bool accumulate);

}  // namespace hfh::torch_ops
