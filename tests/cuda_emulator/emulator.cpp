#include "emulator.h"

#include <cuda_runtime.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cuda/ptx.h"
#include "hfh/params.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulator {

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kLanes = 32;
constexpr size_t kPageBytes = 4096;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;  // on either side of shared memory
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr char kPoison = '\xff';

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;  // of the thread's copies; not used by bulk copies

  void land() const { std::memcpy(to, from, bytes); }
};

struct Fiber {
  jmp_buf place;  // where it goes on
  bool started = false;
  unsigned thread;
  const char* waits_for;
  // What it brings to the collective operation that it waits for.
  const Collective* collective;
  uint32_t mask;
  void* argument;
  std::vector<Copy> copies;
  int closed_groups;
};

/// Sets of lanes; a lane that has not exited is in exactly one of the last four.
struct Warp {
  uint32_t alive, can_run, at_collective, at_block_barrier, polling;
};

struct BulkBarrier {
  uint32_t phase = 0;
  bool announced = false;
  uint64_t announced_bytes = 0;
  uint64_t started_bytes = 0;
  std::vector<Copy> copies;
};

Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / kLanes];
int num_warps, threads_alive, threads_at_barrier;
Fiber* running = nullptr;
const std::function<void()>* running_kernel;
jmp_buf host;  // back to run()
std::string error;
bool reverse_order, early_copies;
size_t shared_bytes;
int device_capability;
char* stacks = nullptr;  // of fibers, one after another, each behind a page that faults
alignas(1024) char shared_storage[kGuardBytes + kMaxSharedBytes + kGuardBytes];
std::unordered_map<const void*, BulkBarrier> bulk_barriers;

char* allocated_stacks() {
  constexpr size_t kEach = kPageBytes + kStackBytes;
  void* memory = mmap(nullptr, kMaxThreads * kEach, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  auto* stacks = static_cast<char*>(memory);
  // A stack that overflows meets a page that faults.
  for (int i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kEach, kPageBytes, PROT_NONE);
  return stacks;
}

std::string environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

Warp& warp_of(const Fiber& fiber) { return warps[fiber.thread / kLanes]; }
uint32_t lane_of(const Fiber& fiber) { return uint32_t{1} << fiber.thread % kLanes; }

Fiber* first_that_can_run() {
  for (int i = 0; i < num_warps; ++i) {
    const int warp = reverse_order ? num_warps - 1 - i : i;
    const uint32_t lanes = warps[warp].can_run;
    if (lanes != 0) {
      const int lane =
          reverse_order ? kLanes - 1 - std::countl_zero(lanes) : std::countr_zero(lanes);
      return &fibers[warp * kLanes + lane];
    }
  }
  return nullptr;
}

[[noreturn]] void stop(const std::string& message) {
  error = message;
  running = nullptr;
  _longjmp(host, 1);
}

[[noreturn]] void deadlock() {
  std::string message = "deadlock in block " + std::to_string(blockIdx.x) + ": ";
  const auto state = [](int thread) {
    const Fiber& fiber = fibers[thread];
    const bool alive = warp_of(fiber).alive & lane_of(fiber);
    return std::string_view(alive ? fiber.waits_for : "exit");
  };
  const int threads = static_cast<int>(blockDim.x);
  for (int begin = 0, end = 0; begin < threads; begin = end) {
    while (end < threads && state(end) == state(begin)) ++end;
    message += begin == 0 ? "thread " : ", thread ";
    message += std::to_string(begin);
    if (end - begin > 1) message += " to " + std::to_string(end - 1);
    message += " at ";
    message += state(begin);
  }
  stop(message);
}

void fiber_main();

[[noreturn]] void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx.x = fiber.thread;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  static ucontext_t context;
  getcontext(&context);
  context.uc_link = nullptr;
  context.uc_stack.ss_sp = stacks + fiber.thread * (kPageBytes + kStackBytes) + kPageBytes;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
  std::abort();
}

/// Goes on with another thread, until this one can run again and is the first that can. With the
/// last of the block's threads gone, goes on with run().
void give_way() {
  Fiber* const next = first_that_can_run();
  if (next == running) return;
  if (next == nullptr && threads_alive > 0) deadlock();
  if (_setjmp(running->place) != 0) return;
  if (next != nullptr) resume(*next);
  running = nullptr;
  _longjmp(host, 1);
}

void release_block_barrier() {
  for (int i = 0; i < num_warps; ++i) {
    warps[i].can_run |= warps[i].at_block_barrier;
    warps[i].at_block_barrier = 0;
  }
  threads_at_barrier = 0;
}

