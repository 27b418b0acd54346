#pragma once

#include "cpu/walk.h"

HFH_NAMESPACE_BEGIN

/// What some rows draw for one block of columns after the other: the hash of one block of many rows
/// fills the lanes where the few blocks of a short row would not, and what belongs to a row alone
/// is hashed once.
template <class W>
class RowDraws {
 public:
  using Uint = typename W::Uint;
  // Their draws share the first-level cache with the elements that are on their way.
  static constexpr int kRows = 128;
  /// Draws of rows this far ahead can be asked for, past the last one too; only to prefetch.
  static constexpr int kRowsAhead = 4;

  RowDraws(const HashParams& params, int num_hashes) : params_(params), num_hashes_(num_hashes) {}

  /// Not inlined, like `draw_block`: its constants would take the registers of the loop over the
  /// weights.
  __attribute__((noinline)) void set_rows(const uint32_t* rows, int count) {
    count_ = count;
    for (int i = 0; i < count; i += W::kLanes) {
      uint32_t lanes[W::kLanes];
      for (int lane = 0; lane < W::kLanes; ++lane) {
        lanes[lane] = rows[i + lane < count ? i + lane : count - 1];
      }
      const Uint row = load<Uint>(lanes);
      store(key_ + i, row_key(row, params_.seed));
      if (params_.rows_per_window != 0) store(base_ + i, window_bases(row, params_));
    }
  }

  __attribute__((noinline)) void draw_block(uint32_t block) {
    for (int i = 0; i < count_; i += W::kLanes) {
      const Uint key = weight_key(load<Uint>(key_ + i), splat_uint<Uint>(block));
      for (int u = 0; u < num_hashes_; ++u) {
        const Draw<Uint> one = draw(key, hash_lane(u), load<Uint>(base_ + i), params_);
        store(offset_[u] + i, one.slot << params_.log2_block);
        store(sign_[u] + i, one.sign);
      }
    }
  }

  /// Of hash u: the first element of the block that a row draws, and its sign.
  HFH_HOST_DEVICE uint32_t offset(int u, int row) const { return offset_[u][row]; }
  HFH_HOST_DEVICE uint32_t sign(int u, int row) const { return sign_[u][row]; }

 private:
  HashParams params_;
  int num_hashes_, count_ = 0;
  alignas(64) uint32_t key_[kRows];
  alignas(64) uint32_t base_[kRows] = {};
  alignas(64) uint32_t offset_[W::kHashesBound][kRows + W::kLanes] = {};
  alignas(64) uint32_t sign_[W::kHashesBound][kRows];
};

HFH_NAMESPACE_END
