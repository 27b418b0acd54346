#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "hfh/params.h"

// The functions of csrc/cuda/ptx.h, which this header hides, in plain C++. What they do is written
// there.

namespace hfh::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

inline char* shared_memory() { return cuda_emulator::shared_memory(); }

/// Rounded to nearest even; any NaN becomes the instructions' own.
template <class Number>
uint32_t to_bits(float x) {
  static_assert(sizeof(Number) == 2);
  if (x != x) return 0x7fff;
  if constexpr (Number::kExponentBits == 8) {
    const auto bits = std::bit_cast<uint32_t>(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  } else {
    return std::bit_cast<uint16_t>(static_cast<_Float16>(x));
  }
}

template <class Number>
float from_bits(uint32_t bits) {
  if constexpr (Number::kExponentBits == 8) {
    return std::bit_cast<float>(bits << 16);
  } else {
    return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(bits)));
  }
}

template <class Number>
uint32_t pack(float low, float high) {
  return to_bits<Number>(high) << 16 | to_bits<Number>(low);
}

template <class Number>
uint32_t pack_relu(float low, float high) {
  const auto relu = [](float x) { return x <= 0.0f ? 0.0f : x; };
  return pack<Number>(relu(low), relu(high));
}

template <class Number>
void unpack(uint32_t packed, float& low, float& high) {
  low = from_bits<Number>(packed & 0xffff);
  high = from_bits<Number>(packed >> 16);
}

inline uint32_t opaque(uint32_t x) { return x; }

inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }

/// In float64 the product is exact, and a sum close to the middle of two results nearly always so.
inline uint32_t multiply_add_bfloat16(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [](uint32_t x, uint32_t y, uint32_t z) {
    const double product = double{from_bits<BFloat16>(x)} * from_bits<BFloat16>(y);
    return to_bits<BFloat16>(static_cast<float>(product + from_bits<BFloat16>(z)));
  };
  return one(a >> 16, b >> 16, c >> 16) << 16 | one(a >> 16, b & 0xffff, c & 0xffff);
}

/// With the error of the instruction: 2^-11 of the result.
inline float fast_tanh(float x) {
  const auto bits = std::bit_cast<uint32_t>(std::tanh(x));
  return std::bit_cast<float>((bits + 0x1000) & 0xffffe000u);
}

template <class Number>
inline constexpr auto kFormat =
    Number::kExponentBits == 8 ? cuda_emulator::Format::kBFloat16 : cuda_emulator::Format::kFloat16;

template <class Number>
void multiply_add_k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const float* c) {
  std::copy_n(c, 4, d);
  cuda_emulator::multiply_add(kFormat<Number>, 16, d, a, b);
}

template <class Number>
void multiply_add_k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float* c) {
  std::copy_n(c, 4, d);
  cuda_emulator::multiply_add(kFormat<Number>, 8, d, a, &b);
}

template <class Number>
void multiply_add_k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_add_k16<Number>(d, a, b, d);
}

inline void add_vector(float* to, float4 value) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) cuda_emulator::fail("add_vector: misaligned");
  to[0] += value.x;
  to[1] += value.y;
  to[2] += value.z;
  to[3] += value.w;
}

inline void store_streaming(uint4* to, uint4 value) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) cuda_emulator::fail("store_streaming: misaligned");
  *to = value;
}
inline uint4 load_streaming(const uint4* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    cuda_emulator::fail("load_streaming: misaligned");
  }
  return *from;
}

inline void device_assert(bool condition, const char* message) {
  if (!condition) cuda_emulator::fail(message);
}

/// Every third attempt fails.
inline bool try_add_shared_vector(float* to, float4 value, float factor) {
  static thread_local unsigned attempts = 0;
  if (++attempts % 3 == 0) return false;
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    cuda_emulator::fail("try_add_shared_vector: misaligned");
  }
  to[0] = fmaf(value.x, factor, to[0]);
  to[1] = fmaf(value.y, factor, to[1]);
  to[2] = fmaf(value.z, factor, to[2]);
  to[3] = fmaf(value.w, factor, to[3]);
  return true;
}

inline void copy_async16(void* shared, const void* global) {
  cuda_emulator::copy_async(shared, global);
}
inline void copy_async_commit() { cuda_emulator::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  cuda_emulator::copy_async_wait(kPending);
}

/// Not a constant here: the capability is chosen when the program runs.
inline bool has_bulk_copies() { return cuda_emulator::capability() >= 90; }

struct CopyBarrier {
  uint64_t state;
};

inline void copy_barrier_init(CopyBarrier* barrier) { cuda_emulator::copy_barrier_init(barrier); }
inline void copy_barrier_expect(CopyBarrier* barrier, uint32_t bytes) {
  cuda_emulator::copy_barrier_expect(barrier, bytes);
}
inline void copy_bulk(void* shared, const void* global, uint32_t bytes, CopyBarrier* barrier) {
  cuda_emulator::copy_bulk(shared, global, bytes, barrier);
}
inline void copy_barrier_wait(CopyBarrier* barrier, uint32_t phase) {
  cuda_emulator::copy_barrier_wait(barrier, phase);
}

}  // namespace hfh::cuda
