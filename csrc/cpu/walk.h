#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/lanes.h"
#include "hfh/hash.h"
#include "hfh/params.h"
#include "hfh/reconstruct.h"

// Walks over a tile of the virtual weight. A walk by block visits the vectors of columns of one
// block of the hash together: each hash function supplies them from one stretch of the pool. Blocks
// shorter than a vector, the paper's hash among them, are walked by element.

HFH_NAMESPACE_BEGIN

using Tile = cpu::TileBounds;

/// Selects one specialisation of a walk, as types and constants.
template <class LanesT, class ShapeT, class PoolT, bool kByElementT>
struct With {
  using Lanes = LanesT;
  using Shape = ShapeT;
  using Pool = PoolT;
  using Vector = typename Lanes::Vector;
  using Uint = typename Lanes::Uint;
  using Scalar = typename Lanes::Scalar;
  static constexpr bool kByElement = kByElementT;
  static constexpr int kLanes = Lanes::kCount;
  static constexpr int kHashesBound = Shape::kHashesBound;
  static constexpr int kFirstBound =
      Shape::kHashesBound * (Shape::kWidthBound > 0 ? Shape::kWidthBound : 1);
};

/// Whether a vector from column `col` on lies inside a tile of `cols` columns.
template <class W>
HFH_HOST_DEVICE bool is_inside(int64_t col, int64_t cols) {
  return cols >= W::kLanes && static_cast<uint64_t>(col) <= static_cast<uint64_t>(cols - W::kLanes);
}

template <class W>
HFH_HOST_DEVICE ptrdiff_t round_up_to_lanes(ptrdiff_t count) {
  return (count + W::kLanes - 1) / W::kLanes * W::kLanes;
}

/// g's parameters as a local copy: a store through a pointer cannot alias it, so the compiler may
/// keep them in registers.
template <class W>
struct LocalTheta {
  typename W::Scalar values[kMaxTheta];
  LocalTheta(const typename W::Shape& shape, const VirtualWeight& weight) {
    const auto* theta = static_cast<const typename W::Scalar*>(weight.theta);
    for (int i = 0; i < theta_size_of(shape); ++i) values[i] = theta[i];
  }
};

/// The logical rows of a tile: neighbours from `first` on.
struct NeighbouringRows {
  static constexpr int kVectorsAtOnce = 1;  // of blocks, drawn for together
  uint32_t first;
  HFH_HOST_DEVICE uint32_t operator[](int64_t i) const { return first + static_cast<uint32_t>(i); }
};

/// The logical rows of a tile, in any order, and perhaps some that come after.
struct ListedRows {
  // The steps of a hash wait for each other: two vectors fill each other's gaps.
  static constexpr int kVectorsAtOnce = 2;
  const uint32_t* rows;
  int64_t count;
  HFH_HOST_DEVICE uint32_t operator[](int64_t i) const { return rows[i]; }
};

HFH_HOST_DEVICE NeighbouringRows rows_of(const VirtualWeight& weight, const Tile& tile) {
  return {weight.row_offset + static_cast<uint32_t>(tile.row)};
}

/// Calls `f(lookups)` for the rows of a tile, some at a time; their places are `stride` apart. The
/// rows below are listed too: they tend to come next.
template <class F>
void for_each_listed(const VirtualWeight& weight, const Tile& tile, int64_t stride, const F& f) {
  constexpr int64_t kRowsAtOnce = 64, kRowsAhead = 16;
  uint32_t row[kRowsAtOnce + kRowsAhead];
  int64_t place[kRowsAtOnce];
  const NeighbouringRows rows = rows_of(weight, tile);
  for (int64_t first = 0; first < tile.rows; first += kRowsAtOnce) {
    const int64_t count = tile.rows - first < kRowsAtOnce ? tile.rows - first : kRowsAtOnce;
    for (int64_t i = 0; i < count + kRowsAhead; ++i) row[i] = rows[first + i];
    for (int64_t i = 0; i < count; ++i) place[i] = (first + i) * stride;
    f(cpu::RowLookups{row, place, count, count + kRowsAhead});
  }
}

