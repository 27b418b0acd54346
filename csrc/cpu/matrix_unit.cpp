#include "cpu/matrix_unit.h"

#include <immintrin.h>

#include <bit>

#include "cpu/kernels.h"
#include "cpu/matrix_unit_tiles.h"

HFH_NAMESPACE_BEGIN

namespace {

using cpu::MatrixUnit;
using Side = MatrixUnit::Side;

template <bool kTransposed>
void pack_rows(const float* source, int64_t stride, int64_t extent, int64_t depth, char* packed,
               cpu::Meanwhile meanwhile) {
  for (int64_t i = 0; i < extent; i += kTile) {
    for (int64_t k = 0; k < depth; k += kStep, packed += kPieces * kTileBytes) {
      const __mmask16 lanes[] = {first_lanes(depth - k), first_lanes(depth - k - kTile)};
      const float* tile = source + i * stride + k;
      const auto load_row = [&](int64_t row, int half) {
        return load_lanes(i + row < extent ? lanes[half] : 0, tile + row * stride + half * kTile);
      };
      pack_tile<kTransposed>(load_row, packed);
      meanwhile();
    }
  }
}

template <bool kTransposed>
void pack_columns(const float* source, int64_t stride, int64_t extent, int64_t depth, char* packed,
                  cpu::Meanwhile meanwhile) {
  for (int64_t i = 0; i < extent; i += kTile) {
    const __mmask16 lanes = first_lanes(extent - i);
    for (int64_t k = 0; k < depth; k += kStep, packed += kPieces * kTileBytes) {
      const float* tile = source + k * stride + i;
      const auto load_row = [&](int64_t row, int half) {
        const int64_t inner = row + half * kTile;
        return load_lanes(k + inner < depth ? lanes : 0, tile + inner * stride);
      };
      pack_tile<kTransposed>(load_row, packed);
      meanwhile();
    }
  }
}

void pack_inner_contiguous(Side side, const float* source, int64_t stride, int64_t extent,
                           int64_t depth, void* packed, cpu::Meanwhile meanwhile) {
  auto* bytes = static_cast<char*>(packed);
  side == Side::kLeft ? pack_rows<false>(source, stride, extent, depth, bytes, meanwhile)
                      : pack_rows<true>(source, stride, extent, depth, bytes, meanwhile);
}

void pack_outer_contiguous(Side side, const float* source, int64_t stride, int64_t extent,
                           int64_t depth, void* packed, cpu::Meanwhile meanwhile) {
  auto* bytes = static_cast<char*>(packed);
  side == Side::kLeft ? pack_columns<true>(source, stride, extent, depth, bytes, meanwhile)
                      : pack_columns<false>(source, stride, extent, depth, bytes, meanwhile);
}

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  /// All eight registers hold 16 rows of 64 bytes.
  constexpr TileConfiguration() {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = kRowBytes;
      rows[i] = kTile;
    }
  }
};

void prepare() {
  // In static memory: GCC 12 takes the instruction to read 8 bytes, and drops stores to the rest.
  static constexpr TileConfiguration configuration;
  _tile_loadconfig(&configuration);
}

void release() { _tile_release(); }

// Registers are named by constants: 0 to 3 are the sums of 2 x 2 tiles, 4 and 5 are of the left
// operand, 6 and 7 of the right one. They keep what they hold from step to step.

/// The pieces that meet, small products first for the sum's precision, and from each to the next
/// only one of the two changes.
struct PiecePair {
  int left, right;
  bool loads_left, loads_right;
};
constexpr PiecePair kPairs[] = {
    {2, 0, true, true},  {1, 0, true, false}, {1, 1, false, true},
    {0, 1, true, false}, {0, 2, false, true}, {0, 0, false, true},
};
constexpr int kNumPairs = 6;

/// Where a step finds an operand's tiles: the first one, and how many bytes lead to the next and
/// from piece to piece.
struct Operand {
  const char* tile;
  int64_t next, piece;
};