/// Whether all lanes that `fiber`, waiting at a collective operation, needs are there; then
/// operates.
bool operate_if_all_came(const Fiber& fiber) {
  Warp& warp = warp_of(fiber);
  const uint32_t lanes = fiber.mask & warp.alive;
  if ((warp.at_collective & lanes) != lanes) return false;
  const Fiber* const first = &fibers[fiber.thread / kLanes * kLanes];
  void* arguments[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes >> lane & 1) arguments[lane] = first[lane].argument;
  }
  if (fiber.collective->whole_warp && lanes != ~uint32_t{0}) {
    fail(std::string(fiber.collective->name) + " without all 32 lanes of the warp");
  }
  fiber.collective->operate(arguments, lanes);
  warp.at_collective &= ~lanes;
  warp.can_run |= lanes;
  return true;
}

void leave_block() {
  Warp& warp = warp_of(*running);
  warp.alive &= ~lane_of(*running);
  warp.can_run &= ~lane_of(*running);
  --threads_alive;
  if (threads_at_barrier == threads_alive) release_block_barrier();
  // Others of the warp may have waited for this lane alone.
  const Fiber* const first = &fibers[running->thread / kLanes * kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (warp.at_collective >> lane & 1) operate_if_all_came(first[lane]);
  }
}

void fiber_main() {
  // A fiber is used for a thread of each block in turn.
  for (;;) {
    (*running_kernel)();
    leave_block();
    give_way();
  }
}

/// Runs the block blockIdx.x. Has no variables that returning by longjmp could spoil.
__attribute__((noinline)) void run_block() {
  if (_setjmp(host) == 0) {
    resume(*first_that_can_run());
  }
}

void prepare_block() {
  const int threads = static_cast<int>(blockDim.x);
  num_warps = (threads + kLanes - 1) / kLanes;
  threads_alive = threads;
  threads_at_barrier = 0;
  for (int i = 0; i < num_warps; ++i) {
    const int lanes = std::min(threads - i * kLanes, kLanes);
    const uint32_t all = ~uint32_t{0} >> (kLanes - lanes);
    warps[i] = Warp{};
    warps[i].alive = warps[i].can_run = all;
  }
  for (int i = 0; i < threads; ++i) {
    fibers[i].thread = static_cast<unsigned>(i);
    fibers[i].copies.clear();
    fibers[i].closed_groups = 0;
  }
  bulk_barriers.clear();
  std::memset(shared_storage, kPoison, kGuardBytes + shared_bytes + kGuardBytes);
}

bool guards_are_intact() {
  const auto intact = [](const char* begin) {
    return std::all_of(begin, begin + kGuardBytes, [](char byte) { return byte == kPoison; });
  };
  return intact(shared_storage) && intact(shared_memory() + shared_bytes);
}

void wait_for(const char* name) {
  running->waits_for = name;
  warp_of(*running).can_run &= ~lane_of(*running);
}

/// Lets the threads that wait for a copy look again.
void wake_polling() {
  for (int i = 0; i < num_warps; ++i) {
    warps[i].can_run |= warps[i].polling;
    warps[i].polling = 0;
  }
}

void check_copy(const char* name, const void* shared, const void* global, size_t bytes) {
  const auto is_aligned = [](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
  };
  if (!is_aligned(shared) || !is_aligned(global) || bytes % 16 != 0) {
    fail(std::string(name) + ": misaligned, or not a multiple of 16 bytes");
  }
  const auto* to = static_cast<const char*>(shared);
  if (to < shared_memory() || to + bytes > shared_memory() + shared_bytes) {
    fail(std::string(name) + ": not to the block's shared memory");
  }
}

void check_bulk_copies(const char* name) {
  if (!hfh::cuda::has_bulk_copies()) fail(std::string(name) + " on a device that lacks it");
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

struct ShuffleArgument {
  uint64_t value;
  int source;
  uint64_t result;
};

void operate_shuffle(void* const* arguments, uint32_t lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto* argument = static_cast<ShuffleArgument*>(arguments[lane]);
    const auto* source = static_cast<const ShuffleArgument*>(arguments[argument->source]);
    argument->result = source == nullptr ? ~uint64_t{0} : source->value;
  }
}

struct VoteArgument {
  bool predicate;
  uint32_t votes, lanes;
};