/// `window_base` of the row in each lane.
template <class Uint>
HFH_HOST_DEVICE Uint window_bases(Uint row, const HashParams& params) {
  uint32_t lanes[sizeof(Uint) / sizeof(uint32_t)];
  store(lanes, row);
  for (uint32_t& lane : lanes) lane = window_base(lane, params);
  return load<Uint>(lanes);
}

/// The keys of the blocks of listed rows, some vectors at a time. Past the last row it repeats.
template <class W, int kVectors>
class KeyList {
 public:
  using Uint = typename W::Uint;
  struct Keys {
    Uint key[kVectors], base[kVectors];  // base: see `window_base`
  };

  KeyList(ListedRows rows, HashParams params, uint32_t first_block, uint32_t num_blocks)
      : rows_(rows), params_(params), first_block_(first_block), num_blocks_(num_blocks) {
    const Uint lane = count_from<Uint>(0);
    place_ = lane / num_blocks;
    block_ = lane - place_ * num_blocks;
    take();
  }

  /// Keys that an earlier call computed: what follows from them need not wait.
  HFH_HOST_DEVICE Keys take() {
    const Keys taken = next_;
    for (int v = 0; v < kVectors; ++v, advance()) {
      const uint32_t last = static_cast<uint32_t>(rows_.count - 1);
      const Uint row = gather_uint(rows_.rows, place_ < last ? place_ : splat_uint<Uint>(last));
      next_.key[v] = weight_key(row_key(row, params_.seed), block_ + first_block_);
      if (params_.rows_per_window != 0) next_.base[v] = window_bases(row, params_);
    }
    return taken;
  }

 private:
  HFH_HOST_DEVICE void advance() {
    block_ += W::kLanes % num_blocks_;
    place_ += W::kLanes / num_blocks_;
    const auto ends = block_ >= num_blocks_;
    place_ = ends ? place_ + 1 : place_;
    block_ = ends ? block_ - num_blocks_ : block_;
  }

  ListedRows rows_;
  HashParams params_;
  uint32_t first_block_, num_blocks_;
  Uint place_, block_;  // of each lane: which of the rows, and the block from the first on
  Keys next_ = {};
};

/// The draws of some vectors of blocks and of as many that come next: a ring.
template <class W, int kVectorsAtOnceT>
struct BlockDraws {
  using Uint = typename W::Uint;
  static constexpr int kAtOnce = kVectorsAtOnceT * W::kLanes, kCount = 2 * kAtOnce;
  alignas(64) uint32_t offset[W::kHashesBound][kCount];  // of the block's first element
  alignas(64) uint32_t sign[W::kHashesBound][kCount];

  /// Of consecutive blocks of one row, from `lane` on. Not inlined: its constants would take the
  /// registers of the loop over the weights.
  __attribute__((noinline)) void compute(const typename W::Shape& shape, HashParams params,
                                         uint32_t row_key, uint32_t base, uint32_t first_block,
                                         int lane) {
    compute(shape, params, weight_key(splat_uint<Uint>(row_key), count_from<Uint>(first_block)),
            base, lane);
  }

  /// Of the next of a list; not inlined either.
  __attribute__((noinline)) void compute(const typename W::Shape& shape, HashParams params,
                                         KeyList<W, kVectorsAtOnceT>& list, int lane) {
    const auto keys = list.take();
    for (int v = 0; v < kVectorsAtOnceT; ++v) {
      compute(shape, params, keys.key[v], keys.base[v], lane + v * W::kLanes);
    }
  }

 private:
  template <class Base>
  HFH_HOST_DEVICE void compute(const typename W::Shape& shape, const HashParams& params, Uint key,
                               Base base, int lane) {
    for (int u = 0; u < shape.num_hashes(); ++u) {
      const Draw<Uint> one = draw(key, hash_lane(u), base, params);
      store(offset[u] + lane, one.slot << params.log2_block);
      store(sign[u] + lane, one.sign);
    }
  }
};

