#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>

#include "hfh/params.h"

// NDEBUG hides it with assert.
extern "C" __host__ __device__ void __assert_fail(const char*, const char*, unsigned,
                                                  const char*) noexcept;

// What CUDA C++ has no words for: the only inline assembly. The tests run the kernels on a CPU by
// putting a header of the same name, with the same functions in plain C++, before this one.

namespace hfh::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

/// The block's shared memory; its size is the launch's.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char hfh_shared_memory[];
  return hfh_shared_memory;
}

/// Two numbers, rounded to nearest even: `low` in the low half, as the lower address.
template <class Number>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (sizeof(Number) != 2) {
    static_assert(sizeof(Number) == 2);
  } else if constexpr (Number::kExponentBits == 8) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

/// pack of max(0, x); NaN becomes NaN.
template <class Number>
__device__ __forceinline__ uint32_t pack_relu(float low, float high) {
  uint32_t packed;
  if constexpr (Number::kExponentBits == 8) {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <class Number>
__device__ __forceinline__ void unpack(uint32_t packed, float& low, float& high) {
  if constexpr (Number::kExponentBits == 8) {
    low = __uint_as_float(packed << 16);
    high = __uint_as_float(packed & 0xffff0000u);
  } else {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(packed));
  }
}

/// `x`, of which the compiler knows nothing: what follows from it is computed where it is used,
/// rather than kept in registers over a loop.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

/// a b + c in one instruction, where the compiler would shift the wide product that `a` is the high
/// half of.
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

/// a b + c of pairs of bfloat16, each rounded to bfloat16 once; of `a`, both times the high half.
__device__ __forceinline__ uint32_t multiply_add_bfloat16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("{.reg .b16 l, h; .reg .b32 x; mov.b32 {l, h}, %1; mov.b32 x, {h, h};"
      "fma.rn.bf16x2 %0, x, %2, %3;}"
      : "=r"(d)
      : "r"(a), "r"(b), "r"(c));
  return d;
}

/// tanh to about 11 bits, by the special function unit.
__device__ __forceinline__ float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// d = a b + c, on matrices spread over the warp: a [16, 16], b [16, 8], c and d [16, 8]. With
/// m = lane / 4 and q = lane % 4, and pairs packed low first:
///   a[0]: row m, columns 2q, 2q+1;  a[1]: row m + 8;  a[2], a[3]: the same, columns + 8
///   b[0]: rows 2q, 2q+1 of column m;  b[1]: rows + 8
///   d[0], d[1]: row m, columns 2q, 2q+1;  d[2], d[3]: row m + 8
/// (PTX ISA, "Matrix fragments for mma.m16n8k16"). `c` are four numbers, laid out as d; c may be d.
template <class Number>
__device__ __forceinline__ void multiply_add_k16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2], const float* c) {
  if constexpr (Number::kExponentBits == 8) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  }
}

/// The same with a [16, 8] (a[0] and a[1] alone) and b [8, 8].
template <class Number>
__device__ __forceinline__ void multiply_add_k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b,
                                                const float* c) {
  if constexpr (Number::kExponentBits == 8) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

/// d += a b.
template <class Number>
__device__ __forceinline__ void multiply_add_k16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  multiply_add_k16<Number>(d, a, b, d);
}

/// Adds four floats to global memory, as one operation where the device has it; `to` is aligned to
/// 16 bytes.
__device__ __forceinline__ void add_vector(float* to, float4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
#else
  atomicAdd(to, value.x);
  atomicAdd(to + 1, value.y);
  atomicAdd(to + 2, value.z);
  atomicAdd(to + 3, value.w);
#endif
}

/// Writes what nobody reads soon, so that it leaves the caches first.
__device__ __forceinline__ void store_streaming(uint4* to, uint4 value) { __stcs(to, value); }

/// Reads what nobody reads again.
__device__ __forceinline__ uint4 load_streaming(const uint4* from) { return __ldcs(from); }

/// Fails the kernel with `message` unless `condition`, also where NDEBUG turns assert off.
__device__ __forceinline__ void device_assert(bool condition, const char* message) {
  if (!condition) __assert_fail(message, __FILE__, __LINE__, __func__);
}

/// Adds `factor` times four floats to shared memory, or returns false where another thread has just
/// added to them; `to` is aligned to 16 bytes. No instruction adds floats in shared memory, but
/// Hopper's compare 16 bytes and swap them at once.
__device__ __forceinline__ bool try_add_shared_vector(float* to, float4 value, float factor) {
#if __CUDA_ARCH__ >= 900
  uint32_t failed;
  asm volatile(
      "{.reg .b128 seen, sum, found; .reg .b64 l, h, fl, fh; .reg .f32 x, y, z, w; .reg .pred p;"
      "ld.relaxed.cta.shared.v2.b64 {l, h}, [%1]; mov.b128 seen, {l, h};"
      "mov.b64 {x, y}, l; mov.b64 {z, w}, h;"
      "fma.rn.f32 x, %2, %6, x; fma.rn.f32 y, %3, %6, y;"
      "fma.rn.f32 z, %4, %6, z; fma.rn.f32 w, %5, %6, w;"
      "mov.b64 fl, {x, y}; mov.b64 fh, {z, w}; mov.b128 sum, {fl, fh};"
      "atom.relaxed.cta.shared.cas.b128 found, [%1], seen, sum;"
      "mov.b128 {fl, fh}, found; xor.b64 fl, fl, l; xor.b64 fh, fh, h; or.b64 fl, fl, fh;"
      "setp.ne.b64 p, fl, 0; selp.u32 %0, 1, 0, p;}"
      : "=r"(failed)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "f"(value.x), "f"(value.y),
        "f"(value.z), "f"(value.w), "f"(factor)
      : "memory");
  return failed == 0;
#else
  atomicAdd(to, value.x * factor);
  atomicAdd(to + 1, value.y * factor);
  atomicAdd(to + 2, value.z * factor);
  atomicAdd(to + 3, value.w * factor);
  return true;
#endif
}

/// Starts to copy 16 bytes, both ends aligned to 16, past the registers and the first-level cache.
__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

/// Closes a group of the calling thread's copies.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most the last kPending groups of the calling thread are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Whether copy_bulk can be used: its barriers are Hopper's.
__device__ constexpr bool has_bulk_copies() {
#if __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

/// A barrier in shared memory that bulk copies complete on.
struct CopyBarrier {
  uint64_t state;
};

/// By one thread, before any other uses the barrier; then __syncthreads.
__device__ __forceinline__ void copy_barrier_init(CopyBarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/// By one thread: announces the bytes of the copies that it is about to start.
__device__ __forceinline__ void copy_barrier_expect(CopyBarrier* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
#endif
}

/// By one thread: starts to copy a multiple of 16 bytes, both ends aligned to 16.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes,
                                          CopyBarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(global), "r"(bytes), "r"(address)
      : "memory");
#endif
}

/// By every thread that reads what was copied: waits for the barrier's phase 0, 1, 0, ...
__device__ __forceinline__ void copy_barrier_wait(CopyBarrier* barrier, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(address), "r"(phase)
        : "memory");
  }
#endif
}

}  // namespace hfh::cuda