void operate_vote(void* const* arguments, uint32_t lanes) {
  uint32_t votes = 0;
  const auto each = [&](const auto& f) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lanes >> lane & 1) f(lane, *static_cast<VoteArgument*>(arguments[lane]));
    }
  };
  each([&](int lane, const VoteArgument& argument) {
    votes |= uint32_t{argument.predicate} << lane;
  });
  each([&](int, VoteArgument& argument) {
    argument.votes = votes;
    argument.lanes = lanes;
  });
}

struct MultiplyArgument {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

/// The fragments are described in csrc/cuda/ptx.h.
template <class Number, int kDepth>
void operate_multiply_add(void* const* arguments, uint32_t) {
  float a[16][kDepth], b[kDepth][8], d[16][8];
  const auto each = [&](const auto& f) {
    for (int lane = 0; lane < kLanes; ++lane) {
      f(lane / 4, 2 * (lane % 4), *static_cast<const MultiplyArgument*>(arguments[lane]));
    }
  };
  const auto unpack = [](uint32_t packed, float& low, float& high) {
    hfh::cuda::unpack<Number>(packed, low, high);
  };
  each([&](int m, int q, const MultiplyArgument& part) {
    for (int i = 0; i < kDepth / 4; ++i) {
      float* at = &a[m + 8 * (i % 2)][q + 8 * (i / 2)];
      unpack(part.a[i], at[0], at[1]);
    }
    for (int i = 0; i < kDepth / 8; ++i) {
      unpack(part.b[i], b[q + 8 * i][m], b[q + 8 * i + 1][m]);
    }
    for (int i = 0; i < 4; ++i) d[m + 8 * (i / 2)][q + i % 2] = part.d[i];
  });
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int col = 0; col < 8; ++col) d[row][col] += a[row][k] * b[k][col];
    }
  }
  each([&](int m, int q, const MultiplyArgument& part) {
    for (int i = 0; i < 4; ++i) part.d[i] = d[m + 8 * (i / 2)][q + i % 2];
  });
}

}  // namespace

void fail(const std::string& message) {
  if (running == nullptr) throw std::runtime_error(message);
  stop("block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ": " +
       message);
}

int capability() {
  if (running != nullptr) return device_capability;
  return std::stoi(environment("HFH_EMULATOR_CAPABILITY", "90"));
}

int processors() { return std::stoi(environment("HFH_EMULATOR_PROCESSORS", "4")); }

size_t shared_bytes_per_block() {
  switch (capability()) {
    case 90:
    case 100:
      return kMaxSharedBytes;
    case 80:
      return 163 * 1024;
    default:
      return 99 * 1024;
  }
}

std::string run(const Shape& shape, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  if (shape.blocks == 0 || shape.threads == 0 || shape.threads > kMaxThreads) {
    return std::to_string(shape.blocks) + " blocks of " + std::to_string(shape.threads) +
           " threads cannot be launched";
  }
  reverse_order = environment("HFH_EMULATOR_ORDER", "forward") == "reverse";
  early_copies = environment("HFH_EMULATOR_COPIES", "late") == "early";
  device_capability = capability();
  if (stacks == nullptr) stacks = allocated_stacks();
  running_kernel = &kernel;
  shared_bytes = shape.shared_bytes;
  gridDim = dim3(shape.blocks);
  blockDim = dim3(shape.threads);
  error.clear();
  for (unsigned block = 0; block < shape.blocks && error.empty(); ++block) {
    blockIdx.x = block;
    prepare_block();
    run_block();
    if (error.empty() && !guards_are_intact()) {
      error = "block " + std::to_string(block) + " wrote outside its shared memory of " +
              std::to_string(shared_bytes) + " bytes";
    }
  }
  if (!error.empty()) {
    for (Fiber& fiber : fibers) fiber.started = false;
  }
  return error;
}

void meet(const Collective& collective, uint32_t mask, void* argument) {
  Fiber& self = *running;
  Warp& warp = warp_of(self);
  if (!(mask & lane_of(self))) fail(std::string(collective.name) + ": mask lacks the lane itself");
  const uint32_t others = warp.at_collective & mask;
  if (others != 0) {
    const int lane = std::countr_zero(others);
    const Fiber& other = fibers[self.thread / kLanes * kLanes + lane];
    if (other.collective != &collective || other.mask != mask) {
      fail(std::string("mismatch: at ") + collective.name + ", where thread " +
           std::to_string(other.thread) + " is at " + other.collective->name +
           (other.collective == &collective ? " with another mask" : ""));
    }
  }
  self.collective = &collective;
  self.mask = mask;
  self.argument = argument;
  wait_for(collective.name);
  warp.at_collective |= lane_of(self);
  if (!operate_if_all_came(self)) give_way();
}

