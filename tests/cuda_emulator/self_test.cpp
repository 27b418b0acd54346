#include <cuda_runtime.h>

#include <string>

#include "cuda/launch.h"
#include "cuda/ptx.h"

// Small kernels that the emulator's own tests call through ctypes. Each function returns what went
// wrong, or an empty string.

namespace {

using namespace hfh;
using namespace hfh::cuda;

/// Sum of the block's values, from a tree in shared memory.
__global__ void reduce(const float* in, float* out, bool with_barriers) {
  auto* sums = reinterpret_cast<float*>(shared_memory());
  sums[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (with_barriers) __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}

/// Thread 0 leaves out the barrier that the others wait at, and waits for its warp instead.
__global__ void deadlock() {
  if (threadIdx.x == 0) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void mismatch(int* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_xor_sync(kFullWarp, 1, 1);
  } else {
    out[threadIdx.x] = static_cast<int>(__ballot_sync(kFullWarp, 1));
  }
}

__global__ void shuffle(const int* in, int* out, int kind, int operand, int width) {
  const int value = in[threadIdx.x];
  int result = 0;
  if (kind == 0) result = __shfl_sync(kFullWarp, value, operand, width);
  if (kind == 1) result = __shfl_up_sync(kFullWarp, value, operand, width);
  if (kind == 2) result = __shfl_down_sync(kFullWarp, value, operand, width);
  if (kind == 3) result = __shfl_xor_sync(kFullWarp, value, operand, width);
  out[threadIdx.x] = result;
}

/// Each half of a warp votes for itself.
__global__ void vote(const int* in, int* ballots, int* any, int* all) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const int value = in[threadIdx.x];
  ballots[threadIdx.x] = static_cast<int>(__ballot_sync(mask, value));
  any[threadIdx.x] = __any_sync(mask, value);
  all[threadIdx.x] = __all_sync(mask, value);
}

/// The first 16 lanes of both warps leave. The others do without them: in descending order the
/// lanes of warp 1 wait to vote, and warp 0 at the barrier, when the last of the others leaves.
__global__ void exit_early(int* out) {
  if (threadIdx.x % 32 < 16) return;
  unsigned votes = 0;
  if (threadIdx.x >= 32) votes = __ballot_sync(kFullWarp, 1);
  __syncthreads();
  if (threadIdx.x < 32) votes = __ballot_sync(kFullWarp, 1);
  out[threadIdx.x] = static_cast<int>(votes);
}

enum class Copies { kAsync, kAsyncUnwaited, kBulk, kBulkUnwaited, kBulkShort, kMisaligned };

/// Copies 64 floats a block through shared memory, in two groups or bulk copies.
__global__ void copy(const float* in, float* out, Copies copies) {
  auto* barrier = reinterpret_cast<CopyBarrier*>(shared_memory());
  auto* values = reinterpret_cast<float*>(shared_memory() + 16);
  const bool bulk = copies >= Copies::kBulk && copies != Copies::kMisaligned;
  const unsigned thread = threadIdx.x;
  if (bulk) {
    if (thread == 0) copy_barrier_init(barrier);
    __syncthreads();
    if (thread == 5) {
      copy_barrier_expect(barrier, copies == Copies::kBulkShort ? 512 : 256);
      copy_bulk(values, in, 128, barrier);
      copy_bulk(values + 32, in + 32, 128, barrier);
    }
    if (copies != Copies::kBulkUnwaited) copy_barrier_wait(barrier, 0);
  } else {
    const int offset = copies == Copies::kMisaligned ? 1 : 0;
    if (thread < 8) copy_async16(values + 4 * thread, in + 4 * thread + offset);
    copy_async_commit();
    if (thread < 8) copy_async16(values + 32 + 4 * thread, in + 32 + 4 * thread);
    copy_async_commit();
    if (copies == Copies::kAsyncUnwaited) {
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
  }
  __syncthreads();
  for (unsigned i = thread; i < 64; i += blockDim.x) out[i] = values[i];
}

__global__ void write_at(int index) { shared_memory()[index] = 1; }

/// Stores two floats, to an address aligned to them if `offset` is even, and one in an array of 4.
__global__ void access(float* out, int offset, int index) {
  *reinterpret_cast<float2*>(out + offset) = make_float2(1.0f, 2.0f);
  float local[4];
  for (int i = 0; i < 4; ++i) local[i] = out[i];
  out[4] = local[index];
}

/// d [16, 8] = a [16, depth] b [depth, 8], row-major and packed as they lie in memory.
template <class Number, int kDepth>
__global__ void multiply(const uint16_t* a, const uint16_t* b, float* d) {
  const int m = threadIdx.x / 4, q = 2 * (threadIdx.x % 4);
  uint32_t a_part[kDepth / 4], b_part[kDepth / 8];
  for (int i = 0; i < kDepth / 4; ++i) {
    const uint16_t* at = a + (m + 8 * (i % 2)) * kDepth + q + 8 * (i / 2);
    a_part[i] = at[0] | uint32_t{at[1]} << 16;
  }
  for (int i = 0; i < kDepth / 8; ++i) {
    const uint16_t* at = b + (q + 8 * i) * 8 + m;
    b_part[i] = at[0] | uint32_t{at[8]} << 16;
  }
  float d_part[4] = {};
  if constexpr (kDepth == 16) {
    multiply_add_k16<Number>(d_part, a_part, b_part);
  } else {
    multiply_add_k8<Number>(d_part, a_part, b_part[0], d_part);
  }
  for (int i = 0; i < 4; ++i) d[(m + 8 * (i / 2)) * 8 + q + i % 2] = d_part[i];
}

template <class Number>
__global__ void convert(const float* in, uint16_t* out, float* back, int count, bool with_relu) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const uint32_t packed = with_relu ? pack_relu<Number>(in[i], 0.0f) : pack<Number>(in[i], 1.0f);
    out[i] = static_cast<uint16_t>(packed);
    float low, high;
    unpack<Number>(packed, low, high);
    back[i] = high == (with_relu ? 0.0f : 1.0f) ? low : 0.0f;
  }
}

