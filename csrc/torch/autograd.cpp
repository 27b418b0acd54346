#include "torch/autograd.h"

#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

namespace hfh::torch_ops {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

c10::IValue pack(HFH_WEIGHT_PARAMETERS) {
  return c10::ivalue::Tuple::create({seed, num_hashes, block, window, rows_per_window, depth, width,
                                     std::string(activation), scale, row_offset, col_offset,
                                     std::string(backend)});
}

variable_list differentiable_once(variable_list gradients, const variable_list& inputs) {
  if (!at::GradMode::is_enabled()) return gradients;
  variable_list guarded;
  for (const Tensor& gradient : gradients) {
    if (gradient.defined()) guarded.push_back(gradient.detach().requires_grad_());
  }
  guarded.insert(guarded.end(), inputs.begin(), inputs.end());
  const auto error = std::make_shared<torch::autograd::DelayedError>(
      "the hfh kernels are differentiable once; backend='reference' is twice differentiable",
      static_cast<int64_t>(guarded.size()));
  guarded = (*error)(std::move(guarded));
  size_t next = 0;
  for (Tensor& gradient : gradients) {
    if (gradient.defined()) gradient = guarded[next++];
  }
  return gradients;
}

bool needs_graph(std::initializer_list<const Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor* tensor : tensors) {
    if (tensor->defined() && tensor->requires_grad()) return true;
  }
  return false;
}

namespace {

Tensor call_materialize(const Tensor& pool, const Tensor& theta, int64_t rows, int64_t cols,
                        HFH_WEIGHT_PARAMETERS) {
  static const auto op = find_operator<decltype(call_materialize)>("hfh::materialize");
  return op.call(pool, theta, rows, cols, HFH_WEIGHT_ARGUMENTS);
}

std::tuple<Tensor, Tensor> call_materialize_backward(const Tensor& grad, const Tensor& pool,
                                                     const Tensor& theta, HFH_WEIGHT_PARAMETERS) {
  static const auto op =
      find_operator<decltype(call_materialize_backward)>("hfh::materialize_backward");
  return op.call(grad, pool, theta, HFH_WEIGHT_ARGUMENTS);
}

Tensor call_linear(const Tensor& input, const Tensor& pool, const Tensor& theta,
                   const std::optional<Tensor>& bias, int64_t out_features, HFH_WEIGHT_PARAMETERS) {
  static const auto op = find_operator<decltype(call_linear)>("hfh::linear");
  return op.call(input, pool, theta, bias, out_features, HFH_WEIGHT_ARGUMENTS);
}

Tensor call_linear_backward_input(const Tensor& grad_output, const Tensor& pool,
                                  const Tensor& theta, int64_t in_features, HFH_WEIGHT_PARAMETERS) {
  static const auto op =
      find_operator<decltype(call_linear_backward_input)>("hfh::linear_backward_input");
  return op.call(grad_output, pool, theta, in_features, HFH_WEIGHT_ARGUMENTS);
}

std::tuple<Tensor, Tensor> call_linear_backward_weight(const Tensor& grad_output,
                                                       const Tensor& input, const Tensor& pool,
                                                       const Tensor& theta, HFH_WEIGHT_PARAMETERS) {
  static const auto op =
      find_operator<decltype(call_linear_backward_weight)>("hfh::linear_backward_weight");
  return op.call(grad_output, input, pool, theta, HFH_WEIGHT_ARGUMENTS);
}

struct Materialize : torch::autograd::Function<Materialize> {
  static Tensor forward(AutogradContext* ctx, const Tensor& pool, const Tensor& theta, int64_t rows,
                        int64_t cols, const c10::IValue& weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({pool, theta});
    ctx->saved_data["weight"] = weight;
    return call_with_weight(call_materialize, weight, pool, theta, rows, cols);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list result(5);
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(result[0], result[1]) = call_with_weight(
          call_materialize_backward, ctx->saved_data["weight"], grads[0], saved[0], saved[1]);
    }
    return differentiable_once(std::move(result), {saved[0], saved[1], grads[0]});
  }
};

Tensor materialize(const Tensor& pool, const Tensor& theta, int64_t rows, int64_t cols,
                   HFH_WEIGHT_PARAMETERS) {
  if (needs_graph({&pool, &theta})) {
    return Materialize::apply(pool, theta, rows, cols, pack(HFH_WEIGHT_ARGUMENTS));
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_materialize(pool, theta, rows, cols, HFH_WEIGHT_ARGUMENTS);
}

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& pool,
                        const Tensor& theta, const std::optional<Tensor>& bias,
                        int64_t out_features, const c10::IValue& weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({input, pool, theta});
    ctx->saved_data["weight"] = weight;
    ctx->saved_data["has_bias"] = bias.has_value();
    return call_with_weight(call_linear, weight, input, pool, theta, bias, out_features);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &pool = saved[1], &theta = saved[2], &grad = grads[0];
    const c10::IValue weight = ctx->saved_data["weight"];
    // Not size(-1), which would fix every size of a traced tensor, the batch's among them.
    const int64_t in_features = input.sym_size(-1).guard_int(__FILE__, __LINE__);
    variable_list result(6);
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      if (ctx->needs_input_grad(0)) {
        result[0] =
            call_with_weight(call_linear_backward_input, weight, grad, pool, theta, in_features);
      }
      if (ctx->needs_input_grad(1) || ctx->needs_input_grad(2)) {
        std::tie(result[1], result[2]) =
            call_with_weight(call_linear_backward_weight, weight, grad, input, pool, theta);
      }
      if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3)) {
        std::vector<int64_t> batch_dims(grad.dim() - 1);
        for (size_t i = 0; i < batch_dims.size(); ++i) batch_dims[i] = static_cast<int64_t>(i);
        result[3] = batch_dims.empty() ? grad : grad.sum(batch_dims);
      }
    }
    return differentiable_once(std::move(result), {input, pool, theta, grad});
  }
};

Tensor linear(const Tensor& input, const Tensor& pool, const Tensor& theta,
              const std::optional<Tensor>& bias, int64_t out_features, HFH_WEIGHT_PARAMETERS) {
  if (needs_graph({&input, &pool, &theta}) || (bias.has_value() && needs_graph({&*bias}))) {
    return Linear::apply(input, pool, theta, bias, out_features, pack(HFH_WEIGHT_ARGUMENTS));
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_linear(input, pool, theta, bias, out_features, HFH_WEIGHT_ARGUMENTS);
}

TORCH_LIBRARY_IMPL(hfh, Autograd, m) {
  m.impl("materialize", TORCH_FN(materialize));
  m.impl("linear", TORCH_FN(linear));
}

}  // namespace

}  // namespace hfh::torch_ops
