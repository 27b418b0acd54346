#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

// A GPU's block on one CPU thread: what cuda_runtime.h and cuda/ptx.h beside this file stand on.
//
// Blocks run one after another. A block's threads are fibers: each runs until it waits for others,
// then the next one that can run goes on, in ascending order, or descending with
// HFH_EMULATOR_ORDER=reverse. Of two threads that lack a barrier, each is so the first in one of
// the orders. Asynchronous copies land when they are waited for, or with HFH_EMULATOR_COPIES=early
// as soon as they are started: a wait is missing where the first gives other results, a barrier
// before the copy where the second does. A block's shared memory starts as bytes 0xff, which are
// NaN.
//
// HFH_EMULATOR_CAPABILITY (90) and HFH_EMULATOR_PROCESSORS (4) are the device's.

namespace cuda_emulator {

/// Ends the launch with an error; from outside a kernel, throws std::runtime_error.
[[noreturn]] void fail(const std::string& message);

int capability();
int processors();
size_t shared_bytes_per_block();

struct Shape {
  unsigned blocks, threads;
  size_t shared_bytes;
};

/// Runs `kernel` once a thread; what went wrong, or an empty string.
std::string run(const Shape& shape, const std::function<void()>& kernel);

/// An operation of a warp's lanes together. `arguments` has a pointer for each lane of `lanes`, and
/// null for others.
struct Collective {
  const char* name;
  bool whole_warp;  // 32 lanes must take part: none may have exited
  void (*operate)(void* const* arguments, uint32_t lanes);
};

/// Waits for the lanes of `mask` that have not exited; the last to come operates for all.
void meet(const Collective& collective, uint32_t mask, void* argument);

void synchronize_block();

enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int operand, int width);

enum class Vote { kBallot, kAny, kAll };
uint32_t vote(Vote kind, uint32_t mask, bool predicate);

void synchronize_warp(uint32_t mask);

enum class Format { kBFloat16, kFloat16 };
/// Lane's part of d [16, 8] += a [16, depth] b [depth, 8]; depth is 8 or 16.
void multiply_add(Format format, int depth, float* d, const uint32_t* a, const uint32_t* b);

char* shared_memory();

void copy_async(void* shared, const void* global);
void copy_async_commit();
void copy_async_wait(int pending_groups);

void copy_barrier_init(void* barrier);
void copy_barrier_expect(void* barrier, uint32_t bytes);
void copy_bulk(void* shared, const void* global, uint32_t bytes, void* barrier);
void copy_barrier_wait(void* barrier, uint32_t phase);

}  // namespace cuda_emulator
