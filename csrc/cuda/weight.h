#pragma once

#include <cuda_runtime.h>

#include "hfh/hash.h"
#include "hfh/params.h"

// A virtual weight as kernels receive it.

namespace hfh::cuda {

/// `theta` is float32 on the device, without the scale: nothing of it is known to the host.
struct DeviceWeight : VirtualWeight {
  float scale;
};

/// g's parameter i, the scale folded into the last layer. HashedNets' mixing weight, which is in no
/// theta, is 1.
__device__ __forceinline__ float theta_value(const DeviceWeight& weight, int i) {
  const ReconstructParams& g = weight.reconstruct;
  const auto* theta = static_cast<const float*>(weight.theta);
  const int size = theta_size(weight.hash.num_hashes, g.depth, g.width);
  const int last_layer = g.depth == 1 ? 0 : size - g.width - 1;
  return (theta == nullptr ? 1.0f : theta[i]) * (i < last_layer ? 1.0f : weight.scale);
}

}  // namespace hfh::cuda
