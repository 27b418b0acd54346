#include "cpu/matrix_unit.h"

#include <immintrin.h>

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/multiply.h"

HFH_NAMESPACE_BEGIN

namespace {

using cpu::MatrixUnit;
using Side = MatrixUnit::Side;

constexpr int64_t kTile = MatrixUnit::kTile, kStep = MatrixUnit::kStep;
constexpr int kPieces = 3;
// A tile of a packed operand: 16 rows of 16 pairs of elements, a pair being elements k and k + 16
// of a step of the inner dimension.
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kRowBytes = 64;
static_assert(kFloatLanes == kTile && kStep == 2 * kTile);
static_assert(kPieces * kTileBytes == kTile * kStep * MatrixUnit::kElementBytes);

int64_t steps_of(int64_t depth) { return (depth + kStep - 1) / kStep; }

__mmask16 first_lanes(int64_t count) {
  return count >= kTile ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

/// Those elements of a vector in memory; zero elsewhere, where no memory is touched.
FloatVector load_lanes(__mmask16 lanes, const float* source) {
  return (FloatVector)_mm512_maskz_loadu_ps(lanes, source);
}

/// The pieces of 16 pairs; the upper half of a float is a bfloat16.
struct Pairs {
  UintVector piece[kPieces];
};

Pairs split(FloatVector first, FloatVector second) {
  constexpr uint32_t kUpper = 0xffff0000;
  Pairs pairs;
  for (int p = 0; p < kPieces; ++p) {
    pairs.piece[p] = ((UintVector)second & kUpper) | ((UintVector)first >> 16);
    first -= (FloatVector)((UintVector)first & kUpper);
    second -= (FloatVector)((UintVector)second & kUpper);
  }
  return pairs;
}

/// Packs one tile of all pieces; `load(i, half)` gives 16 floats: of the pairs of row i of the
/// untransposed tile, their first or their second elements.
template <bool kTransposed, class Load>
void pack_tile(const Load& load_row, char* packed) {
  alignas(64) float rows[kPieces][kTile][kTile];
  for (int64_t i = 0; i < kTile; ++i) {
    const Pairs pairs = split(load_row(i, 0), load_row(i, 1));
    for (int p = 0; p < kPieces; ++p) {
      void* row =
          kTransposed ? static_cast<void*>(rows[p][i]) : packed + p * kTileBytes + i * kRowBytes;
      store(row, pairs.piece[p]);
    }
  }
  if constexpr (kTransposed) {
    for (int p = 0; p < kPieces; ++p) {
      transpose_square(rows[p][0], kTile, reinterpret_cast<float*>(packed + p * kTileBytes), kTile);
    }
  }
}

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

/// Adds the products of one pair of pieces over a step of the inner dimension, for kRows x kCols
/// tiles; `next` bytes lead from a tile of an operand to the one below or beside it.
template <int kPair, int kRows, int kCols>
void multiply_pieces(const char* left, const char* right, int64_t next) {
  constexpr PiecePair pair = kPairs[kPair];
  if constexpr (pair.loads_left) {
    _tile_loadd(4, left + pair.left * kTileBytes, kRowBytes);
    if constexpr (kRows > 1) _tile_loadd(5, left + next + pair.left * kTileBytes, kRowBytes);
  }
  if constexpr (pair.loads_right) {
    _tile_loadd(6, right + pair.right * kTileBytes, kRowBytes);
    if constexpr (kCols > 1) _tile_loadd(7, right + next + pair.right * kTileBytes, kRowBytes);
  }
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kCols > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kRows > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kRows > 1 && kCols > 1) _tile_dpbf16ps(3, 5, 7);
}

using MultiplyPieces = void (*)(const char* left, const char* right, int64_t next);

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

void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

/// Adds a tile to memory, as far as it reaches; what is not finite leaves NaN in `check`.
void add_tile(const float (*tile)[kTile], int64_t rows, int64_t cols, float* sums, int64_t stride,
              FloatVector& check) {
  const __mmask16 lanes = first_lanes(cols);
  for (int64_t i = 0; i < kTile && i < rows; ++i) {
    float* target = sums + i * stride;
    const FloatVector sum = load_lanes(lanes, target) + load_lanes(lanes, tile[i]);
    _mm512_mask_storeu_ps(target, lanes, (__m512)sum);
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
    const int64_t rows = product.rows - row, cols = product.cols - col;
    if (rows <= 0 || cols <= 0) continue;
    if (product.is_transposed) {
      transpose_square(tiles[i][0], kTile, turned[0], kTile);
      add_tile(turned, cols, rows, product.sums + col * product.stride + row, product.stride,
               check);
    } else {
      add_tile(tiles[i], rows, cols, product.sums + row * product.stride + col, product.stride,
               check);
    }
  }
  product.finite = product.finite && horizontal_sum(check) == 0.0f;
}

/// Asks for the memory of the next tiles of sums, which lies a page apart from row to row.
void prefetch_sums(const MatrixUnit::Product& product) {
  const bool turned = product.is_transposed;
  const int64_t first = turned ? product.col : product.row,
                size = turned ? product.cols : product.rows;
  const int64_t along = turned ? product.row : product.col;
  for (int64_t i = first; i < size && i < first + 2 * kTile; ++i) {
    __builtin_prefetch(product.sums + i * product.stride + along, 1);
    __builtin_prefetch(product.sums + i * product.stride + along + kTile, 1);
  }
}

void start(MatrixUnit::Product& product) {
  const auto pairs_of_tiles = [](int64_t size) { return (size + 2 * kTile - 1) / (2 * kTile); };
  product.steps_left = pairs_of_tiles(product.rows) * pairs_of_tiles(product.cols) *
                       steps_of(product.depth) * kNumPairs;
  zero_sums();
}

void advance(MatrixUnit::Product& product, int64_t steps) {
  const int64_t next = steps_of(product.depth) * kPieces * kTileBytes;
  if (steps > product.steps_left) steps = product.steps_left;
  product.steps_left -= steps;
  while (steps-- > 0) {
    const int64_t offset = product.k / kStep * kPieces * kTileBytes;
    const char* left = static_cast<const char*>(product.left) + product.row / kTile * next + offset;
    const char* right =
        static_cast<const char*>(product.right) + product.col / kTile * next + offset;
    const bool two_down = product.rows - product.row > kTile;
    const bool two_across = product.cols - product.col > kTile;
    kMultiplyPieces[product.pair][two_down][two_across](left, right, next);
    if (product.pair == 0 && product.k == 0) prefetch_sums(product);
    if (++product.pair < kNumPairs) continue;
    product.pair = 0;
    product.k += kStep;
    if (product.k < product.depth) continue;
    add_sums(product);
    zero_sums();
    product.k = 0;
    product.row += 2 * kTile;
    if (product.row < product.rows) continue;
    product.row = 0;
    product.col += 2 * kTile;
  }
}

}  // namespace

HFH_NAMESPACE_END

namespace hfh::cpu {

const MatrixUnit& amx() {
  static constexpr MatrixUnit unit{
      pack_inner_contiguous, pack_outer_contiguous, prepare, release, start, advance,
  };
  return unit;
}

}  // namespace hfh::cpu
