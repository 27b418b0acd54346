#pragma once

#include <ATen/Parallel.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace hfh::torch_ops {

/// Scratch of the calling thread, kept from call to call: fresh pages would cost more than what
/// fills them. Each `Purpose` has its own.
enum class Purpose { kPanels, kPackedBatch, kSlotProducts, kPatches, kPositions, kLookup };

template <Purpose purpose>
class Scratch {
 public:
  static void* get(size_t bytes) {
    static thread_local Scratch scratch;
    if (bytes > scratch.size_) {
      scratch.memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
      scratch.size_ = bytes;
    }
    return scratch.memory_.get();
  }

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

inline int64_t element_size(at::ScalarType dtype) {
  return static_cast<int64_t>(c10::elementSize(dtype));
}

inline int64_t ceil_divide(int64_t x, int64_t y) { return (x + y - 1) / y; }

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

/// Calls `f(begin, end)` for every stretch [begin, end) of [0, size) of length `step`, in parallel.
template <class F>
void parallel_stretches(int64_t size, int64_t step, const F& f) {
  const int64_t count = (size + step - 1) / step;
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i * step, std::min(size, (i + 1) * step));
  });
}

}  // namespace hfh::torch_ops
