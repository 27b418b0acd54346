#pragma once

#include <cstdint>

#include "cuda/linear.h"
#include "hfh/params.h"

// Which kernel takes a product: where one begins to cost less than the next. The numbers are counts
// for an H200 (132 processors of 4 warp instructions and 128 bytes of shared memory a clock; the
// table in README), not yet measurements.

namespace hfh::cuda {

/// Slot products cost the tensor cores batch * draw_slots / rows_per_window products a weight, and
/// are bound by them; tiles read num_hashes elements a weight, whatever the batch.
inline bool slot_products_win(const HashParams& hash, int64_t batch, int64_t rows) {
  const int64_t rows_per_window = hash.rows_per_window == 0 ? rows : hash.rows_per_window;
  return batch * int64_t{hash.draw_slots} <= 16 * int64_t{hash.num_hashes} * rows_per_window;
}

/// A panel is read again at once, out of the second-level cache.
inline constexpr int64_t kPanelBytes = int64_t{16} << 20;

}  // namespace hfh::cuda