/// Adds the products of one pair of pieces over a step of the inner dimension, for kRows x kCols
/// tiles.
template <int kPair, int kRows, int kCols>
void multiply_pieces(const Operand& left, const Operand& right) {
  constexpr PiecePair pair = kPairs[kPair];
  if constexpr (pair.loads_left) {
    const char* tile = left.tile + pair.left * left.piece;
    _tile_loadd(4, tile, kRowBytes);
    if constexpr (kRows > 1) _tile_loadd(5, tile + left.next, kRowBytes);
  }
  if constexpr (pair.loads_right) {
    const char* tile = right.tile + pair.right * right.piece;
    _tile_loadd(6, tile, kRowBytes);
    if constexpr (kCols > 1) _tile_loadd(7, tile + right.next, kRowBytes);
  }
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kCols > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kRows > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kRows > 1 && kCols > 1) _tile_dpbf16ps(3, 5, 7);
}

using MultiplyPieces = void (*)(const Operand& left, const Operand& right);

/// By pair of pieces, and whether there are two tiles down and across.
constexpr MultiplyPieces kMultiplyPieces[kNumPairs][2][2] = {
#define HFH_PAIR(pair)                                            \
  {                                                               \
    {multiply_pieces<pair, 1, 1>, multiply_pieces<pair, 1, 2>}, { \
      multiply_pieces<pair, 2, 1>, multiply_pieces<pair, 2, 2>    \
    }                                                             \
  }
    HFH_PAIR(0), HFH_PAIR(1), HFH_PAIR(2), HFH_PAIR(3), HFH_PAIR(4), HFH_PAIR(5),
#undef HFH_PAIR
};

/// All pairs of pieces.
template <int kRows, int kCols>
void multiply_step(const Operand& left, const Operand& right) {
  multiply_pieces<0, kRows, kCols>(left, right);
  multiply_pieces<1, kRows, kCols>(left, right);
  multiply_pieces<2, kRows, kCols>(left, right);
  multiply_pieces<3, kRows, kCols>(left, right);
  multiply_pieces<4, kRows, kCols>(left, right);
  multiply_pieces<5, kRows, kCols>(left, right);
}

constexpr MultiplyPieces kMultiplyStep[2][2] = {{multiply_step<1, 1>, multiply_step<1, 2>},
                                                {multiply_step<2, 1>, multiply_step<2, 2>}};

void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

/// The tile of an operand from row or column `first` on.
MatrixUnit::Tile tile_at(const MatrixUnit::Product& product, Side side, int64_t first) {
  const MatrixUnit::Images* images = product.images;
  if (images != nullptr && images->side == side) return images->tiles[first / kTile];
  const bool strides = (side == Side::kLeft) != product.is_transposed;
  return {first * steps_of(product.depth) * kPieces * kTileBytes / kTile,
          strides ? first * product.stride : first,
          first_lanes((side == Side::kLeft ? product.rows : product.cols) - first)};
}

/// Adds those rows and columns of a tile to memory, side by side; what is not finite leaves NaN in
/// `check`.
void add_tile(const float (*tile)[kTile], __mmask16 rows, __mmask16 cols, float* sums,
              int64_t stride, FloatVector& check) {
  const __mmask16 lanes = first_lanes(std::popcount(cols));
  for (uint32_t left = rows; left != 0; left &= left - 1, sums += stride) {
    const __m512 row = _mm512_load_ps(tile[std::countr_zero(left)]);
    const FloatVector sum =
        load_lanes(lanes, sums) + (FloatVector)_mm512_maskz_compress_ps(cols, row);
    _mm512_mask_storeu_ps(sums, lanes, (__m512)sum);
    check += sum * 0.0f;
  }
}

/// Adds the registers' sums of the tiles at (row, col) to memory.
void add_sums(MatrixUnit::Product& product) {
  alignas(64) float tiles[4][kTile][kTile], turned[kTile][kTile];
  _tile_stored(0, tiles[0], kRowBytes);
  _tile_stored(1, tiles[1], kRowBytes);
  _tile_stored(2, tiles[2], kRowBytes);
  _tile_stored(3, tiles[3], kRowBytes);
  FloatVector check = {};
  for (int i = 0; i < 4; ++i) {
    const int64_t row = product.row + i / 2 * kTile, col = product.col + i % 2 * kTile;
    if (row >= product.rows || col >= product.cols) continue;
    const MatrixUnit::Tile rows = tile_at(product, Side::kLeft, row);
    const MatrixUnit::Tile cols = tile_at(product, Side::kRight, col);
    float* sums = product.sums + rows.sums + cols.sums;
    if (product.is_transposed) {
      transpose_square(tiles[i][0], kTile, turned[0], kTile);
      add_tile(turned, cols.lanes, rows.lanes, sums, product.stride, check);
    } else {
      add_tile(tiles[i], rows.lanes, cols.lanes, sums, product.stride, check);
    }
  }
  product.finite = product.finite && horizontal_sum(check) == 0.0f;
}

