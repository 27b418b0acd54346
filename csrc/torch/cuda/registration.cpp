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
  TORCH_CHECK(
      schema.has_value(),
      "no kernel on CUDA can run: csrc/cuda has none for these "
      "arguments (backend='cuda' says why; backend='reference' takes any), and Triton is not "
      "installed");
  return schema->typed<Signature>();
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& pool, const at::Tensor& theta,
                  const std::optional<at::Tensor>& bias, int64_t out_features,
                  HFH_WEIGHT_PARAMETERS) {
  if (takes(backend,
            cuda_ops::why_not_linear(input, pool, theta, out_features, HFH_WEIGHT_ARGUMENTS))) {
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

std::tuple<at::Tensor, at::Tensor> linear_backward_weight(const at::Tensor& grad_output,
                                                          const at::Tensor& input,
                                                          const at::Tensor& pool,
                                                          const at::Tensor& theta,
                                                          HFH_WEIGHT_PARAMETERS) {
  if (takes(backend, cuda_ops::why_not_linear_backward_weight(grad_output, input, pool, theta,
                                                              HFH_WEIGHT_ARGUMENTS))) {
    return cuda_ops::linear_backward_weight(grad_output, input, pool, theta, HFH_WEIGHT_ARGUMENTS);
  }
  static const auto triton =
      triton_operator<decltype(linear_backward_weight)>("hfh::triton_linear_backward_weight");
  return triton.call(grad_output, input, pool, theta, HFH_WEIGHT_ARGUMENTS);
}

std::tuple<at::Tensor, at::Tensor> materialize_backward(const at::Tensor& grad,
                                                        const at::Tensor& pool,
                                                        const at::Tensor& theta,
                                                        HFH_WEIGHT_PARAMETERS) {
  if (takes(backend,
            cuda_ops::why_not_materialize_backward(grad, pool, theta, HFH_WEIGHT_ARGUMENTS))) {
    return cuda_ops::materialize_backward(grad, pool, theta, HFH_WEIGHT_ARGUMENTS);
  }
  static const auto triton =
      triton_operator<decltype(materialize_backward)>("hfh::triton_materialize_backward");
  return triton.call(grad, pool, theta, HFH_WEIGHT_ARGUMENTS);
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

at::Tensor embedding(const at::Tensor& indices, const at::Tensor& pool, const at::Tensor& theta,
                     const std::optional<at::Tensor>& dense,
                     const std::optional<at::Tensor>& permutation, int64_t num_embeddings,
                     int64_t embedding_dim, int64_t padding_idx, HFH_WEIGHT_PARAMETERS) {
  if (takes(backend, cuda_ops::why_not_embedding(pool, theta, num_embeddings, embedding_dim,
                                                 HFH_WEIGHT_ARGUMENTS))) {
    return cuda_ops::embedding(indices, pool, theta, dense, permutation, num_embeddings,
                               embedding_dim, padding_idx, HFH_WEIGHT_ARGUMENTS);
  }
  static const auto triton = triton_operator<decltype(embedding)>("hfh::triton_embedding");
  return triton.call(indices, pool, theta, dense, permutation, num_embeddings, embedding_dim,
                     padding_idx, HFH_WEIGHT_ARGUMENTS);
}

int64_t last_size(const at::Tensor& tensor) { return tensor.dim() == 0 ? 0 : tensor.size(-1); }

std::tuple<at::Tensor, at::Tensor, at::Tensor> embedding_backward(
    const at::Tensor& grad, const at::Tensor& indices, const at::Tensor& pool,
    const at::Tensor& theta, const std::optional<at::Tensor>& dense,
    const std::optional<at::Tensor>& permutation, int64_t num_embeddings, int64_t padding_idx,
    HFH_WEIGHT_PARAMETERS) {
  if (takes(backend, cuda_ops::why_not_embedding(pool, theta, num_embeddings, last_size(grad),
                                                 HFH_WEIGHT_ARGUMENTS))) {
    return cuda_ops::embedding_backward(grad, indices, pool, theta, dense, permutation,
                                        num_embeddings, padding_idx, HFH_WEIGHT_ARGUMENTS);
  }
  static const auto triton =
      triton_operator<decltype(embedding_backward)>("hfh::triton_embedding_backward");
  return triton.call(grad, indices, pool, theta, dense, permutation, num_embeddings, padding_idx,
                     HFH_WEIGHT_ARGUMENTS);
}

std::tuple<at::Tensor, at::Tensor> embedding_bag(
    const at::Tensor& indices, const at::Tensor& offsets, const at::Tensor& pool,
    const at::Tensor& theta, const std::optional<at::Tensor>& dense,
    const std::optional<at::Tensor>& permutation,
    const std::optional<at::Tensor>& per_sample_weights, int64_t num_embeddings,
    int64_t embedding_dim, c10::string_view mode, bool include_last_offset, int64_t padding_idx,
    HFH_WEIGHT_PARAMETERS) {
  if (takes(backend, cuda_ops::why_not_embedding_bag(pool, theta, num_embeddings, embedding_dim,
                                                     mode, HFH_WEIGHT_ARGUMENTS))) {
    return cuda_ops::embedding_bag(indices, offsets, pool, theta, dense, permutation,
                                   per_sample_weights, num_embeddings, embedding_dim, mode,
                                   include_last_offset, padding_idx, HFH_WEIGHT_ARGUMENTS);
  }
  static const auto triton = triton_operator<decltype(embedding_bag)>("hfh::triton_embedding_bag");
  return triton.call(indices, offsets, pool, theta, dense, permutation, per_sample_weights,
                     num_embeddings, embedding_dim, mode, include_last_offset, padding_idx,
                     HFH_WEIGHT_ARGUMENTS);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> embedding_bag_backward(
    const at::Tensor& grad, const at::Tensor& winners, const at::Tensor& indices,
    const at::Tensor& offsets, const at::Tensor& pool, const at::Tensor& theta,
    const std::optional<at::Tensor>& dense, const std::optional<at::Tensor>& permutation,
    const std::optional<at::Tensor>& per_sample_weights, int64_t num_embeddings,
    c10::string_view mode, bool include_last_offset, int64_t padding_idx, HFH_WEIGHT_PARAMETERS) {
  if (takes(backend, cuda_ops::why_not_embedding_bag(pool, theta, num_embeddings, last_size(grad),
                                                     mode, HFH_WEIGHT_ARGUMENTS))) {
    return cuda_ops::embedding_bag_backward(grad, winners, indices, offsets, pool, theta, dense,
                                            permutation, per_sample_weights, num_embeddings, mode,
                                            include_last_offset, padding_idx, HFH_WEIGHT_ARGUMENTS);
  }
  static const auto triton =
      triton_operator<decltype(embedding_bag_backward)>("hfh::triton_embedding_bag_backward");
  return triton.call(grad, winners, indices, offsets, pool, theta, dense, permutation,
                     per_sample_weights, num_embeddings, mode, include_last_offset, padding_idx,
                     HFH_WEIGHT_ARGUMENTS);
}

TORCH_LIBRARY_IMPL(hfh, CUDA, m) {
  m.impl("embedding", TORCH_FN(embedding));
  m.impl("embedding_backward", TORCH_FN(embedding_backward));
  m.impl("embedding_bag", TORCH_FN(embedding_bag));
  m.impl("embedding_bag_backward", TORCH_FN(embedding_bag_backward));
  m.impl("linear", TORCH_FN(linear));
  m.impl("linear_backward_input", TORCH_FN(linear_backward_input));
  m.impl("linear_backward_weight", TORCH_FN(linear_backward_weight));
  m.impl("materialize", TORCH_FN(materialize));
  m.impl("materialize_backward", TORCH_FN(materialize_backward));
}

}  // namespace

}  // namespace hfh::torch_ops
