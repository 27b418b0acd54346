#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "cuda/weight.h"

// Buffers of gradients, while CUDA kernels add to them.

namespace hfh::torch_ops {

/// Zeros in float32. Where algorithms have to be deterministic, a sum of int64, the same in any
/// order: a term is added in units so small that an int64 just holds the largest sum there can be.
class GradientSum {
 public:
  /// The gradient is like `like`; `bound` gives a number, float32 [], that none of at most
  /// `num_terms` terms exceeds, and is called where integers are summed.
  GradientSum(const at::Tensor& like, int64_t num_terms, const std::function<at::Tensor()>& bound);

  void* data() const { return sum_.mutable_data_ptr(); }
  /// How many of the integers' units make 1; null for float32.
  const float* units() const;
  /// The gradient in its dtype. Integers become NaN throughout where the bound is not finite, or a
  /// number of `witness`, where there is one.
  at::Tensor result(const at::Tensor& witness = {}) const;

 private:
  at::ScalarType dtype_;
  at::Tensor sum_, units_, bound_;
};

/// At most how much V changes with an element, float32 []: the activations' slopes are at most 1.
at::Tensor slope_bound(const at::Tensor& theta, const cuda::DeviceWeight& weight);

/// g's parameter gradient like `theta`, from parts [n, theta_size] of that of the parameters that
/// kernels see: HashedNets have one, and the scale is folded into the last layer.
at::Tensor theta_gradient(const at::Tensor& parts, const at::Tensor& theta,
                          const cuda::DeviceWeight& weight);

}  // namespace hfh::torch_ops
