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

/// What slot products take, by what they keep busy. The slots of a window are multiplied for all
/// rows of a thread block at once, and each row adds what it draws.
struct SlotProductCycles {
  struct Units {
    double tensor, shared, instructions;

    double most() const { return std::max({tensor, shared, instructions}); }
  };
  Units multiply;  // all slots by 32 words, see slot_products_kernel.h
  Units add;       // for a row what it draws of a column block

  SlotProductCycles(const HashParams& hash, double inputs) {
    const double hashes = hash.num_hashes, slots = hash.draw_slots, block = hash.block();
    // Half a cycle to write a slot's products; inputs, 64 * block bytes, are written once and read
    // by each of 8 warps.
    multiply = {slots * block / 36, slots / 2 + 4.5 * block, 660};
    add = {0, hashes * std::max(inputs, 2.0) / 24, (23 + hashes * (9 + inputs / 2)) / 128};
  }
};

/// Rows that share the products of a window's slots, at most.
inline constexpr int64_t kSlotProductRows = 256;

/// The samples that kernels of slot products are made for.
inline int64_t padded_slot_product_batch(int64_t batch) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(batch)));
}

/// Whether slot products cost less than tiles, of kernels that can both run.
inline bool slot_products_win(const HashParams& hash, int64_t batch, int64_t rows) {
  const auto inputs = static_cast<double>(padded_slot_product_batch(batch));
  const SlotProductCycles cycles(hash, inputs);
  const int64_t rows_per_window = hash.rows_per_window == 0 ? rows : hash.rows_per_window;
  const int64_t sharing = std::clamp<int64_t>(rows_per_window, 1, kSlotProductRows);
  const double share = inputs / 32 / static_cast<double>(sharing);
  const auto of_both = [&](double SlotProductCycles::Units::* unit) {
    return share * cycles.multiply.*unit + cycles.add.*unit;
  };
  using Units = SlotProductCycles::Units;
  const Units all{of_both(&Units::tensor), of_both(&Units::shared), of_both(&Units::instructions)};
  return all.most() < tile_cycles(hash, batch);
}

/// A panel is read again at once, out of the second-level cache.
inline constexpr int64_t kPanelBytes = int64_t{16} << 20;

/// Of the weight's gradient. What reads it is bound by instructions, not by where it comes from,
/// and blocks that share a window because a panel has few of them add it up once each: 7 us of 66
/// at 4096 x 4096 with windows of 64 KB.
inline constexpr int64_t kGradientPanelBytes = int64_t{32} << 20;

}  // namespace hfh::cuda
