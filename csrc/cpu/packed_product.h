#pragma once

#include <cstdint>

#include "hfh/config.h"

// Products of packed operands, which convolutions in float32 are cut into: a left operand of rows
// that lie a constant apart, and a right one of panels of kCols columns, side by side in the order
// in which the product reads them. The inner dimension is at most kDepth at a time.

namespace hfh::cpu {

struct PackedProduct {
  static constexpr int64_t kDepth = 576;
  /// Not a power of two, which would map all rows of a tile to the same few cache lines.
  static constexpr int64_t kLeftStride = kDepth + 16;
  static constexpr int64_t kCols = 32;
  /// Taps of the largest kernel: channels are packed kMinChannels or more at a time.
  static constexpr int64_t kMaxTaps = 36, kMinChannels = kDepth / kMaxTaps;

  static int64_t left_floats(int64_t rows) { return rows * kLeftStride; }
  static int64_t right_floats(int64_t depth, int64_t cols) {
    return (cols + kCols - 1) / kCols * kCols * depth;
  }
  /// Channels to pack at once, of a kernel of so many taps.
  static int64_t channels_at_once(int64_t taps) {
    return kDepth / taps / kMinChannels * kMinChannels;
  }

  // Scratch of the functions that pack: pixels that are turned round, or rows of a weight.
  static constexpr int64_t kPixelFloats = 1 << 17;
  static constexpr int64_t kWeightFloats = 16 * (kMaxTaps * kCols + 16);
};

/// A stretch of the inner dimension, in units of the product's.
struct DepthRange {
  int64_t begin, end;
};

/// Rows [row, row + rows) of a left operand that meet what is not zero in the same ranges.
struct RowGroup {
  int64_t row, rows;
  const DepthRange* ranges;
  int64_t num_ranges;
};

/// Rows [row, row + rows) of patches, and channels [channel, channel + channels), with all their
/// taps. In packed operands columns are in the order (tap, channel).
struct PatchPart {
  int64_t row, rows, channel, channels;
};

/// What leads from channels [channel, channel + channels) of a source of `taps` taps to columns
/// [col, col + cols) of a product: a part of a weight of (column, channel, tap) or, where
/// `is_transposed`, of (channel, column, tap) with the taps running backwards.
struct WeightPart {
  bool is_transposed;
  int64_t taps, channel, channels, col, cols;
};

}  // namespace hfh::cpu
