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

#include "scheduler.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulator {

namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;  // on either side of shared memory
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr char kPoison = '\xff';

struct Fiber {
  jmp_buf place;  // where it goes on
  bool started = false;
  unsigned thread;
  const char* waits_for;
  // What it brings to the collective operation that it waits for.
  const Collective* collective;
  uint32_t mask;
  void* argument;
};

/// Sets of lanes; a lane that has not exited is in exactly one of the last four.
struct Warp {
  uint32_t alive, can_run, at_collective, at_block_barrier, asleep;
};

Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / kLanes];
int num_warps, threads_alive, threads_at_barrier;
Fiber* running = nullptr;
const std::function<void()>* running_kernel;
jmp_buf host;  // back to run()
std::string error;
bool reverse_order;
size_t block_shared_bytes;
int device_capability;
char* stacks = nullptr;  // of fibers, one after another, each behind a page that faults
alignas(1024) char shared_storage[kGuardBytes + kMaxSharedBytes + kGuardBytes];

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
  }
  forget_copies();
  std::memset(shared_storage, kPoison, kGuardBytes + block_shared_bytes + kGuardBytes);
}

bool guards_are_intact() {
  const auto intact = [](const char* begin) {
    return std::all_of(begin, begin + kGuardBytes, [](char byte) { return byte == kPoison; });
  };
  return intact(shared_storage) && intact(shared_memory() + block_shared_bytes);
}

void wait_for(const char* name) {
  running->waits_for = name;
  warp_of(*running).can_run &= ~lane_of(*running);
}

}  // namespace

std::string environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

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
  device_capability = capability();
  if (stacks == nullptr) stacks = allocated_stacks();
  running_kernel = &kernel;
  block_shared_bytes = shape.shared_bytes;
  gridDim = dim3(shape.blocks);
  blockDim = dim3(shape.threads);
  error.clear();
  for (unsigned block = 0; block < shape.blocks && error.empty(); ++block) {
    blockIdx.x = block;
    prepare_block();
    run_block();
    if (error.empty() && !guards_are_intact()) {
      error = "block " + std::to_string(block) + " wrote outside its shared memory of " +
              std::to_string(block_shared_bytes) + " bytes";
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

void sleep(const char* name) {
  wait_for(name);
  warp_of(*running).asleep |= lane_of(*running);
  give_way();
}

void wake() {
  for (int i = 0; i < num_warps; ++i) {
    warps[i].can_run |= warps[i].asleep;
    warps[i].asleep = 0;
  }
}

char* shared_memory() { return shared_storage + kGuardBytes; }

size_t shared_bytes() { return block_shared_bytes; }

}  // namespace cuda_emulator
