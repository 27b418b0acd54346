#include <ATen/ATen.h>
#include <torch/library.h>

#include "hfh/hash.h"
#include "torch/panels.h"
#include "torch/weight.h"

// The operators of torch.ops.hfh on the CPU, and their autograd on every device. The schemas are in
// hfh_kernels/ops.

namespace hfh::torch_ops {

namespace {

at::Tensor as_matrix(const at::Tensor& tensor) {
  return tensor.reshape({-1, tensor.size(-1)}).contiguous();
}

int64_t rows_of(const at::Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

void check_matrix_like(const at::Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  TORCH_CHECK_VALUE(tensor.dim() >= 1, name,
                    " must have at least one dimension, received a 0-d tensor");
}

std::tuple<at::Tensor, at::Tensor> hash_index(const at::Tensor& rows, const at::Tensor& cols,
                                              int64_t seed, int64_t num_hashes, int64_t pool_size,
                                              int64_t block, int64_t window,
                                              int64_t rows_per_window) {
  const HashParams params =
      checked_hash(seed, num_hashes, pool_size, block, window, rows_per_window);
  for (const auto& [tensor, name] : {std::pair{&rows, "rows"}, std::pair{&cols, "cols"}}) {
    check_cpu(*tensor, name);
    TORCH_CHECK_VALUE(tensor->dim() == 1, name, " must be 1-d, received shape ", tensor->sizes());
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kLong, name, " must be int64, received ",
                     tensor->scalar_type());
  }
  const int64_t num_rows = rows.numel(), num_cols = cols.numel();
  at::Tensor offsets = at::empty({num_rows, num_cols, num_hashes}, rows.options());
  at::Tensor signs = at::empty(offsets.sizes(), rows.options().dtype(at::kChar));
  const at::Tensor row_values = rows.contiguous(), col_values = cols.contiguous();
  auto* offset = offsets.mutable_data_ptr<int64_t>();
  auto* sign = signs.mutable_data_ptr<int8_t>();
  for (int64_t r = 0; r < num_rows; ++r) {
    const auto row = static_cast<uint32_t>(row_values.const_data_ptr<int64_t>()[r]);
    const uint32_t key_of_row = row_key(row, params.seed), base = window_base(row, params);
    for (int64_t c = 0; c < num_cols; ++c) {
      const auto col = static_cast<uint32_t>(col_values.const_data_ptr<int64_t>()[c]);
      const uint32_t key = weight_key(key_of_row, col >> params.log2_block);
      for (int u = 0; u < params.num_hashes; ++u) {
        const Draw<uint32_t> one = draw(key, hash_lane(u), base, params);
        *offset++ = (int64_t{one.slot} << params.log2_block) + (col & (params.block() - 1));
        *sign++ = one.sign ? -1 : 1;
      }
    }
  }
  return {offsets, signs};
}

at::Tensor materialize(const at::Tensor& pool, const at::Tensor& theta, int64_t rows, int64_t cols,
                       HFH_WEIGHT_PARAMETERS) {
  TORCH_CHECK_VALUE(rows >= 0, "rows must not be negative, received ", rows);
  TORCH_CHECK_VALUE(cols >= 0, "cols must not be negative, received ", cols);
  const CheckedWeight weight(pool, theta, rows, cols, {HFH_WEIGHT_ARGUMENTS});
  at::Tensor out = at::empty({rows, cols}, pool.options());
  if (out.numel() != 0) write_weight(weight, out);
  return out;
}

std::tuple<at::Tensor, at::Tensor> user_gradients(const CheckedWeight& weight,
                                                  const WeightGradients& gradients,
                                                  const at::Tensor& pool, const at::Tensor& theta) {
  return {gradients.pool.to(pool.scalar_type()), weight.theta_gradient(gradients.theta, theta)};
}

std::tuple<at::Tensor, at::Tensor> materialize_backward(const at::Tensor& grad,
                                                        const at::Tensor& pool,
                                                        const at::Tensor& theta,
                                                        HFH_WEIGHT_PARAMETERS) {
  check_cpu(grad, "grad");
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad must be 2-d, received shape ", grad.sizes());
  check_activation_dtype(grad, "grad", pool);
  const CheckedWeight weight(pool, theta, grad.size(0), grad.size(1), {HFH_WEIGHT_ARGUMENTS});
  WeightGradients gradients = zero_gradients(weight);
  add_weight_backward(weight, grad.contiguous(), gradients);
  return user_gradients(weight, gradients, pool, theta);
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& pool, const at::Tensor& theta,
                  const std::optional<at::Tensor>& bias, int64_t out_features,
                  HFH_WEIGHT_PARAMETERS) {
  check_matrix_like(input, "input");
  check_activation_dtype(input, "input", pool);
  TORCH_CHECK_VALUE(out_features >= 0, "out_features must not be negative, received ",
                    out_features);
  const CheckedWeight weight(pool, theta, out_features, input.size(-1), {HFH_WEIGHT_ARGUMENTS});
  const at::Tensor bias_tensor = bias.value_or(at::Tensor());
  if (bias_tensor.defined()) check_bias(bias_tensor, out_features, input);
  auto sizes = input.sizes().vec();
  sizes.back() = out_features;
  at::Tensor out = at::empty(sizes, input.options());
  if (out.numel() == 0) return out;
  at::Tensor out_matrix = out.view({rows_of(input), out_features});
  if (weight.cols() == 0) {
    out_matrix.zero_();
    if (bias_tensor.defined()) out_matrix.add_(bias_tensor);
    return out;
  }
  multiply_forward(weight, as_matrix(input), bias_tensor, out_matrix);
  return out;
}

at::Tensor linear_backward_input(const at::Tensor& grad_output, const at::Tensor& pool,
                                 const at::Tensor& theta, int64_t in_features,
                                 HFH_WEIGHT_PARAMETERS) {
  check_matrix_like(grad_output, "grad_output");
  check_activation_dtype(grad_output, "grad_output", pool);
  const CheckedWeight weight(pool, theta, grad_output.size(-1), in_features,
                             {HFH_WEIGHT_ARGUMENTS});
  auto sizes = grad_output.sizes().vec();
  sizes.back() = in_features;
  at::Tensor grad_input = at::empty(sizes, grad_output.options());
  if (grad_input.numel() == 0) return grad_input;
  if (weight.rows() == 0) return grad_input.zero_();
  at::Tensor matrix = grad_input.view({rows_of(grad_output), in_features});
  multiply_backward_input(weight, as_matrix(grad_output), matrix);
  return grad_input;
}

std::tuple<at::Tensor, at::Tensor> linear_backward_weight(const at::Tensor& grad_output,
                                                          const at::Tensor& input,
                                                          const at::Tensor& pool,
                                                          const at::Tensor& theta,
                                                          HFH_WEIGHT_PARAMETERS) {
  check_matrix_like(grad_output, "grad_output");
  check_matrix_like(input, "input");
  check_activation_dtype(input, "input", pool);
  TORCH_CHECK_TYPE(grad_output.scalar_type() == input.scalar_type(),
                   "grad_output must have input's dtype ", input.scalar_type(), ", received ",
                   grad_output.scalar_type());
  TORCH_CHECK_VALUE(rows_of(grad_output) == rows_of(input),
                    "grad_output must have as many rows as input, received ", grad_output.sizes(),
                    " and ", input.sizes());
  const CheckedWeight weight(pool, theta, grad_output.size(-1), input.size(-1),
                             {HFH_WEIGHT_ARGUMENTS});
  if (input.numel() == 0 || grad_output.numel() == 0) {
    return {at::zeros_like(pool), at::zeros_like(theta)};
  }
  WeightGradients gradients = zero_gradients(weight);
  add_weight_backward(weight, as_matrix(grad_output), as_matrix(input), gradients);
  return user_gradients(weight, gradients, pool, theta);
}

TORCH_LIBRARY_IMPL(hfh, CPU, m) {
  m.impl("hash_index", TORCH_FN(hash_index));
  m.impl("materialize", TORCH_FN(materialize));
  m.impl("materialize_backward", TORCH_FN(materialize_backward));
  m.impl("linear", TORCH_FN(linear));
  m.impl("linear_backward_input", TORCH_FN(linear_backward_input));
  m.impl("linear_backward_weight", TORCH_FN(linear_backward_weight));
}

}  // namespace

}  // namespace hfh::torch_ops
