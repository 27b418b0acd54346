#pragma once

#include <ATen/core/Tensor.h>

#include "torch/weight.h"

// What the operators do with a virtual weight panel by panel. Scratch memory is bounded by a
// constant per thread, whatever the layer's size.

namespace hfh::torch_ops {

/// out[batch, rows] = input[batch, cols] V^T + bias
void multiply_forward(const CheckedWeight& weight, const at::Tensor& input, const at::Tensor& bias,
                      at::Tensor& out);

/// grad_input[batch, cols] = grad_output[batch, rows] V
void multiply_backward_input(const CheckedWeight& weight, const at::Tensor& grad_output,
                             at::Tensor& grad_input);

/// Writes V itself.
void write_weight(const CheckedWeight& weight, at::Tensor& out);

struct WeightGradients {
  at::Tensor pool;  // float32, or float64 where the pool is
  std::vector<double> theta;
};

WeightGradients zero_gradients(const CheckedWeight& weight);

/// Adds the gradients behind V's: V's own is given, or (the second form) the product
/// grad_output^T input, of which only tiles ever exist.
void add_weight_backward(const CheckedWeight& weight, const at::Tensor& gradient,
                         WeightGradients& sum);
void add_weight_backward(const CheckedWeight& weight, const at::Tensor& grad_output,
                         const at::Tensor& input, WeightGradients& sum);

}  // namespace hfh::torch_ops