/// Where a walk over blocks begins and ends, in logical columns.
template <class W>
struct BlockRange {
  uint64_t begin, start, end;  // start: begin, moved down to the start of its vector
  uint32_t first_block, num_blocks;
  int num_groups;  // of kLanes blocks

  BlockRange(const VirtualWeight& weight, const Tile& tile) {
    begin = uint64_t{weight.col_offset} + tile.col;
    end = begin + tile.cols;
    start = begin / W::kLanes * W::kLanes;
    first_block = static_cast<uint32_t>(start >> weight.hash.log2_block);
    num_blocks = static_cast<uint32_t>((end - 1) >> weight.hash.log2_block) - first_block + 1;
    num_groups = (num_blocks + W::kLanes - 1) / W::kLanes;
  }

  bool is_whole(const HashParams& params) const {
    return ((begin | end) & (params.block() - 1)) == 0;
  }
};

/// What a range takes of one block: elements [phase, stop), the first of them at column `col` of
/// the tile, below 0 at a ragged start.
struct BlockPart {
  static constexpr bool kWhole = false;
  uint32_t phase, stop;
  int64_t col;

  template <class W>
  HFH_HOST_DEVICE BlockPart(const BlockRange<W>& range, const HashParams& params, uint32_t block) {
    const uint64_t block_start = uint64_t{block} << params.log2_block;
    phase = block_start < range.start ? static_cast<uint32_t>(range.start - block_start) : 0;
    const uint64_t left = range.end - block_start;
    stop = left < params.block() ? static_cast<uint32_t>(left) : params.block();
    col = static_cast<int64_t>(block_start + phase - range.begin);
  }
};

/// The same of a range of whole blocks; of two vectors each, or of any number.
template <class W, bool kTwoVectors>
struct WholeBlock {
  static constexpr bool kWhole = true;
  static constexpr uint32_t phase = 0;
  uint32_t stop;
  int64_t col;

  HFH_HOST_DEVICE WholeBlock(const BlockRange<W>& range, const HashParams& params, uint32_t block)
      : stop(kTwoVectors ? 2 * W::kLanes : params.block()),
        col(static_cast<int64_t>(block - range.first_block) * stop) {}
};

/// Visits the tile row by row, blocks in order. `prepare(draws, lane)` sees each vector of draws
/// before its blocks; `visit(row, part, draws, lane, ahead)` sees each block, of which the range
/// takes `part`, and the lane of one that comes later, whose lines can be prefetched.
template <class W, class Draws, class Prepare, class Visit, class RowDone>
HFH_HOST_DEVICE void walk_blocks(const VirtualWeight& weight, const typename W::Shape& shape,
                                 NeighbouringRows rows, const Tile& tile, const Prepare& prepare,
                                 const Visit& visit, const RowDone& row_done) {
  const HashParams params = weight.hash;
  const BlockRange<W> range(weight, tile);
  const uint32_t first_row = rows.first;

  Draws draws;
  uint32_t key = row_key(first_row, params.seed), base = window_base(first_row, params);
  draws.compute(shape, params, key, base, range.first_block, 0);
  prepare(draws, 0);
  int current = 0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int group = 0; group < range.num_groups; ++group) {
      const uint32_t first = range.first_block + group * W::kLanes;
      const int next = W::kLanes - current;
      const bool row_ends = group + 1 == range.num_groups;
      if (row_ends) {
        const uint32_t next_row = first_row + static_cast<uint32_t>(row) + 1;
        key = row_key(next_row, params.seed);
        base = window_base(next_row, params);
      }
      draws.compute(shape, params, key, base, row_ends ? range.first_block : first + W::kLanes,
                    next);
      prepare(draws, next);
      const uint32_t blocks_left = range.num_blocks - group * W::kLanes;
      const int blocks = blocks_left < W::kLanes ? static_cast<int>(blocks_left) : W::kLanes;
      for (int lane = 0; lane < blocks; ++lane) {
        visit(row, BlockPart(range, params, first + lane), draws, current + lane, next + lane);
      }
      current = next;
    }
    row_done(row);
  }
}

