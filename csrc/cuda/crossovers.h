#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/linear.h"
#include "hfh/params.h"

// Which kernel takes a product: where one begins to cost less than the next. The numbers are counts
// for an H200 (132 processors of 4 warp instructions and 128 bytes of shared memory a clock; the
// table in README), not yet measurements.

namespace hfh::cuda {

/// Clock cycles of a multiprocessor for a row and a column block of it, with a linear g. Shared
/// memory reads num_hashes elements of 2 bytes a weight, 128 bytes a cycle, and passes the input
/// once for 64 rows; or the instructions of 128 lanes a cycle bind.
inline double tile_cycles(const HashParams& hash, int64_t batch) {
  const double hashes = hash.num_hashes, inputs = static_cast<double>(batch);
  return hash.block() * std::max(hashes / 64 + inputs / 4096, (2 + 1.3 * hashes) / 128);
}

/// The same by slot products, which multiply all slots of a window for at most 256 rows at once.
/// For 32 products of each slot that takes slots * block / 36 cycles of the tensor cores, half a
/// cycle a slot to write them and 4.5 * block to read the inputs, and 660 for the instructions. For
/// each product that a row draws, shared memory takes 1/24 cycle, and the lane 9 instructions and
/// one for two inputs.
inline double slot_product_cycles(const HashParams& hash, int64_t batch, int64_t rows) {
  const double hashes = hash.num_hashes, slots = hash.draw_slots, block = hash.block();
  const auto inputs = static_cast<double>(std::bit_ceil(static_cast<uint64_t>(batch)));
  const int64_t rows_per_window = hash.rows_per_window == 0 ? rows : hash.rows_per_window;
  const double share =
      inputs / 32 / static_cast<double>(std::clamp<int64_t>(rows_per_window, 1, 256));
  return std::max({share * slots * block / 36,
                   share * (slots / 2 + 4.5 * block) + hashes * std::max(inputs, 2.0) / 24,
                   share * 660 + (23 + hashes * (9 + inputs / 2)) / 128});
}

/// Of kernels that can both run.
inline bool slot_products_win(const HashParams& hash, int64_t batch, int64_t rows) {
  return slot_product_cycles(hash, batch, rows) < tile_cycles(hash, batch);
}

/// A panel is read again at once, out of the second-level cache.
inline constexpr int64_t kPanelBytes = int64_t{16} << 20;

/// Of the weight's gradient. What reads it is bound by instructions, not by where it comes from,
/// and blocks that share a window because a panel has few of them add it up once each: 7 us of 66
/// at 4096 x 4096 with windows of 64 KB.
inline constexpr int64_t kGradientPanelBytes = int64_t{32} << 20;

}  // namespace hfh::cuda
