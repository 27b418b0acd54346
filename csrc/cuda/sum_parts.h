#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "hfh/params.h"

namespace hfh::cuda {

/// out[row][col] = bias[col] + parts[0][row][col] + parts[1][row][col] + ..., in this order.
/// `bias` may be null; like `out` [rows, cols] it holds numbers of `dtype`.
void sum_parts(const float* parts, int num_parts, int64_t rows, int64_t cols, const void* bias,
               DType dtype, void* out, cudaStream_t stream);

}  // namespace hfh::cuda