void synchronize_block() {
  wait_for("__syncthreads");
  warp_of(*running).at_block_barrier |= lane_of(*running);
  if (++threads_at_barrier == threads_alive) release_block_barrier();
  give_way();
}

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int operand, int width) {
  static const Collective kCollectives[] = {
      {"__shfl_sync", false, operate_shuffle},
      {"__shfl_up_sync", false, operate_shuffle},
      {"__shfl_down_sync", false, operate_shuffle},
      {"__shfl_xor_sync", false, operate_shuffle},
  };
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int begin = lane / width * width;
  int source = lane;
  switch (kind) {
    case Shuffle::kIndex:
      source = begin + operand % width;
      break;
    case Shuffle::kUp:
      if (lane - operand >= begin) source = lane - operand;
      break;
    case Shuffle::kDown:
      if (lane + operand < begin + width) source = lane + operand;
      break;
    case Shuffle::kXor:
      if ((lane ^ operand) < begin + width) source = lane ^ operand;
      break;
  }
  ShuffleArgument argument{value, source, 0};
  meet(kCollectives[static_cast<int>(kind)], mask, &argument);
  return argument.result;
}

uint32_t vote(Vote kind, uint32_t mask, bool predicate) {
  static const Collective kCollectives[] = {
      {"__ballot_sync", false, operate_vote},
      {"__any_sync", false, operate_vote},
      {"__all_sync", false, operate_vote},
  };
  VoteArgument argument{predicate, 0, 0};
  meet(kCollectives[static_cast<int>(kind)], mask, &argument);
  switch (kind) {
    case Vote::kAny:
      return argument.votes != 0;
    case Vote::kAll:
      return argument.votes == argument.lanes;
    default:
      return argument.votes;
  }
}

void synchronize_warp(uint32_t mask) {
  static const Collective kCollective{"__syncwarp", false, [](void* const*, uint32_t) {}};
  meet(kCollective, mask, nullptr);
}

void multiply_add(Format format, int depth, float* d, const uint32_t* a, const uint32_t* b) {
  static const Collective kCollectives[2][2] = {
      {{"mma m16n8k8 bf16", true, operate_multiply_add<hfh::BFloat16, 8>},
       {"mma m16n8k16 bf16", true, operate_multiply_add<hfh::BFloat16, 16>}},
      {{"mma m16n8k8 f16", true, operate_multiply_add<hfh::Float16, 8>},
       {"mma m16n8k16 f16", true, operate_multiply_add<hfh::Float16, 16>}},
  };
  MultiplyArgument argument{d, a, b};
  meet(kCollectives[format == Format::kFloat16][depth == 16], ~uint32_t{0}, &argument);
}

char* shared_memory() { return shared_storage + kGuardBytes; }

void copy_async(void* shared, const void* global) {
  check_copy("copy_async16", shared, global, 16);
  const Copy copy{shared, global, 16, running->closed_groups};
  if (early_copies) {
    copy.land();
  } else {
    running->copies.push_back(copy);
  }
}

void copy_async_commit() { ++running->closed_groups; }

void copy_async_wait(int pending_groups) {
  const int end = running->closed_groups - pending_groups;
  std::erase_if(running->copies, [end](const Copy& copy) {
    const bool lands = copy.group < end;
    if (lands) copy.land();
    return lands;
  });
}

void copy_barrier_init(void* barrier) {
  check_bulk_copies("copy_barrier_init");
  const auto* address = static_cast<const char*>(barrier);
  if (address < shared_memory() || address + 8 > shared_memory() + shared_bytes ||
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
  wake_polling();
}

void copy_bulk(void* shared, const void* global, uint32_t bytes, void* barrier) {
  check_copy("copy_bulk", shared, global, bytes);
  BulkBarrier& state = bulk_barrier("copy_bulk", barrier);
  state.started_bytes += bytes;
  const Copy copy{shared, global, bytes, 0};
  if (early_copies) {
    copy.land();
    complete_phase(state);
  } else {
    state.copies.push_back(copy);
  }
  wake_polling();
}

void copy_barrier_wait(void* barrier, uint32_t phase) {
  BulkBarrier& state = bulk_barrier("copy_barrier_wait", barrier);
  if (phase > 1) fail("copy_barrier_wait: a phase is 0 or 1");
  while (state.phase == phase) {
    complete_phase(state);
    if (state.phase != phase) return;
    wait_for("copy_barrier_wait");
    warp_of(*running).polling |= lane_of(*running);
    give_way();
  }
}

}  // namespace cuda_emulator
