#pragma once

#include "cpu/lanes.h"

// The matrix product of the fused kernels: sums stay in registers while a stretch of weights passes
// by, each weight vector loaded once for all rows of a tile.

HFH_NAMESPACE_BEGIN

// A tile of kTileRows x kTileCols sums takes all registers but the few its factors need.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 12;
#else
inline constexpr int kTileRows = 6;
#endif
inline constexpr int kTileVectors = 2;
inline constexpr int kTileCols = kTileVectors * kFloatLanes;

/// What a lane multiplies, a stretch of the inner dimension: here one float.
struct FloatElements {
  using Element = float;
  using Vector = FloatVector;
  static constexpr int kColumns = 1;

  static HFH_HOST_DEVICE Vector broadcast(Element x) { return splat<Vector>(x); }
  static HFH_HOST_DEVICE void add_product(FloatVector& sum, Vector x, Vector y) { sum += x * y; }
};

#if defined(__AVX512BF16__)
/// Two of bfloat16, the first in the lower half.
struct BFloat16Elements {
  using Element = uint32_t;
  using Vector = UintVector;
  static constexpr int kColumns = 2;

  static HFH_HOST_DEVICE Vector broadcast(Element x) { return splat_uint<Vector>(x); }
  static HFH_HOST_DEVICE void add_product(FloatVector& sum, Vector x, Vector y) {
    sum = (FloatVector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
  }
};
#else
using BFloat16Elements = FloatElements;
#endif

/// sum[i][j] += sum_k a[i * a_stride + k] * b[k * b_stride + j] for i < kRows and j < kTileCols.
template <class Elements, int kRows, int64_t a_stride>
HFH_HOST_DEVICE void add_tile_products(const typename Elements::Element* a,
                                       const typename Elements::Element* b, int64_t b_stride,
                                       int64_t depth, FloatVector (&sum)[kRows][kTileVectors]) {
  using Vector = typename Elements::Vector;
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      column[v] = load<Vector>(b + k * b_stride + v * kFloatLanes);
    }
    for (int i = 0; i < kRows; ++i) {
      const Vector factor = Elements::broadcast(a[i * a_stride + k]);
      for (int v = 0; v < kTileVectors; ++v) Elements::add_product(sum[i][v], factor, column[v]);
    }
  }
}

/// c[i][j] += the same.
template <class Elements, int kRows, int64_t a_stride>
HFH_HOST_DEVICE void multiply_tile(const typename Elements::Element* a,
                                   const typename Elements::Element* b, int64_t b_stride,
                                   int64_t depth, float* c, int64_t c_stride) {
  FloatVector sum[kRows][kTileVectors] = {};
  add_tile_products<Elements, kRows, a_stride>(a, b, b_stride, depth, sum);
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kTileVectors; ++v) {
      float* target = c + i * c_stride + v * kFloatLanes;
      store(target, load<FloatVector>(target) + sum[i][v]);
    }
  }
}

/// The same for a number of rows known at run time, at most kTileRows.
template <class Elements, int64_t a_stride, int kRows = kTileRows>
HFH_HOST_DEVICE void multiply_ragged_tile(int64_t rows, const typename Elements::Element* a,
                                          const typename Elements::Element* b, int64_t b_stride,
                                          int64_t depth, float* c, int64_t c_stride) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      return multiply_tile<Elements, kRows, a_stride>(a, b, b_stride, depth, c, c_stride);
    }
    multiply_ragged_tile<Elements, a_stride, kRows - 1>(rows, a, b, b_stride, depth, c, c_stride);
  }
}

/// c[rows, cols] += a[rows, depth] b[depth, cols]. Rows of b are readable up to a multiple of
/// kTileCols; c is touched nowhere outside.
template <int64_t a_stride, class Elements = FloatElements>
void multiply_add(int64_t rows, int64_t cols, int64_t depth, const typename Elements::Element* a,
                  const typename Elements::Element* b, int64_t b_stride, float* c,
                  int64_t c_stride) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t tile_rows = rows - row < kTileRows ? rows - row : kTileRows;
    const auto* a_tile = a + row * a_stride;
    for (int64_t col = 0; col < cols; col += kTileCols) {
      float* c_tile = c + row * c_stride + col;
      if (cols - col >= kTileCols) {
        multiply_ragged_tile<Elements, a_stride>(tile_rows, a_tile, b + col, b_stride, depth,
                                                 c_tile, c_stride);
        continue;
      }
      float whole[kTileRows * kTileCols] = {};
      multiply_ragged_tile<Elements, a_stride>(tile_rows, a_tile, b + col, b_stride, depth, whole,
                                               kTileCols);
      for (int64_t i = 0; i < tile_rows; ++i) {
        for (int64_t j = 0; j < cols - col; ++j)
          c_tile[i * c_stride + j] += whole[i * kTileCols + j];
      }
    }
  }
}

/// The elements of a and b by turns: of their first halves, or of their second.
template <bool kSecondHalf>
HFH_HOST_DEVICE FloatVector interleave(FloatVector a, FloatVector b) {
  constexpr int n = kFloatLanes, h = kSecondHalf ? kFloatLanes / 2 : 0;
#if defined(__AVX512F__)
#define HFH_INTERLEAVED                                                                    \
  h, n + h, h + 1, n + h + 1, h + 2, n + h + 2, h + 3, n + h + 3, h + 4, n + h + 4, h + 5, \
      n + h + 5, h + 6, n + h + 6, h + 7, n + h + 7
#elif defined(__AVX2__)
#define HFH_INTERLEAVED h, n + h, h + 1, n + h + 1, h + 2, n + h + 2, h + 3, n + h + 3
#else
#define HFH_INTERLEAVED h, n + h, h + 1, n + h + 1
#endif
#if defined(__clang__)
  return __builtin_shufflevector(a, b, HFH_INTERLEAVED);
#else
  return __builtin_shuffle(a, b, UintVector{HFH_INTERLEAVED});
#endif
#undef HFH_INTERLEAVED
}

/// Element j of vector i becomes element i of vector j.
HFH_HOST_DEVICE void transpose_vectors(FloatVector (&rows)[kFloatLanes]) {
  // Interleaving the halves of the list log2(n) times transposes it.
  for (int step = 1; step < kFloatLanes; step *= 2) {
    FloatVector next[kFloatLanes];
    for (int i = 0; i < kFloatLanes / 2; ++i) {
      next[2 * i] = interleave<false>(rows[i], rows[i + kFloatLanes / 2]);
      next[2 * i + 1] = interleave<true>(rows[i], rows[i + kFloatLanes / 2]);
    }
    for (int i = 0; i < kFloatLanes; ++i) rows[i] = next[i];
  }
}

/// target[j * target_stride + i] = source[i * source_stride + j] for i, j < kFloatLanes.
HFH_HOST_DEVICE void transpose_square(const float* source, int64_t source_stride, float* target,
                                      int64_t target_stride) {
  FloatVector rows[kFloatLanes];
  for (int i = 0; i < kFloatLanes; ++i) rows[i] = load<FloatVector>(source + i * source_stride);
  transpose_vectors(rows);
  for (int j = 0; j < kFloatLanes; ++j) store(target + j * target_stride, rows[j]);
}

HFH_NAMESPACE_END
