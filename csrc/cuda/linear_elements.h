#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/linear.h"

// `linear_small` where g is linear (depth 1): products with the elements, and no weights.

namespace hfh::cuda {

int num_parts_of_elements(const DeviceWeight& weight, const LinearSmall& linear,
                          const Device& device);

void linear_elements(const DeviceWeight& weight, const LinearSmall& linear, float* workspace,
                     const Device& device, cudaStream_t stream);

}  // namespace hfh::cuda
