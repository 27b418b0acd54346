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
  uint32_t first;
  HFH_HOST_DEVICE uint32_t operator[](int64_t i) const { return first + static_cast<uint32_t>(i); }
};

/// The logical rows of a tile, in any order, and perhaps some that come after.
struct ListedRows {
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

/// The blocks of listed rows, kLanes at a time. Past the last row it repeats.
template <class W>
struct BlockList {
  ListedRows rows;
  uint32_t first_block, num_blocks;
  int64_t row = 0;
  uint32_t block = 0;
  alignas(64) uint32_t row_lanes[W::kLanes];
  alignas(64) uint32_t block_lanes[W::kLanes];

  BlockList(ListedRows rows, uint32_t first_block, uint32_t num_blocks)
      : rows(rows), first_block(first_block), num_blocks(num_blocks) {}

  HFH_HOST_DEVICE void take() {
    for (int lane = 0; lane < W::kLanes; ++lane) {
      row_lanes[lane] = rows[row];
      block_lanes[lane] = first_block + block;
      if (++block < num_blocks) continue;
      block = 0;
      if (row + 1 < rows.count) ++row;
    }
  }
};

/// The draws of kLanes blocks.
template <class W>
struct BlockDraws {
  using Uint = typename W::Uint;
  alignas(64) uint32_t offset[W::kHashesBound][W::kLanes];  // of the block's first element
  alignas(64) uint32_t sign[W::kHashesBound][W::kLanes];

  /// Of consecutive blocks of one row. Not inlined: its constants would take the registers of the
  /// loop over the weights.
  __attribute__((noinline)) void compute(const typename W::Shape& shape, const HashParams& params,
                                         uint32_t row_key, uint32_t base, uint32_t first_block) {
    compute(shape, params, weight_key(splat_uint<Uint>(row_key), count_from<Uint>(first_block)),
            base);
  }

  /// Of the next of a list; not inlined either.
  __attribute__((noinline)) void compute(const typename W::Shape& shape, const HashParams& params,
                                         BlockList<W>& list) {
    list.take();
    const Uint row = load<Uint>(list.row_lanes);
    const Uint key = weight_key(row_key(row, params.seed), load<Uint>(list.block_lanes));
    Uint base = {};
    if (params.rows_per_window != 0) base = window_bases(row, params);
    compute(shape, params, key, base);
  }

 private:
  template <class Base>
  HFH_HOST_DEVICE void compute(const typename W::Shape& shape, const HashParams& params, Uint key,
                               Base base) {
    for (int u = 0; u < shape.num_hashes(); ++u) {
      const Draw<Uint> one = draw(key, hash_lane(u), base, params);
      store(offset[u], one.slot << params.log2_block);
      store(sign[u], one.sign);
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
};

/// What a range takes of one block: elements [phase, stop), the first of them at column `col` of
/// the tile, below 0 at a ragged start.
struct BlockPart {
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

/// Visits the tile row by row, blocks in order. `prepare(draws)` sees each group of draws before
/// its blocks; `visit(row, col, draws, lane, ahead, ahead_lane, phase, stop)` sees each block, as a
/// `BlockPart` has it, and one that comes later, whose lines can be prefetched.
template <class W, class Draws, class Prepare, class Visit, class RowDone>
HFH_HOST_DEVICE void walk_blocks(const VirtualWeight& weight, const typename W::Shape& shape,
                                 NeighbouringRows rows, const Tile& tile, const Prepare& prepare,
                                 const Visit& visit, const RowDone& row_done) {
  const HashParams params = weight.hash;
  const BlockRange<W> range(weight, tile);
  const uint32_t first_row = rows.first;

  Draws buffer[2];
  uint32_t key = row_key(first_row, params.seed), base = window_base(first_row, params);
  buffer[0].compute(shape, params, key, base, range.first_block);
  prepare(buffer[0]);
  int current = 0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int group = 0; group < range.num_groups; ++group) {
      const uint32_t first = range.first_block + group * W::kLanes;
      const Draws& draws = buffer[current];
      Draws& next = buffer[1 - current];
      const bool row_ends = group + 1 == range.num_groups;
      if (row_ends) {
        const uint32_t next_row = first_row + static_cast<uint32_t>(row) + 1;
        key = row_key(next_row, params.seed);
        base = window_base(next_row, params);
      }
      next.compute(shape, params, key, base, row_ends ? range.first_block : first + W::kLanes);
      prepare(next);
      const uint32_t blocks_left = range.num_blocks - group * W::kLanes;
      const int blocks = blocks_left < W::kLanes ? static_cast<int>(blocks_left) : W::kLanes;
      for (int lane = 0; lane < blocks; ++lane) {
        const BlockPart part(range, params, first + lane);
        visit(row, part.col, draws, lane, next, lane, part.phase, part.stop);
      }
      current = 1 - current;
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
  BlockList<W> list(rows, range.first_block, range.num_blocks);
  Draws buffer[2];
  buffer[0].compute(shape, params, list);
  prepare(buffer[0]);
  int current = 0;
  int64_t row = 0;
  uint32_t block = 0;
  for (int64_t left = tile.rows * range.num_blocks; left > 0; left -= W::kLanes) {
    const Draws& draws = buffer[current];
    Draws& next = buffer[1 - current];
    next.compute(shape, params, list);
    prepare(next);
    const int count = left < W::kLanes ? static_cast<int>(left) : W::kLanes;
    for (int lane = 0; lane < count; ++lane) {
      const BlockPart part(range, params, range.first_block + block);
      const int later = lane + kBlocksAhead;
      visit(row, part.col, draws, lane, later < W::kLanes ? draws : next, later % W::kLanes,
            part.phase, part.stop);
      if (++block == range.num_blocks) {
        row_done(row);
        block = 0;
        ++row;
      }
    }
    current = 1 - current;
  }
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
