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

/// The gradients of pool and theta, from those of stretches of rows of the weight.
class GradientSums {
 public:
  /// `num_stretches`: at most how many there are. `weight_bound()` is a number, float32 [], that no
  /// gradient of a weight exceeds; it is called where integers are summed, see GradientSum.
  GradientSums(const CheckedDeviceWeight& weight, const at::Tensor& pool, const at::Tensor& theta,
               int64_t num_stretches, const std::function<at::Tensor()>& weight_bound);

  /// Adds what the gradient of the weight's rows from `row` on, [rows, cols], means.
  void add(const at::Tensor& gradient, int64_t row, cudaStream_t stream);
  std::tuple<at::Tensor, at::Tensor> result() const;

 private:
  const CheckedDeviceWeight& weight_;
  const cuda::Device device_;
  GradientSum pool_;
  at::Tensor theta_parts_, theta_;
  int64_t stretch_ = 0;
};

}  // namespace hfh::torch_ops
