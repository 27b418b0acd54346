#pragma once

#include <algorithm>
#include <cstdint>

#include "hfh/config.h"

// Where the rows of a convolution's right operand come from, for every instruction set: no code
// here depends on one.

namespace hfh::cpu {

/// A dimension of an image and how the kernel moves along it. Steps are counted in elements.
struct Axis {
  int64_t size, step, kernel, stride, padding, dilation, positions;

  /// Where the kernel's first tap lies; negative in the padding.
  HFH_HOST_DEVICE int64_t first(int64_t position) const { return position * stride - padding; }
};

/// The taps [begin, end) of an axis that fall into the image, of a kernel whose first lies there.
struct TapRange {
  int64_t begin, end;

  HFH_HOST_DEVICE TapRange(const Axis& axis, int64_t first)
      : begin(first < 0 ? std::min(axis.kernel, (-first + axis.dilation - 1) / axis.dilation) : 0),
        end(first < axis.size
                ? std::min(axis.kernel, (axis.size - first + axis.dilation - 1) / axis.dilation)
                : 0) {}
  HFH_HOST_DEVICE bool contains(int64_t tap) const { return tap >= begin && tap < end; }
};

/// A matrix [images * positions, channels * taps] that need not exist in memory: row (n, y, x) is
/// what the kernel sees of image n at output position (y, x), zeros outside it; columns are
/// (channel, tap row, tap column). With one tap, one channel step and no padding it is an ordinary
/// matrix.
struct Patches {
  int64_t num_images, image_step, channels, channel_step;
  Axis height, width;

  HFH_HOST_DEVICE int64_t taps() const { return height.kernel * width.kernel; }
  HFH_HOST_DEVICE int64_t rows() const { return num_images * height.positions * width.positions; }
  HFH_HOST_DEVICE int64_t cols() const { return channels * taps(); }
};

/// Rows [row, row + rows) and columns [col, col + cols) of such a matrix, written out: row-major,
/// `stride` elements from row to row.
struct PatchBlock {
  int64_t row, rows, col, cols;
  void* data;
  int64_t stride;
};

}  // namespace hfh::cpu
