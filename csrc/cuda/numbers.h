#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/ptx.h"
#include "hfh/params.h"

// Single numbers of the types that tensors hold.

namespace hfh::cuda {

template <class Number>
__device__ __forceinline__ float to_float(Number number) {
  if constexpr (std::is_same_v<Number, float>) {
    return number;
  } else {
    float low, high;
    unpack<Number>(number.bits, low, high);
    return low;
  }
}

/// Rounded to nearest even.
template <class Number>
__device__ __forceinline__ Number from_float(float number) {
  if constexpr (std::is_same_v<Number, float>) {
    return number;
  } else {
    return {static_cast<uint16_t>(pack<Number>(number, 0.0f))};
  }
}

/// Calls f(Number{}) with the type that `dtype` names; float64 has no kernels.
template <class F>
void with_number(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

}  // namespace hfh::cuda
