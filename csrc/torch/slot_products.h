#pragma once

#include "cpu/kernels.h"

namespace hfh::torch_ops {

/// output = input V^T + bias, added up from slot products (see cpu/slots.cpp), where that is
/// possible and takes the fewest operations; returns whether it is.
bool slot_products_forward(const VirtualWeight& weight, const cpu::LinearBatch& args);

}  // namespace hfh::torch_ops
