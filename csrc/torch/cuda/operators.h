#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "torch/weight.h"

// The operators of torch.ops.hfh that have CUDA kernels; arguments and results as their schemas in
// hfh_kernels/ops. Each raises a RuntimeError with the reason where its kernels cannot run.

namespace hfh::torch_ops::cuda_ops {

at::Tensor materialize(const at::Tensor& pool, const at::Tensor& theta, int64_t rows, int64_t cols,
                       HFH_WEIGHT_PARAMETERS);

std::tuple<at::Tensor, at::Tensor> materialize_backward(const at::Tensor& grad,
                                                        const at::Tensor& pool,
                                                        const at::Tensor& theta,
                                                        HFH_WEIGHT_PARAMETERS);

/// Why an operator has no kernel for its arguments, or leaves them to others; empty where it has.
std::string why_not_linear(const at::Tensor& input, const at::Tensor& pool, const at::Tensor& theta,
                           int64_t out_features, HFH_WEIGHT_PARAMETERS);
std::string why_not_linear_backward_input(const at::Tensor& grad_output, const at::Tensor& pool,
                                          const at::Tensor& theta, int64_t in_features,
                                          HFH_WEIGHT_PARAMETERS);

std::string why_not_linear_backward_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                           const at::Tensor& pool, const at::Tensor& theta,
                                           HFH_WEIGHT_PARAMETERS);
std::string why_not_materialize_backward(const at::Tensor& grad, const at::Tensor& pool,
                                         const at::Tensor& theta, HFH_WEIGHT_PARAMETERS);

/// Where algorithms have to be deterministic, cuBLAS's products may refuse, and automatic choice
/// leaves what needs them to Triton; empty elsewhere.
std::string why_not_platform_product(c10::string_view backend);

/// `backend` may name the kernel: "cuda:slot_products" (no weights at all), "cuda:tiles" (weights
/// in registers) or "cuda:panels" (a panel of weights, then the platform's product).

at::Tensor linear(const at::Tensor& input, const at::Tensor& pool, const at::Tensor& theta,
                  const std::optional<at::Tensor>& bias, int64_t out_features,
                  HFH_WEIGHT_PARAMETERS);

at::Tensor linear_backward_input(const at::Tensor& grad_output, const at::Tensor& pool,
                                 const at::Tensor& theta, int64_t in_features,
                                 HFH_WEIGHT_PARAMETERS);

std::tuple<at::Tensor, at::Tensor> linear_backward_weight(const at::Tensor& grad_output,
                                                          const at::Tensor& input,
                                                          const at::Tensor& pool,
                                                          const at::Tensor& theta,
                                                          HFH_WEIGHT_PARAMETERS);

/// Why the operators of embeddings, or of bags, have no kernel for a table; empty where they have.
std::string why_not_embedding(const at::Tensor& pool, const at::Tensor& theta,
                              int64_t num_embeddings, int64_t embedding_dim, HFH_WEIGHT_PARAMETERS);
std::string why_not_embedding_bag(const at::Tensor& pool, const at::Tensor& theta,
                                  int64_t num_embeddings, int64_t embedding_dim,
                                  c10::string_view mode, HFH_WEIGHT_PARAMETERS);

at::Tensor embedding(const at::Tensor& indices, const at::Tensor& pool, const at::Tensor& theta,
                     const std::optional<at::Tensor>& dense,
                     const std::optional<at::Tensor>& permutation, int64_t num_embeddings,
                     int64_t embedding_dim, int64_t padding_idx, HFH_WEIGHT_PARAMETERS);

std::tuple<at::Tensor, at::Tensor, at::Tensor> embedding_backward(
    const at::Tensor& grad, const at::Tensor& indices, const at::Tensor& pool,
    const at::Tensor& theta, const std::optional<at::Tensor>& dense,
    const std::optional<at::Tensor>& permutation, int64_t num_embeddings, int64_t padding_idx,
    HFH_WEIGHT_PARAMETERS);

/// Of the modes "sum" and "mean"; nobody wins.
std::tuple<at::Tensor, at::Tensor> embedding_bag(
    const at::Tensor& indices, const at::Tensor& offsets, const at::Tensor& pool,
    const at::Tensor& theta, const std::optional<at::Tensor>& dense,
    const std::optional<at::Tensor>& permutation,
    const std::optional<at::Tensor>& per_sample_weights, int64_t num_embeddings,
    int64_t embedding_dim, c10::string_view mode, bool include_last_offset, int64_t padding_idx,
    HFH_WEIGHT_PARAMETERS);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> embedding_bag_backward(
    const at::Tensor& grad, const at::Tensor& winners, const at::Tensor& indices,
    const at::Tensor& offsets, const at::Tensor& pool, const at::Tensor& theta,
    const std::optional<at::Tensor>& dense, const std::optional<at::Tensor>& permutation,
    const std::optional<at::Tensor>& per_sample_weights, int64_t num_embeddings,
    c10::string_view mode, bool include_last_offset, int64_t padding_idx, HFH_WEIGHT_PARAMETERS);

}  // namespace hfh::torch_ops::cuda_ops
