#include <ATen/ATen.h>
#include <torch/library.h>

#include "torch/autograd.h"

// Autograd of hfh::embedding and hfh::embedding_bag; see torch/autograd.h.

namespace hfh::torch_ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

Tensor call_embedding(const Tensor& indices, const Tensor& pool, const Tensor& theta,
                      const OptionalTensor& dense, const OptionalTensor& permutation,
                      int64_t num_embeddings, int64_t embedding_dim, int64_t padding_idx,
                      HFH_WEIGHT_PARAMETERS) {
  static const auto op = find_operator<decltype(call_embedding)>("hfh::embedding");
  return op.call(indices, pool, theta, dense, permutation, num_embeddings, embedding_dim,
                 padding_idx, HFH_WEIGHT_ARGUMENTS);
}

std::tuple<Tensor, Tensor, Tensor> call_embedding_backward(
    const Tensor& grad, const Tensor& indices, const Tensor& pool, const Tensor& theta,
    const OptionalTensor& dense, const OptionalTensor& permutation, int64_t num_embeddings,
    int64_t padding_idx, HFH_WEIGHT_PARAMETERS) {
  static const auto op =
      find_operator<decltype(call_embedding_backward)>("hfh::embedding_backward");
  return op.call(grad, indices, pool, theta, dense, permutation, num_embeddings, padding_idx,
                 HFH_WEIGHT_ARGUMENTS);
}

std::tuple<Tensor, Tensor> call_embedding_bag(
    const Tensor& indices, const Tensor& offsets, const Tensor& pool, const Tensor& theta,
    const OptionalTensor& dense, const OptionalTensor& permutation,
    const OptionalTensor& per_sample_weights, int64_t num_embeddings, int64_t embedding_dim,
    c10::string_view mode, bool include_last_offset, int64_t padding_idx, HFH_WEIGHT_PARAMETERS) {
  static const auto op = find_operator<decltype(call_embedding_bag)>("hfh::embedding_bag");
  return op.call(indices, offsets, pool, theta, dense, permutation, per_sample_weights,
                 num_embeddings, embedding_dim, mode, include_last_offset, padding_idx,
                 HFH_WEIGHT_ARGUMENTS);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> call_embedding_bag_backward(
    const Tensor& grad, const Tensor& winners, const Tensor& indices, const Tensor& offsets,
    const Tensor& pool, const Tensor& theta, const OptionalTensor& dense,
    const OptionalTensor& permutation, const OptionalTensor& per_sample_weights,
    int64_t num_embeddings, c10::string_view mode, bool include_last_offset, int64_t padding_idx,
    HFH_WEIGHT_PARAMETERS) {
  static const auto op =
      find_operator<decltype(call_embedding_bag_backward)>("hfh::embedding_bag_backward");
  return op.call(grad, winners, indices, offsets, pool, theta, dense, permutation,
                 per_sample_weights, num_embeddings, mode, include_last_offset, padding_idx,
                 HFH_WEIGHT_ARGUMENTS);
}

OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

bool needs_graph_of(const OptionalTensor& tensor) {
  return tensor.has_value() && needs_graph({&*tensor});
}

struct Embedding : torch::autograd::Function<Embedding> {
  static Tensor forward(AutogradContext* ctx, const Tensor& indices, const Tensor& pool,
                        const Tensor& theta, const OptionalTensor& dense,
                        const OptionalTensor& permutation, int64_t num_embeddings,
                        int64_t embedding_dim, int64_t padding_idx, const c10::IValue& weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(
        {indices, pool, theta, dense.value_or(Tensor()), permutation.value_or(Tensor())});
    ctx->saved_data["num_embeddings"] = num_embeddings;
    ctx->saved_data["padding_idx"] = padding_idx;
    ctx->saved_data["weight"] = weight;
    return call_with_weight(call_embedding, weight, indices, pool, theta, dense, permutation,
                            num_embeddings, embedding_dim, padding_idx);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &pool = saved[1], &theta = saved[2], &dense = saved[3];
    variable_list result(9);
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(result[1], result[2], result[3]) = call_with_weight(
          call_embedding_backward, ctx->saved_data["weight"], grads[0], saved[0], pool, theta,
          if_defined(dense), if_defined(saved[4]), ctx->saved_data["num_embeddings"].toInt(),
          ctx->saved_data["padding_idx"].toInt());
    }
    if (!dense.defined()) result[3] = Tensor();
    variable_list inputs{pool, theta, grads[0]};
    if (dense.defined()) inputs.push_back(dense);
    return differentiable_once(std::move(result), inputs);
  }
};