/// Asks for the memory of the next tiles of sums, which lies a page apart from row to row.
void prefetch_sums(const MatrixUnit::Product& product) {
  for (int64_t row = product.row; row < product.rows && row < product.row + 2 * kTile;
       row += kTile) {
    const MatrixUnit::Tile rows = tile_at(product, Side::kLeft, row);
    for (int64_t col = product.col; col < product.cols && col < product.col + 2 * kTile;
         col += kTile) {
      const MatrixUnit::Tile cols = tile_at(product, Side::kRight, col);
      const int count = std::popcount(product.is_transposed ? cols.lanes : rows.lanes);
      const float* sums = product.sums + rows.sums + cols.sums;
      for (int i = 0; i < count; ++i) __builtin_prefetch(sums + i * product.stride, 1);
    }
  }
}

/// Where the next step finds tiles from row or column `first` on.
Operand operand_at(const MatrixUnit::Product& product, Side side, const void* packed, int64_t first,
                   bool two) {
  const MatrixUnit::Images* images = product.images;
  const bool is_images = images != nullptr && images->side == side;
  const int64_t step = product.k / kStep, tile = tile_at(product, side, first).bytes;
  const int64_t next = two ? tile_at(product, side, first + kTile).bytes - tile : 0;
  const int64_t inner = is_images ? images->steps[step] : step * kPieces * kTileBytes;
  return {static_cast<const char*>(packed) + tile + inner, next,
          is_images ? images->piece_bytes : kTileBytes};
}

void start(MatrixUnit::Product& product) {
  const auto pairs_of_tiles = [](int64_t size) { return (size + 2 * kTile - 1) / (2 * kTile); };
  product.steps_left = pairs_of_tiles(product.rows) * pairs_of_tiles(product.cols) *
                       steps_of(product.depth) * kNumPairs;
  zero_sums();
}

void advance(MatrixUnit::Product& product, int64_t steps) {
  if (steps > product.steps_left) steps = product.steps_left;
  product.steps_left -= steps;
  while (steps > 0) {
    const bool two_down = product.rows - product.row > kTile;
    const bool two_across = product.cols - product.col > kTile;
    const bool whole_step = product.pair == 0 && steps >= kNumPairs;
    const int pairs = whole_step ? kNumPairs : 1;
    const auto& multiply = whole_step ? kMultiplyStep : kMultiplyPieces[product.pair];
    if (product.pair == 0 && product.k == 0) prefetch_sums(product);
    multiply[two_down][two_across](
        operand_at(product, Side::kLeft, product.left, product.row, two_down),
        operand_at(product, Side::kRight, product.right, product.col, two_across));
    steps -= pairs;
    product.pair += pairs;
    if (product.pair < kNumPairs) continue;
    product.pair = 0;
    product.k += kStep;
    if (product.k < product.depth) continue;
    add_sums(product);
    zero_sums();
    product.k = 0;
    // Padded images are the larger operand: each stretch of them meets the whole other one.
    const bool cols_first = product.images != nullptr && product.images->side == Side::kLeft;
    int64_t& inner = cols_first ? product.col : product.row;
    int64_t& outer = cols_first ? product.row : product.col;
    inner += 2 * kTile;
    if (inner < (cols_first ? product.cols : product.rows)) continue;
    inner = 0;
    outer += 2 * kTile;
  }
}

}  // namespace

HFH_NAMESPACE_END

namespace hfh::cpu {

const MatrixUnit& amx() {
  static constexpr MatrixUnit unit{
      pack_inner_contiguous,
      pack_outer_contiguous,
      pack_taps,
      transpose,
      pack_channel_pairs,
      pack_pixel_pairs,
      pack_pixels,
      prepare,
      release,
      start,
      advance,
  };
  return unit;
}

}  // namespace hfh::cpu