template <class F>
const char* reason(const F& f) {
  static thread_local std::string message;
  message.clear();
  try {
    f();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* test_reduce(const float* in, float* out, int blocks, int threads,
                               bool with_barriers) {
  return reason([&] {
    const Grid grid{static_cast<unsigned>(blocks), threads, threads * sizeof(float)};
    launch("reduce", reduce, grid, nullptr, in, out, with_barriers);
  });
}

EXPORT const char* test_deadlock() {
  return reason([] { launch("deadlock", deadlock, {2, 64}, nullptr); });
}

EXPORT const char* test_mismatch(int* out) {
  return reason([&] { launch("mismatch", mismatch, {1, 32}, nullptr, out); });
}

EXPORT const char* test_shuffle(const int* in, int* out, int kind, int operand, int width) {
  return reason(
      [&] { launch("shuffle", shuffle, {1, 64}, nullptr, in, out, kind, operand, width); });
}

EXPORT const char* test_vote(const int* in, int* ballots, int* any, int* all) {
  return reason([&] { launch("vote", vote, {1, 64}, nullptr, in, ballots, any, all); });
}

EXPORT const char* test_exit_early(int* out) {
  return reason([&] { launch("exit_early", exit_early, {1, 64}, nullptr, out); });
}

EXPORT const char* test_copy(const float* in, float* out, int copies) {
  return reason([&] { launch("copy", copy, {1, 32, 16 + 256}, nullptr, in, out, Copies{copies}); });
}

EXPORT const char* test_write_at(int index) {
  return reason([&] { launch("write_at", write_at, {2, 32, 128}, nullptr, index); });
}

EXPORT const char* test_access(int offset, int index) {
  alignas(16) float out[8] = {};
  return reason([&] { launch("access", access, {1, 1}, nullptr, out, offset, index); });
}

EXPORT const char* test_shared_bytes(int bytes) {
  return reason(
      [&] { launch("write_at", write_at, {1, 1, static_cast<size_t>(bytes)}, nullptr, 0); });
}

EXPORT const char* test_multiply(bool bfloat16, int depth, const uint16_t* a, const uint16_t* b,
                                 float* d) {
  return reason([&] {
    const auto kernel = bfloat16 ? (depth == 16 ? multiply<BFloat16, 16> : multiply<BFloat16, 8>)
                                 : (depth == 16 ? multiply<Float16, 16> : multiply<Float16, 8>);
    launch("multiply", kernel, {1, 32}, nullptr, a, b, d);
  });
}

EXPORT const char* test_convert(bool bfloat16, const float* in, uint16_t* out, float* back,
                                int count, bool with_relu) {
  return reason([&] {
    const auto kernel = bfloat16 ? convert<BFloat16> : convert<Float16>;
    launch("convert", kernel, {1, 64}, nullptr, in, out, back, count, with_relu);
  });
}
