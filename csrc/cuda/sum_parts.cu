#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/sum_parts.h"

namespace hfh::cuda {

namespace {

constexpr int kThreads = 128;

template <class Number>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* __restrict__ parts, int num_parts, int64_t size, int64_t cols,
                     const Number* __restrict__ bias, Number* __restrict__ out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = bias == nullptr ? 0.0f : to_float(bias[i % cols]);
  // Loads do not depend on each other: several are under way at once.
#pragma unroll 4
  for (int part = 0; part < num_parts; ++part) sum += parts[part * size + i];
  out[i] = from_float<Number>(sum);
}

}  // namespace

void sum_parts(const float* parts, int num_parts, int64_t rows, int64_t cols, const void* bias,
               DType dtype, void* out, cudaStream_t stream) {
  const int64_t size = rows * cols;
  if (size == 0) return;
  const Grid grid{(size + kThreads - 1) / kThreads, kThreads};
  with_number(dtype, [&](auto number) {
    using Number = decltype(number);
    launch("sum_parts", sum_parts_kernel<Number>, grid, stream, parts, num_parts, size, cols,
           static_cast<const Number*>(bias), static_cast<Number*>(out));
  });
}

}  // namespace hfh::cuda
