#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace hfh::torch_ops {

/// output = input V^T + bias, added up from slot products (see cpu/slots.cpp), where that is
/// possible and takes the fewest operations; returns whether it is.
bool slot_products_forward(const VirtualWeight& weight, const cpu::LinearBatch& args);

/// Whether that takes fewer operations than the product of bfloat16 inputs with the weights.
bool prefers_slot_products_bfloat16(const VirtualWeight& weight, int64_t out_features,
                                    int64_t in_features, int64_t batch);

/// Likewise as `Kernels::linear_backward_input`, for all columns.
bool slot_products_backward_input(const VirtualWeight& weight, const cpu::LinearBatch& args);

/// Likewise adds to the gradients of a float32 or bfloat16 pool and of g's parameters; `args` are
/// the forward pass's, whose output and bias do not matter.
bool slot_products_backward_weight(const VirtualWeight& weight, const cpu::LinearBatch& args,
                                   const float* grad_output, float* grad_pool,
                                   std::vector<double>& grad_theta);

}  // namespace hfh::torch_ops
