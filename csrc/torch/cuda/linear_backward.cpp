#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "cuda/crossovers.h"
#include "torch/cuda/gradient_sums.h"
#include "torch/cuda/operators.h"
#include "torch/cuda/stream.h"

// The gradients of pool and theta. That of a linear layer's weight is a product that cuBLAS writes
// panel by panel, each of which is read before the next takes its place.

namespace hfh::torch_ops {

namespace {

void check_can_run(const CheckedDeviceWeight& weight) {
  const std::string reason =
      cuda::why_not_weight_backward(weight.get(), weight.rows(), weight.cols());
  TORCH_CHECK(reason.empty(), "backend 'cuda' cannot run: ", reason);
}

/// The rows behind the last of each panel, which ends with a window where it has room for one.
std::vector<int64_t> panel_ends(const CheckedDeviceWeight& weight, int64_t row_bytes) {
  const int64_t at_most = std::max<int64_t>(1, cuda::kGradientPanelBytes / row_bytes);
  const int64_t window_rows = std::max<int64_t>(1, weight.get().hash.rows_per_window);
  const int64_t offset = weight.get().row_offset;
  std::vector<int64_t> ends;
  for (int64_t row = 0; row < weight.rows();) {
    const int64_t last = row + at_most;
    const int64_t window_end = (offset + last) / window_rows * window_rows - offset;
    row = std::min(window_end > row ? window_end : last, weight.rows());
    ends.push_back(row);
  }
  return ends;
}

}  // namespace

namespace cuda_ops {

std::string why_not_linear_backward_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                           const at::Tensor& pool, const at::Tensor& theta,
                                           HFH_WEIGHT_PARAMETERS) {
  if (grad_output.dim() == 0 || input.dim() == 0) return "grad_output and input need a dimension";
  const int64_t rows = grad_output.size(-1), cols = input.size(-1);
  const std::string reason = cuda::why_not_weight_backward(
      checked_device_weight(pool, theta, rows, cols, {HFH_WEIGHT_ARGUMENTS}), rows, cols);
  return reason.empty() ? why_not_platform_product(backend) : reason;
}

std::string why_not_materialize_backward(const at::Tensor& grad, const at::Tensor& pool,
                                         const at::Tensor& theta, HFH_WEIGHT_PARAMETERS) {
  if (grad.dim() != 2) return "grad must be 2-d";
  const int64_t rows = grad.size(0), cols = grad.size(1);
  return cuda::why_not_weight_backward(
      checked_device_weight(pool, theta, rows, cols, {HFH_WEIGHT_ARGUMENTS}), rows, cols);
}

std::tuple<at::Tensor, at::Tensor> materialize_backward(const at::Tensor& grad,
                                                        const at::Tensor& pool,
                                                        const at::Tensor& theta,
                                                        HFH_WEIGHT_PARAMETERS) {
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad must be 2-d, received shape ", grad.sizes());
  check_same_device(grad, "grad", pool, "pool");
  checked_device_dtype(grad, "grad");
  const StreamScope scope(pool);
  const CheckedDeviceWeight weight(pool, theta, grad.size(0), grad.size(1), {HFH_WEIGHT_ARGUMENTS});
  check_can_run(weight);
  if (grad.numel() == 0) return {at::zeros_like(pool), at::zeros_like(theta)};
  const at::Tensor rows = grad.stride(1) == 1 ? grad : grad.contiguous();
  GradientSums sums(weight, pool, theta, 1, [&] { return rows.abs().max().to(at::kFloat); });
  sums.add(rows, 0, scope.stream());
  return sums.result();
}

std::tuple<at::Tensor, at::Tensor> linear_backward_weight(const at::Tensor& grad_output,
                                                          const at::Tensor& input,
                                                          const at::Tensor& pool,
                                                          const at::Tensor& theta,
                                                          HFH_WEIGHT_PARAMETERS) {
  for (const auto& [tensor, name] :
       {std::pair{&grad_output, "grad_output"}, std::pair{&input, "input"}}) {
    TORCH_CHECK_VALUE(tensor->dim() >= 1, name,
                      " must have at least one dimension, received a 0-d tensor");
    check_same_device(*tensor, name, pool, "pool");
    checked_device_dtype(*tensor, name);
  }
  TORCH_CHECK_TYPE(grad_output.scalar_type() == input.scalar_type(),
                   "grad_output must have input's dtype ", input.scalar_type(), ", received ",
                   grad_output.scalar_type());
  const StreamScope scope(pool);
  const CheckedDeviceWeight weight(pool, theta, grad_output.size(-1), input.size(-1),
                                   {HFH_WEIGHT_ARGUMENTS});
  check_can_run(weight);
  if (grad_output.numel() == 0 || input.numel() == 0) {
    return {at::zeros_like(pool), at::zeros_like(theta)};
  }
  const at::Tensor grads = grad_output.reshape({-1, weight.rows()});
  const at::Tensor inputs = input.reshape({-1, weight.cols()});
  TORCH_CHECK_VALUE(grads.size(0) == inputs.size(0),
                    "grad_output must have as many rows as input, received ", grad_output.sizes(),
                    " and ", input.sizes());
  const auto weight_bound = [&] {
    // By Cauchy and Schwarz: each gradient of a weight is a product of two columns.
    const auto longest_column = [](const at::Tensor& tensor) {
      return at::linalg_vector_norm(tensor, 2, at::IntArrayRef{0}, false, at::kFloat).max();
    };
    return longest_column(grads) * longest_column(inputs);
  };
  // Rows begin where they can be read, and written, 16 bytes at once.
  const int64_t row_stride = (weight.cols() + 7) / 8 * 8;
  const std::vector<int64_t> ends = panel_ends(weight, row_stride * input.element_size());
  GradientSums sums(weight, pool, theta, static_cast<int64_t>(ends.size()), weight_bound);
  at::Tensor workspace;
  int64_t row = 0;
  for (const int64_t end : ends) {
    if (!workspace.defined() || workspace.size(0) < end - row) {
      workspace = at::empty({end - row, row_stride}, inputs.options());
    }
    at::Tensor panel = workspace.narrow(0, 0, end - row).narrow(1, 0, weight.cols());
    at::mm_out(panel, grads.narrow(1, row, end - row).t(), inputs);
    sums.add(panel, row, scope.stream());
    row = end;
  }
  return sums.result();
}

}  // namespace cuda_ops

}  // namespace hfh::torch_ops
