#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/weight.h"

// The rows of a layer in groups that draw from one window, and what a group reads of the pool in
// shared memory.

namespace hfh::cuda {

/// Groups of at most kGroupRows rows; with windows, of rows of one window.
inline constexpr int kGroupRows = 32;

/// Rows from the logical row `first` on; none behind the last group.
struct RowGroup {
  uint32_t first;
  int rows;
};

struct RowGroups {
  uint64_t begin, end;       // logical rows of the layer
  uint64_t rows_per_window;  // 0: no windows
  uint64_t per_window;       // groups in a window

  /// `rows` rows from `begin` on.
  RowGroups(const HashParams& hash, uint64_t begin, uint64_t rows)
      : begin(begin),
        end(begin + rows),
        rows_per_window(hash.rows_per_window),
        per_window((rows_per_window + kGroupRows - 1) / kGroupRows) {}

  int64_t count() const {
    if (begin == end) return 0;
    if (rows_per_window == 0) return static_cast<int64_t>((end - begin - 1) / kGroupRows + 1);
    return static_cast<int64_t>(group_of(end - 1) - group_of(begin) + 1);
  }

  __device__ __forceinline__ RowGroup group(uint64_t index) const {
    uint64_t first, last = end;
    if (rows_per_window == 0) {
      first = begin + index * kGroupRows;
    } else {
      index += group_of(begin);
      const uint64_t window = index / per_window * rows_per_window;
      first = window + index % per_window * kGroupRows;
      last = min(window + rows_per_window, end);
    }
    last = min(first + kGroupRows, last);
    first = max(first, begin);
    return {static_cast<uint32_t>(first), last > first ? static_cast<int>(last - first) : 0};
  }

  /// Where a group begins, counted from the layer's first row.
  __device__ __forceinline__ int64_t out_row(const RowGroup& group) const {
    return group.first - static_cast<int64_t>(begin);
  }

 private:
  /// Counted from the first window's first, where there are windows.
  HFH_HOST_DEVICE uint64_t group_of(uint64_t row) const {
    return row / rows_per_window * per_window + row % rows_per_window / kGroupRows;
  }
};

/// Bytes of the elements that a row can draw from.
HFH_HOST_DEVICE size_t drawn_bytes(const HashParams& hash, size_t element_size) {
  return (size_t{hash.draw_slots} << hash.log2_block) * element_size;
}

/// A copy in shared memory of those elements, the slot at `base` first. All threads of the block
/// make it and call its functions.
template <class Number>
class WindowCopy {
 public:
  /// Starts to copy to `to`. `barrier` is in shared memory too, and belongs to this copy alone.
  __device__ __forceinline__ WindowCopy(const DeviceWeight& weight, uint32_t base,
                                        CopyBarrier* barrier, char* to)
      : barrier_(barrier), to_(to) {
    const HashParams& hash = weight.hash;
    const auto* pool = static_cast<const char*>(weight.pool);
    const uint32_t slot_bytes = sizeof(Number) << hash.log2_block;
    // The window begins anew at slot 0 where it passes the last.
    const uint32_t before_end = min(hash.draw_slots, hash.num_slots - base) * slot_bytes;
    bytes_ = hash.draw_slots * slot_bytes;
    const char* first = pool + size_t{base} * slot_bytes;
    aligned_ = (reinterpret_cast<uintptr_t>(first) | before_end | bytes_) % 16 == 0;
    if (is_bulk()) {
      if (threadIdx.x == 0) {
        copy_barrier_init(barrier);
        copy_barrier_expect(barrier, bytes_);
        copy_bulk(to, first, before_end, barrier);
        if (before_end < bytes_) copy_bulk(to + before_end, pool, bytes_ - before_end, barrier);
      }
    } else if (aligned_) {
      for (uint32_t at = threadIdx.x * 16; at < bytes_; at += blockDim.x * 16) {
        copy_async16(to + at, at < before_end ? first + at : pool + (at - before_end));
      }
      copy_async_commit();
    } else {
      for (uint32_t at = threadIdx.x * sizeof(Number); at < bytes_;
           at += blockDim.x * sizeof(Number)) {
        *reinterpret_cast<Number*>(to + at) = *reinterpret_cast<const Number*>(
            at < before_end ? first + at : pool + (at - before_end));
      }
    }
  }

  /// Until every thread can read it.
  __device__ __forceinline__ void wait() const {
    if (is_bulk()) {
      __syncthreads();
      copy_barrier_wait(barrier_, 0);
    } else {
      copy_async_wait<0>();
      __syncthreads();
    }
  }

  /// Writes its negative behind it: signs are then a matter of where to read. After wait().
  __device__ __forceinline__ void add_negative() const {
    static_assert(sizeof(Number) == 2);
    if (aligned_) {
      for (uint32_t at = threadIdx.x * 16; at < bytes_; at += blockDim.x * 16) {
        constexpr uint32_t kSigns = 0x80008000u;
        const uint4 four = *reinterpret_cast<const uint4*>(to_ + at);
        *reinterpret_cast<uint4*>(to_ + bytes_ + at) =
            make_uint4(four.x ^ kSigns, four.y ^ kSigns, four.z ^ kSigns, four.w ^ kSigns);
      }
    } else {
      for (uint32_t at = threadIdx.x * 2; at < bytes_; at += blockDim.x * 2) {
        *reinterpret_cast<uint16_t*>(to_ + bytes_ + at) =
            *reinterpret_cast<const uint16_t*>(to_ + at) ^ 0x8000u;
      }
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ bool is_bulk() const { return has_bulk_copies() && aligned_; }

  CopyBarrier* barrier_;
  char* to_;
  uint32_t bytes_;
  bool aligned_;
};

}  // namespace hfh::cuda
