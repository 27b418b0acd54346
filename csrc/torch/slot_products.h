#pragma once

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "torch/weight.h"

namespace hfh::torch_ops {

/// output = input V^T + bias, added up from slot products (see cpu/slots.cpp), where that is
/// possible and takes the fewest operations; returns whether it is.
bool slot_products_forward(const VirtualWeight& weight, const cpu::LinearBatch& args);

/// Likewise as `Kernels::linear_backward_input`, for all columns.
bool slot_products_backward_input(const VirtualWeight& weight, const cpu::LinearBatch& args);

/// Likewise adds to the gradients of a float32 or bfloat16 pool and of g's parameters; `args` are
/// the forward pass's, whose output and bias do not matter.
bool slot_products_backward_weight(const VirtualWeight& weight, const cpu::LinearBatch& args,
                                   const float* grad_output, float* grad_pool,
                                   std::vector<double>& grad_theta);

/// Whether these take fewer operations, in float32, than bfloat16 products with the weights.
bool prefers_slot_products_bfloat16(const VirtualWeight& weight, int64_t out_features,
                                    int64_t in_features, int64_t batch);
bool prefers_slots_backward_input_bfloat16(const VirtualWeight& weight, int64_t out_features,
                                           int64_t in_features, int64_t batch);
bool prefers_slots_backward_weight_bfloat16(const VirtualWeight& weight, int64_t out_features,
                                            int64_t in_features, int64_t batch);

/// Calls `f(begin, end)` for parts of a bfloat16 batch of that many features in and out, small
/// enough to be held in float32.
template <class F>
void for_each_float_part(const CheckedWeight& weight, int64_t batch, const F& f) {
  constexpr int64_t kFloats = 1 << 20, kInputs = cpu::BatchSlotProducts::kInputs;
  const int64_t features = weight.rows() + weight.cols();
  const int64_t at_once = std::max(kInputs, kFloats / features / kInputs * kInputs);
  for (int64_t begin = 0; begin < batch; begin += at_once) {
    f(begin, std::min(batch, begin + at_once));
  }
}

}  // namespace hfh::torch_ops