/// The same for listed rows, drawing for the blocks of as many rows at a time as there are lanes:
/// one short row would leave most lanes without a block.
template <class W, class Draws, class Prepare, class Visit, class RowDone>
HFH_HOST_DEVICE void walk_blocks(const VirtualWeight& weight, const typename W::Shape& shape,
                                 ListedRows rows, const Tile& tile, const Prepare& prepare,
                                 const Visit& visit, const RowDone& row_done) {
  const HashParams params = weight.hash;
  // More would crowd the tile that is being written out of the first-level cache.
  constexpr int kBlocksAhead = W::kLanes / 4;
  const BlockRange<W> range(weight, tile);
  const auto walk = [&]<class Part>(const Part*) __attribute__((always_inline)) {
    KeyList<W, ListedRows::kVectorsAtOnce> list(rows, params, range.first_block, range.num_blocks);
    Draws draws;
    const auto draw_next = [&](int lane) {
      draws.compute(shape, params, list, lane);
      for (int v = 0; v < Draws::kAtOnce; v += W::kLanes) prepare(draws, lane + v);
    };
    draw_next(0);
    int lane = 0;
    int64_t row = 0;
    uint32_t block = range.first_block;
    for (int64_t left = tile.rows * range.num_blocks; left > 0; left -= Draws::kAtOnce) {
      draw_next(Draws::kAtOnce - lane);
      const int end = lane + static_cast<int>(left < Draws::kAtOnce ? left : Draws::kAtOnce);
      for (; lane < end; ++lane) {
        visit(row, Part(range, params, block), draws, lane, (lane + kBlocksAhead) % Draws::kCount);
        if (++block == range.first_block + range.num_blocks) {
          row_done(row);
          block = range.first_block;
          ++row;
        }
      }
      lane %= Draws::kCount;
    }
  };
  if (!range.is_whole(params)) return walk(static_cast<BlockPart*>(nullptr));
  params.block() == 2 * W::kLanes ? walk(static_cast<WholeBlock<W, true>*>(nullptr))
                                  : walk(static_cast<WholeBlock<W, false>*>(nullptr));
}

/// Draws and signed pool elements of kLanes neighbouring columns, one hash a lane.
template <class W>
struct ElementDraws {
  typename W::Uint offset[W::kHashesBound];
  typename W::Uint sign[W::kHashesBound];
  typename W::Vector a[W::kHashesBound];
};

/// Visits the tile row by row, a vector of columns at a time: `visit(row, col, draws)`. The last
/// vector may reach past the tile's last column.
template <class W, class Rows, class Visit, class RowDone>
HFH_HOST_DEVICE void walk_elements(const VirtualWeight& weight, const typename W::Shape& shape,
                                   Rows rows, const Tile& tile, const Visit& visit,
                                   const RowDone& row_done) {
  using Uint = typename W::Uint;
  const HashParams params = weight.hash;
  const auto* pool = static_cast<const typename W::Pool*>(weight.pool);
  const uint32_t first_col = weight.col_offset + static_cast<uint32_t>(tile.col);
  for (int64_t row = 0; row < tile.rows; ++row) {
    const uint32_t logical_row = rows[row];
    const Uint key_of_row = splat_uint<Uint>(row_key(logical_row, params.seed));
    const uint32_t base = window_base(logical_row, params);
    for (int64_t col = 0; col < tile.cols; col += W::kLanes) {
      const Uint logical_col = count_from<Uint>(first_col + static_cast<uint32_t>(col));
      const Uint key = weight_key(key_of_row, logical_col >> params.log2_block);
      const Uint within = logical_col & (params.block() - 1);
      ElementDraws<W> draws;
      for (int u = 0; u < shape.num_hashes(); ++u) {
        const Draw<Uint> one = draw(key, hash_lane(u), base, params);
        draws.offset[u] = (one.slot << params.log2_block) + within;
        draws.sign[u] = one.sign;
        draws.a[u] = flip_sign(gather<typename W::Vector>(pool, draws.offset[u]), draws.sign[u]);
      }
      visit(row, col, draws);
    }
    row_done(row);
  }
}

HFH_NAMESPACE_END
