#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

// Launches, and what they need to know of the device. Nothing here synchronises or allocates, so
// all of it may be captured in a CUDA graph.

namespace hfh::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
};

/// Queues `kernel` on `stream`; every size must be positive.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
            const Arguments&... arguments) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (grid.blocks > kMostBlocks) {
    throw std::runtime_error(std::string(name) + ": a launch has at most " +
                             std::to_string(kMostBlocks) + " thread blocks, this needs " +
                             std::to_string(grid.blocks));
  }
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  if (grid.shared_bytes > kSharedWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

/// What launchers choose by, of the current device.
struct Device {
  int processors;       // streaming multiprocessors
  size_t shared_bytes;  // that one block can have
  int capability;       // 90 for compute capability 9.0
};

inline Device current_device() {
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const auto attribute = [index](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, index), "cudaDeviceGetAttribute");
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount),
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
          10 * attribute(cudaDevAttrComputeCapabilityMajor) +
              attribute(cudaDevAttrComputeCapabilityMinor)};
}

}  // namespace hfh::cuda