Tensor embedding(const Tensor& indices, const Tensor& pool, const Tensor& theta,
                 const OptionalTensor& dense, const OptionalTensor& permutation,
                 int64_t num_embeddings, int64_t embedding_dim, int64_t padding_idx,
                 HFH_WEIGHT_PARAMETERS) {
  if (needs_graph({&pool, &theta}) || needs_graph_of(dense)) {
    return Embedding::apply(indices, pool, theta, dense, permutation, num_embeddings, embedding_dim,
                            padding_idx, pack(HFH_WEIGHT_ARGUMENTS));
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_embedding(indices, pool, theta, dense, permutation, num_embeddings, embedding_dim,
                        padding_idx, HFH_WEIGHT_ARGUMENTS);
}

struct EmbeddingBag : torch::autograd::Function<EmbeddingBag> {
  static variable_list forward(AutogradContext* ctx, const Tensor& indices, const Tensor& offsets,
                               const Tensor& pool, const Tensor& theta, const OptionalTensor& dense,
                               const OptionalTensor& permutation,
                               const OptionalTensor& per_sample_weights, int64_t num_embeddings,
                               int64_t embedding_dim, const std::string& mode,
                               bool include_last_offset, int64_t padding_idx,
                               const c10::IValue& weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [output, winners] = call_with_weight(
        call_embedding_bag, weight, indices, offsets, pool, theta, dense, permutation,
        per_sample_weights, num_embeddings, embedding_dim, mode, include_last_offset, padding_idx);
    ctx->save_for_backward({indices, offsets, pool, theta, dense.value_or(Tensor()),
                            permutation.value_or(Tensor()), per_sample_weights.value_or(Tensor()),
                            winners});
    ctx->mark_non_differentiable({winners});
    ctx->saved_data["num_embeddings"] = num_embeddings;
    ctx->saved_data["mode"] = mode;
    ctx->saved_data["include_last_offset"] = include_last_offset;
    ctx->saved_data["padding_idx"] = padding_idx;
    ctx->saved_data["weight"] = weight;
    return {output, winners};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &pool = saved[2], &theta = saved[3], &dense = saved[4], &factors = saved[6];
    variable_list result(13);
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(result[2], result[3], result[4], result[6]) = call_with_weight(
          call_embedding_bag_backward, ctx->saved_data["weight"], grads[0], saved[7], saved[0],
          saved[1], pool, theta, if_defined(dense), if_defined(saved[5]), if_defined(factors),
          ctx->saved_data["num_embeddings"].toInt(), ctx->saved_data["mode"].toStringRef(),
          ctx->saved_data["include_last_offset"].toBool(), ctx->saved_data["padding_idx"].toInt());
    }
    variable_list inputs{pool, theta, grads[0]};
    for (const int64_t i : {4, 6}) {
      if (saved[i].defined()) {
        inputs.push_back(saved[i]);
      } else {
        result[i] = Tensor();
      }
    }
    return differentiable_once(std::move(result), inputs);
  }
};

std::tuple<Tensor, Tensor> embedding_bag(
    const Tensor& indices, const Tensor& offsets, const Tensor& pool, const Tensor& theta,
    const OptionalTensor& dense, const OptionalTensor& permutation,
    const OptionalTensor& per_sample_weights, int64_t num_embeddings, int64_t embedding_dim,
    c10::string_view mode, bool include_last_offset, int64_t padding_idx, HFH_WEIGHT_PARAMETERS) {
  if (needs_graph({&pool, &theta}) || needs_graph_of(dense) || needs_graph_of(per_sample_weights)) {
    const variable_list results =
        EmbeddingBag::apply(indices, offsets, pool, theta, dense, permutation, per_sample_weights,
                            num_embeddings, embedding_dim, std::string(mode), include_last_offset,
                            padding_idx, pack(HFH_WEIGHT_ARGUMENTS));
    return {results[0], results[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_embedding_bag(indices, offsets, pool, theta, dense, permutation, per_sample_weights,
                            num_embeddings, embedding_dim, mode, include_last_offset, padding_idx,
                            HFH_WEIGHT_ARGUMENTS);
}

TORCH_LIBRARY_IMPL(hfh, Autograd, m) {
  m.impl("embedding", TORCH_FN(embedding));
  m.impl("embedding_bag", TORCH_FN(embedding_bag));
}

}  // namespace

}  // namespace hfh::torch_ops
