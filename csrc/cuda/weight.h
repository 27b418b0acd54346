#pragma once

#include <cuda_runtime.h>

#include "hfh/hash.h"
#include "hfh/params.h"

// A virtual weight as kernels receive it.

namespace hfh::cuda {

/// Rows and columns are counted in int where kernels say so, and lanes may reach beyond the last.
inline constexpr int64_t kMaxExtent = (int64_t{1} << 31) - (int64_t{1} << 16);

/// `theta` is float32 on the device, without the scale: nothing of it is known to the host.
struct DeviceWeight : VirtualWeight {
  float scale;
};

/// g's parameter i, the scale folded into the last layer. HashedNets' mixing weight, which is in no
/// theta, is 1.
__device__ __forceinline__ float theta_value(const DeviceWeight& weight, int i) {
  const ReconstructParams& g = weight.reconstruct;
  const auto* theta = static_cast<const float*>(weight.theta);
  const bool is_scaled = i >= first_scaled(weight.hash.num_hashes, g.depth, g.width);
  return (theta == nullptr ? 1.0f : theta[i]) * (is_scaled ? weight.scale : 1.0f);
}

}  // namespace hfh::cuda
