#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/matrix_unit.h"
#include "cpu/multiply.h"

// The format of packed operands, for the files of the matrix unit's kernels.

HFH_NAMESPACE_BEGIN

constexpr int64_t kTile = cpu::MatrixUnit::kTile, kStep = cpu::MatrixUnit::kStep;
constexpr int kPieces = 3;
// A tile of a packed operand: 16 rows of 16 pairs of elements, a pair being elements k and k + 16
// of a step of the inner dimension.
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kRowBytes = 64;
static_assert(kFloatLanes == kTile && kStep == 2 * kTile);
static_assert(kPieces * kTileBytes == kTile * kStep * cpu::MatrixUnit::kElementBytes);

inline int64_t steps_of(int64_t depth) { return (depth + kStep - 1) / kStep; }

inline __mmask16 first_lanes(int64_t count) {
  return count >= kTile ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

/// Those elements of a vector in memory; zero elsewhere, where no memory is touched.
inline FloatVector load_lanes(__mmask16 lanes, const float* source) {
  return (FloatVector)_mm512_maskz_loadu_ps(lanes, source);
}

/// The pieces of 16 pairs; the upper half of a float is a bfloat16.
struct Pairs {
  UintVector piece[kPieces];
};

inline Pairs split(FloatVector first, FloatVector second) {
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

void pack_taps(bool is_transposed, const float* source, int64_t stride, int64_t cols,
               int64_t channels, int64_t taps, void* packed);
void transpose(const float* source, int64_t rows, int64_t cols, float* target, int64_t stride);
void pack_channel_pairs(const cpu::PaddedImages&, int64_t channel, void* packed, float* scratch);
void pack_pixel_pairs(const cpu::PaddedImages&, int64_t channel, void* packed, float* scratch);
void pack_pixels(const cpu::PaddedImages&, int64_t image, int64_t channel, void* packed,
                 float* scratch);

HFH_NAMESPACE_END
