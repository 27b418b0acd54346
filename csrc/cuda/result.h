#pragma once

#include "cuda/numbers.h"

// What kernels of small products write.

namespace hfh::cuda {

/// Where sums go: float32 `parts` [parts, batch, out_features] are yet to be added up, without them
/// the output is written.
template <class Number>
struct Result {
  const Number* bias;  // or null
  Number* output;
  float* parts;  // or null
  int64_t batch, out_features;

  __device__ __forceinline__ void write(int part, int64_t entry, int64_t row, float sum) const {
    const int64_t to = entry * out_features + row;
    if (parts != nullptr) {
      parts[part * batch * out_features + to] = sum;
    } else {
      output[to] = from_float<Number>(sum + (bias == nullptr ? 0.0f : to_float(bias[row])));
    }
  }
};

}  // namespace hfh::cuda
