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

  /// First and last row, exclusive, of a group.
  __device__ __forceinline__ void rows(uint64_t group, uint64_t& first, uint64_t& last) const {
    uint64_t window_end = end;
    if (rows_per_window == 0) {
      first = begin + group * kGroupRows;
    } else {
      group += group_of(begin);
      const uint64_t window = group / per_window * rows_per_window;
      first = window + group % per_window * kGroupRows;
      window_end = window + rows_per_window;
    }
    last = min(min(first + kGroupRows, window_end), end);
    first = max(first, begin);
  }

 private:
  /// Counted from the first window's first, where there are windows.
  HFH_HOST_DEVICE uint64_t group_of(uint64_t row) const {
    return row / rows_per_window * per_window + row % rows_per_window / kGroupRows;
  }
};

/// Bytes of the elements that a row can draw from.
inline size_t drawn_bytes(const HashParams& hash, size_t element_size) {
  return (size_t{hash.draw_slots} << hash.log2_block) * element_size;
}

/// Copies those elements to `shared`, the slot at `base` first, and behind them their negatives.
/// All threads of the block call it. `barrier` is in shared memory too.
template <class Number>
__device__ __forceinline__ void copy_window(const DeviceWeight& weight, uint32_t base,
                                            CopyBarrier* barrier, char* shared) {
  const HashParams& hash = weight.hash;
  const auto* pool = static_cast<const char*>(weight.pool);
  const uint32_t slot_bytes = sizeof(Number) << hash.log2_block;
  // The window begins anew at slot 0 where it passes the last.
  const uint32_t before_end = min(hash.draw_slots, hash.num_slots - base) * slot_bytes;
  const uint32_t bytes = hash.draw_slots * slot_bytes;
  const char* first = pool + size_t{base} * slot_bytes;
  const bool aligned = (reinterpret_cast<uintptr_t>(first) | before_end | bytes) % 16 == 0;
  if (has_bulk_copies() && aligned) {
    if (threadIdx.x == 0) {
      copy_barrier_init(barrier);
      copy_barrier_expect(barrier, bytes);
      copy_bulk(shared, first, before_end, barrier);
      if (before_end < bytes) copy_bulk(shared + before_end, pool, bytes - before_end, barrier);
    }
    __syncthreads();
    copy_barrier_wait(barrier, 0);
  } else if (aligned) {
    for (uint32_t at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) {
      copy_async16(shared + at, at < before_end ? first + at : pool + (at - before_end));
    }
    copy_async_commit();
    copy_async_wait<0>();
  } else {
    for (uint32_t at = threadIdx.x * sizeof(Number); at < bytes;
         at += blockDim.x * sizeof(Number)) {
      *reinterpret_cast<Number*>(shared + at) =
          *reinterpret_cast<const Number*>(at < before_end ? first + at : pool + (at - before_end));
    }
  }
  __syncthreads();
  // Signs are then a matter of where to read.
  static_assert(sizeof(Number) == 2);
  if (aligned) {
    for (uint32_t at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) {
      constexpr uint32_t kSigns = 0x80008000u;
      const uint4 four = *reinterpret_cast<const uint4*>(shared + at);
      *reinterpret_cast<uint4*>(shared + bytes + at) =
          make_uint4(four.x ^ kSigns, four.y ^ kSigns, four.z ^ kSigns, four.w ^ kSigns);
    }
  } else {
    for (uint32_t at = threadIdx.x * 2; at < bytes; at += blockDim.x * 2) {
      *reinterpret_cast<uint16_t*>(shared + bytes + at) =
          *reinterpret_cast<const uint16_t*>(shared + at) ^ 0x8000u;
    }
  }
  __syncthreads();
}

}  // namespace hfh::cuda
