#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "scheduler.h"

// Asynchronous copies to shared memory, of threads and of the block.

namespace cuda_emulator {

namespace {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;

  void land() const { std::memcpy(to, from, bytes); }
};

struct ThreadCopies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> closed;  // groups
};

struct BulkBarrier {
  uint32_t phase = 0;
  bool announced = false;
  uint64_t announced_bytes = 0;
  uint64_t started_bytes = 0;
  std::vector<Copy> copies;
};

bool early_copies;
ThreadCopies thread_copies[kMaxThreads];
std::unordered_map<const void*, BulkBarrier> bulk_barriers;

ThreadCopies& running_thread() { return thread_copies[threadIdx.x]; }

void check_copy(const char* name, const void* shared, const void* global, size_t bytes) {
  const auto is_aligned = [](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
  };
  if (!is_aligned(shared) || !is_aligned(global) || bytes % 16 != 0) {
    fail(std::string(name) + ": misaligned, or not a multiple of 16 bytes");
  }
  const auto* to = static_cast<const char*>(shared);
  if (to < shared_memory() || to + bytes > shared_memory() + shared_bytes()) {
    fail(std::string(name) + ": not to the block's shared memory");
  }
}

void check_bulk_copies(const char* name) {
  if (capability() < 90) fail(std::string(name) + " on a device that lacks it");
}

BulkBarrier& bulk_barrier(const char* name, const void* barrier) {
  check_bulk_copies(name);
  const auto found = bulk_barriers.find(barrier);
  if (found == bulk_barriers.end()) fail(std::string(name) + ": barrier not initialised");
  return found->second;
}

/// Ends the barrier's phase if all that was announced was started.
void complete_phase(BulkBarrier& barrier) {
  if (!barrier.announced || barrier.started_bytes < barrier.announced_bytes) return;
  if (barrier.started_bytes > barrier.announced_bytes) {
    fail("copy_bulk: " + std::to_string(barrier.started_bytes) + " bytes started, " +
         std::to_string(barrier.announced_bytes) + " announced");
  }
  for (const Copy& copy : barrier.copies) copy.land();
  const uint32_t next = barrier.phase ^ 1;
  barrier = BulkBarrier{};
  barrier.phase = next;
}

}  // namespace

void forget_copies() {
  early_copies = environment("HFH_EMULATOR_COPIES", "late") == "early";
  for (ThreadCopies& thread : thread_copies) {
    thread.open.clear();
    thread.closed.clear();
  }
  bulk_barriers.clear();
}

void copy_async(void* shared, const void* global) {
  check_copy("copy_async16", shared, global, 16);
  const Copy copy{shared, global, 16};
  if (early_copies) {
    copy.land();
  } else {
    running_thread().open.push_back(copy);
  }
}

void copy_async_commit() {
  ThreadCopies& thread = running_thread();
  thread.closed.push_back(std::move(thread.open));
  thread.open.clear();
}

void copy_async_wait(int pending_groups) {
  auto& groups = running_thread().closed;
  for (; static_cast<int>(groups.size()) > pending_groups; groups.pop_front()) {
    for (const Copy& copy : groups.front()) copy.land();
  }
}

void copy_barrier_init(void* barrier) {
  check_bulk_copies("copy_barrier_init");
  const auto* address = static_cast<const char*>(barrier);
  if (address < shared_memory() || address + 8 > shared_memory() + shared_bytes() ||
      reinterpret_cast<uintptr_t>(barrier) % 8 != 0) {
    fail("copy_barrier_init: not 8 aligned bytes of shared memory");
  }
  if (!bulk_barriers.try_emplace(barrier).second) {
    fail("copy_barrier_init: the barrier is initialised already");
  }
}

void copy_barrier_expect(void* barrier, uint32_t bytes) {
  BulkBarrier& state = bulk_barrier("copy_barrier_expect", barrier);
  if (state.announced) fail("copy_barrier_expect: nobody waited for the phase before");
  state.announced = true;
  state.announced_bytes = bytes;
  if (early_copies) complete_phase(state);
  wake();
}

void copy_bulk(void* shared, const void* global, uint32_t bytes, void* barrier) {
  check_copy("copy_bulk", shared, global, bytes);
  BulkBarrier& state = bulk_barrier("copy_bulk", barrier);
  state.started_bytes += bytes;
  const Copy copy{shared, global, bytes};
  if (early_copies) {
    copy.land();
    complete_phase(state);
  } else {
    state.copies.push_back(copy);
  }
  wake();
}

void copy_barrier_wait(void* barrier, uint32_t phase) {
  BulkBarrier& state = bulk_barrier("copy_barrier_wait", barrier);
  if (phase > 1) fail("copy_barrier_wait: a phase is 0 or 1");
  while (state.phase == phase) {
    complete_phase(state);
    if (state.phase != phase) return;
    sleep("copy_barrier_wait");
  }
}

}  // namespace cuda_emulator
