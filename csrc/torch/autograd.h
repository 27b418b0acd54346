#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "torch/weight.h"

// Autograd of torch.ops.hfh, for every device: it calls the operators through the dispatcher, so
// whichever kernel serves the tensors serves their gradients too. In C++ because the wrapper that
// Python would put around each call costs more than a small layer.

namespace hfh::torch_ops {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// The weight's arguments as one value that an autograd node can keep.
c10::IValue pack(HFH_WEIGHT_PARAMETERS);

/// Calls `f` with the weight's arguments behind its own.
template <class F, class... Args>
auto call_with_weight(const F& f, const c10::IValue& packed, const Args&... args) {
  const auto w = packed.toTupleRef().elements().asArrayRef();
  return f(args..., w[0].toInt(), w[1].toInt(), w[2].toInt(), w[3].toInt(), w[4].toInt(),
           w[5].toInt(), w[6].toInt(), w[7].toStringRef(), w[8].toDouble(), w[9].toInt(),
           w[10].toInt(), w[11].toStringRef());
}

/// Where a graph of the backward pass is asked for, makes a second backward an error instead of a
/// silent zero: whoever differentiates `gradients` comes upon it on every way to `inputs`.
torch::autograd::variable_list differentiable_once(torch::autograd::variable_list gradients,
                                                   const torch::autograd::variable_list& inputs);

/// Whether a result of these tensors is to be differentiated; undefined ones do not count.
bool needs_graph(std::initializer_list<const at::Tensor*> tensors);

}  // namespace hfh::torch_ops
