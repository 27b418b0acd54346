#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/linear.h"
#include "hfh/params.h"

// Which kernel takes a product: where one begins to cost less than the next. The numbers are counts
// for an H200 (132 processors of 4 warp instructions and 128 bytes of shared memory a clock; the
// table in README), not yet measurements.

namespace hfh::cuda {

/// In clock cycles of a multiprocessor for a row and a column block of it. Slot products multiply
/// all slots of a window for at most 128 rows at once: slots * block / 40 cycles on the tensor
/// cores for 32 products of each, or as many to write them and to read the inputs. Of a product
/// that a row draws, shared memory reads 4 bytes at half its rate; a draw takes 8 instructions and
/// one for each input. Tiles read num_hashes elements of 2 bytes a weight, whatever the batch.
inline bool slot_products_win(const HashParams& hash, int64_t batch, int64_t rows) {
  const double hashes = hash.num_hashes, slots = hash.draw_slots, block = hash.block();
  const double inputs = batch > 4 ? 8 : batch > 2 ? 4 : static_cast<double>(batch);
  const int64_t rows_per_window = hash.rows_per_window == 0 ? rows : hash.rows_per_window;
  const double rows_at_once = static_cast<double>(std::clamp<int64_t>(rows_per_window, 1, 128));
  const double multiply = std::max(slots * block / 40, slots + 4 * block) / 32 / rows_at_once;
  const double add = std::max((13 + hashes * (8 + inputs)) / 128, hashes * inputs / 16);
  return inputs * multiply + add < block * hashes / 64;
}

/// A panel is read again at once, out of the second-level cache.
inline constexpr int64_t kPanelBytes = int64_t{16} << 20;

/// Of the weight's gradient. What reads it is bound by instructions, not by where it comes from,
/// and blocks that share a window because a panel has few of them add it up once each: 7 us of 66
/// at 4096 x 4096 with windows of 64 KB.
inline constexpr int64_t kGradientPanelBytes = int64_t{32} << 20;

}  // namespace hfh::cuda
