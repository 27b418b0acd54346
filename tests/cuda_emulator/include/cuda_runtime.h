#pragma once

#include <math.h>

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

// As much of CUDA as the kernels use, for a C++ compiler: see emulator.h.

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

/// Of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

#define HFH_EMULATOR_VECTORS(type, scalar)                             \
  struct alignas(2 * sizeof(scalar)) type##2 { scalar x, y; };         \
  struct alignas(4 * sizeof(scalar)) type##4 { scalar x, y, z, w; };   \
  inline type##2 make_##type##2(scalar x, scalar y) { return {x, y}; } \
  inline type##4 make_##type##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
HFH_EMULATOR_VECTORS(float, float)
HFH_EMULATOR_VECTORS(int, int)
HFH_EMULATOR_VECTORS(uint, unsigned)
#undef HFH_EMULATOR_VECTORS

template <class A, class B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) {
    return a < b || b != b ? a : b;
  } else {
    return static_cast<std::common_type_t<A, B>>(a) < static_cast<std::common_type_t<A, B>>(b) ? a
                                                                                               : b;
  }
}
template <class A, class B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) {
    return a > b || b != b ? a : b;
  } else {
    return static_cast<std::common_type_t<A, B>>(a) > static_cast<std::common_type_t<A, B>>(b) ? a
                                                                                               : b;
  }
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i);
    const auto byte = static_cast<unsigned>(bytes >> (8 * (choice & 7))) & 0xff;
    // Bit 3 of a choice asks for the byte's sign, eight times.
    const unsigned chosen = choice & 8 ? (byte & 0x80 ? 0xff : 0) : byte;
    result |= chosen << (8 * i);
  }
  return result;
}
inline long long __float2ll_rn(float x) {
  constexpr float kEnd = 0x1p63f;
  if (x != x) return std::numeric_limits<long long>::min();
  if (x >= kEnd) return std::numeric_limits<long long>::max();
  if (x < -kEnd) return std::numeric_limits<long long>::min();
  return llrintf(x);
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

// One thread of the machine runs them all: a plain addition is an atomic one.
template <class T>
  requires std::same_as<T, float> || std::same_as<T, int> || std::same_as<T, unsigned> ||
           std::same_as<T, unsigned long long>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
  requires std::same_as<T, int> || std::same_as<T, unsigned>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}
inline unsigned atomicCAS(unsigned* address, unsigned compare, unsigned value) {
  const unsigned old = *address;
  if (old == compare) *address = value;
  return old;
}
inline void __threadfence() {}

inline void __syncthreads() { cuda_emulator::synchronize_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_emulator::synchronize_warp(mask); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_emulator::vote(cuda_emulator::Vote::kBallot, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(cuda_emulator::vote(cuda_emulator::Vote::kAny, mask, predicate != 0));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(cuda_emulator::vote(cuda_emulator::Vote::kAll, mask, predicate != 0));
}

namespace cuda_emulator {

template <class T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int operand, int width) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return cuda_emulator::shuffle_value(cuda_emulator::Shuffle::kIndex, mask, value, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  return cuda_emulator::shuffle_value(cuda_emulator::Shuffle::kUp, mask, value,
                                      static_cast<int>(lanes), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  return cuda_emulator::shuffle_value(cuda_emulator::Shuffle::kDown, mask, value,
                                      static_cast<int>(lanes), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return cuda_emulator::shuffle_value(cuda_emulator::Shuffle::kXor, mask, value, lanes, width);
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

/// Of the last call that failed.
const char* cudaGetErrorString(cudaError_t status);

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind kind,
                            cudaStream_t stream);

namespace cuda_emulator {

cudaError_t set_shared_bytes(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& call);

}  // namespace cuda_emulator

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cuda_emulator::set_shared_bytes(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  return cuda_emulator::launch(*config, reinterpret_cast<const void*>(kernel),
                               [&] { std::apply(kernel, values); });
}
