#include "torch/gemm.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

namespace hfh::torch_ops {

namespace {

at::Tensor tensor_of(const Matrix& matrix) {
  return at::from_blob(matrix.data, {matrix.rows, matrix.cols},
                       {matrix.row_stride, matrix.col_stride}, at::dtype(matrix.dtype));
}

}  // namespace

Matrix Matrix::slice(int64_t row, int64_t num_rows, int64_t col, int64_t num_cols) const {
  const int64_t offset = row * row_stride + col * col_stride;
  auto* bytes = static_cast<char*>(data) + offset * static_cast<int64_t>(c10::elementSize(dtype));
  return {bytes, num_rows, num_cols, row_stride, col_stride, dtype};
}

Matrix matrix_of(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()),
          tensor.size(0),
          tensor.size(1),
          tensor.stride(0),
          tensor.stride(1),
          tensor.scalar_type()};
}

void gemm(const Matrix& a, const Matrix& b, const Matrix& out, bool accumulate) {
  at::Tensor result = tensor_of(out);
  if (accumulate) {
    at::cpu::addmm_out(result, result, tensor_of(a), tensor_of(b));
  } else {
    at::cpu::mm_out(result, tensor_of(a), tensor_of(b));
  }
}

}  // namespace hfh::torch_ops
