#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "torch/autograd.h"
#include "torch/cuda/operators.h"

// torch.ops.hfh on CUDA: the kernels of csrc/cuda where they can run and are expected to be
// fastest, else Triton's, which hfh_kernels/ops/library.py defines under names of their own.

namespace hfh::torch_ops {

namespace {

/// Whether the kernels of csrc/cuda are to run, given why they cannot (empty: they can).
bool takes(c10::string_view backend, const std::string& reason) {
  if (backend == "triton") return false;
  TORCH_CHECK(backend == "auto" || reason.empty(), "backend '", backend, "' cannot run: ", reason);
  return reason.empty();
}

template <class Signature>
c10::TypedOperatorHandle<Signature> triton_operator(const char* name) {
  const auto schema = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(schema.has_value(), "no kernel on CUDA can run: csrc/cuda has none for these "
              "arguments (backend='cuda' says why), and Triton is not installed");
  return schema->typed<Signature>();
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& pool, const at::Tensor& theta,
                  const std::optional<at::Tensor>& bias, int64_t out_features,
                  HFH_WEIGHT_PARAMETERS) {
  if (takes(backend, cuda_ops::why_not_linear(input, pool, theta, out_features,
                                              HFH_WEIGHT_ARGUMENTS))) {
    return cuda_ops::linear(input, pool, theta, bias, out_features, HFH_WEIGHT_ARGUMENTS);
  }
  static const auto triton = triton_operator<decltype(linear)>("hfh::triton_linear");
  return triton.call(input, pool, theta, bias, out_features, HFH_WEIGHT_ARGUMENTS);
}

at::Tensor linear_backward_input(const at::Tensor& grad_output, const at::Tensor& pool,
                                 const at::Tensor& theta, int64_t in_features,
                                 HFH_WEIGHT_PARAMETERS) {
  if (takes(backend, cuda_ops::why_not_linear_backward_input(grad_output, pool, theta, in_features,
                                                             HFH_WEIGHT_ARGUMENTS))) {
    return cuda_ops::linear_backward_input(grad_output, pool, theta, in_features,
                                           HFH_WEIGHT_ARGUMENTS);
  }
  static const auto triton =
      triton_operator<decltype(linear_backward_input)>("hfh::triton_linear_backward_input");
  return triton.call(grad_output, pool, theta, in_features, HFH_WEIGHT_ARGUMENTS);
}

at::Tensor materialize(const at::Tensor& pool, const at::Tensor& theta, int64_t rows, int64_t cols,
                       HFH_WEIGHT_PARAMETERS) {
  // Triton's keeps what is not finite to the weights that read it.
  if (backend == "cuda") {
    return cuda_ops::materialize(pool, theta, rows, cols, HFH_WEIGHT_ARGUMENTS);
  }
  static const auto triton = triton_operator<decltype(materialize)>("hfh::triton_materialize");
  return triton.call(pool, theta, rows, cols, HFH_WEIGHT_ARGUMENTS);
}

TORCH_LIBRARY_IMPL(hfh, CUDA, m) {
  m.impl("linear", TORCH_FN(linear));
  m.impl("linear_backward_input", TORCH_FN(linear_backward_input));
  m.impl("materialize", TORCH_FN(materialize));
}

}  // namespace

}  // namespace hfh::torch_ops
