#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "cuda/weight_backward.h"
#include "torch/cuda/device_weight.h"
#include "torch/cuda/gradient_sum.h"

namespace hfh::torch_ops {

/// The gradient of a pool, while kernels add to it; see GradientSum.
class PoolSum {
 public:
  /// At most `num_terms` gradients of elements are added to it. `weight_bound()` is a number,
  /// float32 [], that no gradient of a weight exceeds; it is called where integers are summed.
  PoolSum(const CheckedDeviceWeight& weight, const at::Tensor& pool, const at::Tensor& theta,
          int64_t num_terms, const std::function<at::Tensor()>& weight_bound);

  bool in_units() const { return sum_.units() != nullptr; }
  /// What kernels receive; theta's part is the caller's.
  cuda::PoolGradient argument();
  /// The gradient in the pool's dtype, given that of the kernels' theta. What is not finite shows
  /// there too, such as a product that overflows in float16 below the bound.
  at::Tensor result(const at::Tensor& theta) const { return sum_.result(theta); }

 private:
  GradientSum sum_;
};

/// The gradients of pool and theta, from those of stretches of rows of the weight.
class GradientSums {
 public:
  /// `num_stretches`: at most how many there are.
  GradientSums(const CheckedDeviceWeight& weight, const at::Tensor& pool, const at::Tensor& theta,
               int64_t num_stretches, const std::function<at::Tensor()>& weight_bound);

  /// Adds what the gradient of the weight's rows from `row` on, [rows, cols], means.
  void add(const at::Tensor& gradient, int64_t row, cudaStream_t stream);
  std::tuple<at::Tensor, at::Tensor> result() const;

 private:
  const CheckedDeviceWeight& weight_;
  const cuda::Device device_;
  PoolSum pool_;
  at::Tensor theta_parts_, theta_;
  int64_t stretch_ = 0;
};

}  // namespace hfh::torch_ops
