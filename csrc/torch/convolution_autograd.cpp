#include <torch/library.h>

#include "torch/autograd.h"
#include "torch/convolution.h"

namespace hfh::torch_ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor call_conv2d(const Tensor& input, const Tensor& pool, const Tensor& theta,
                   const std::optional<Tensor>& bias, int64_t out_channels, HFH_GEOMETRY_PARAMETERS,
                   HFH_WEIGHT_PARAMETERS) {
  static const auto op = find_operator<decltype(call_conv2d)>("hfh::conv2d");
  return op.call(input, pool, theta, bias, out_channels, HFH_GEOMETRY_ARGUMENTS,
                 HFH_WEIGHT_ARGUMENTS);
}

Tensor call_conv2d_backward_input(const Tensor& grad_output, const Tensor& pool,
                                  const Tensor& theta, c10::SymIntArrayRef input_size,
                                  HFH_GEOMETRY_PARAMETERS, HFH_WEIGHT_PARAMETERS) {
  static const auto op =
      find_operator<decltype(call_conv2d_backward_input)>("hfh::conv2d_backward_input");
  return op.call(grad_output, pool, theta, input_size, HFH_GEOMETRY_ARGUMENTS,
                 HFH_WEIGHT_ARGUMENTS);
}

std::tuple<Tensor, Tensor> call_conv2d_backward_weight(const Tensor& grad_output,
                                                       const Tensor& input, const Tensor& pool,
                                                       const Tensor& theta, HFH_GEOMETRY_PARAMETERS,
                                                       HFH_WEIGHT_PARAMETERS) {
  static const auto op =
      find_operator<decltype(call_conv2d_backward_weight)>("hfh::conv2d_backward_weight");
  return op.call(grad_output, input, pool, theta, HFH_GEOMETRY_ARGUMENTS, HFH_WEIGHT_ARGUMENTS);
}

/// The geometry's and the weight's arguments as one value each that an autograd node can keep.
struct Arguments {
  c10::IValue geometry, weight;

  static c10::IValue pack_geometry(HFH_GEOMETRY_PARAMETERS) {
    return c10::ivalue::Tuple::create(
        {kernel_size.vec(), stride.vec(), padding.vec(), dilation.vec(), groups});
  }
  /// Calls `f` with those arguments behind its own.
  template <class F, class... Args>
  auto call(const F& f, const Args&... args) const {
    const auto g = geometry.toTupleRef().elements().asArrayRef();
    const auto kernel_size = g[0].toIntVector(), stride = g[1].toIntVector(),
               padding = g[2].toIntVector(), dilation = g[3].toIntVector();
    const auto with_geometry = [&](const auto&... weight_arguments) {
      return f(args..., kernel_size, stride, padding, dilation, g[4].toInt(), weight_arguments...);
    };
    return call_with_weight(with_geometry, weight);
  }
};

struct Conv2d : torch::autograd::Function<Conv2d> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& pool,
                        const Tensor& theta, const std::optional<Tensor>& bias,
                        int64_t out_channels, const c10::IValue& geometry,
                        const c10::IValue& weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({input, pool, theta});
    ctx->saved_data["geometry"] = geometry;
    ctx->saved_data["weight"] = weight;
    ctx->saved_data["has_bias"] = bias.has_value();
    return Arguments{geometry, weight}.call(call_conv2d, input, pool, theta, bias, out_channels);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &pool = saved[1], &theta = saved[2], &grad = grads[0];
    const Arguments arguments{ctx->saved_data["geometry"], ctx->saved_data["weight"]};
    variable_list result(7);
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      if (ctx->needs_input_grad(0)) {
        result[0] =
            arguments.call(call_conv2d_backward_input, grad, pool, theta, input.sym_sizes());
      }
      if (ctx->needs_input_grad(1) || ctx->needs_input_grad(2)) {
        std::tie(result[1], result[2]) =
            arguments.call(call_conv2d_backward_weight, grad, input, pool, theta);
      }
      if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3)) {
        result[3] = grad.sum(at::IntArrayRef{0, 2, 3});
      }
    }
    return differentiable_once(std::move(result), {input, pool, theta, grad});
  }
};

Tensor conv2d(const Tensor& input, const Tensor& pool, const Tensor& theta,
              const std::optional<Tensor>& bias, int64_t out_channels, HFH_GEOMETRY_PARAMETERS,
              HFH_WEIGHT_PARAMETERS) {
  if (needs_graph({&input, &pool, &theta}) || (bias.has_value() && needs_graph({&*bias}))) {
    return Conv2d::apply(input, pool, theta, bias, out_channels,
                         Arguments::pack_geometry(HFH_GEOMETRY_ARGUMENTS),
                         pack(HFH_WEIGHT_ARGUMENTS));
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_conv2d(input, pool, theta, bias, out_channels, HFH_GEOMETRY_ARGUMENTS,
                     HFH_WEIGHT_ARGUMENTS);
}

TORCH_LIBRARY_IMPL(hfh, Autograd, m) { m.impl("conv2d", TORCH_FN(conv2d)); }

}  // namespace

}  // namespace hfh::torch_ops
