#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>

// The functions of the CUDA runtime: what they do, they do at once.

namespace {

constexpr size_t kSharedWithoutAsking = 48 * 1024;

thread_local std::string last_error;
thread_local std::unordered_map<const void*, size_t> shared_bytes_of;

cudaError_t refuse(cudaError_t status, const std::string& reason) {
  last_error = reason;
  return status;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : last_error.c_str();
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return refuse(cudaErrorInvalidValue, "no such device");
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_emulator::processors();
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(cuda_emulator::shared_bytes_per_block());
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = cuda_emulator::capability() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = cuda_emulator::capability() % 10;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t) {
  std::memset(to, byte, count);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind,
                            cudaStream_t) {
  std::memmove(to, from, count);
  return cudaSuccess;
}

namespace cuda_emulator {

cudaError_t set_shared_bytes(const void* kernel, cudaFuncAttribute, int value) {
  const size_t limit = shared_bytes_per_block();
  if (value < 0 || static_cast<size_t>(value) > limit) {
    return refuse(cudaErrorInvalidValue,
                  std::to_string(value) + " bytes of shared memory, of " + std::to_string(limit));
  }
  shared_bytes_of[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& call) {
  const auto asked = shared_bytes_of.find(kernel);
  const size_t limit = asked == shared_bytes_of.end()
                           ? kSharedWithoutAsking
                           : std::max(asked->second, kSharedWithoutAsking);
  if (config.dynamicSmemBytes > limit) {
    return refuse(cudaErrorInvalidValue,
                  std::to_string(config.dynamicSmemBytes) + " bytes of shared memory, but only " +
                      std::to_string(limit) + " were asked for with cudaFuncSetAttribute");
  }
  const std::string error =
      run({config.gridDim.x, config.blockDim.x, config.dynamicSmemBytes}, call);
  return error.empty() ? cudaSuccess : refuse(cudaErrorLaunchFailure, error);
}

}  // namespace cuda_emulator
