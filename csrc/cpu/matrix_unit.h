#pragma once

#include <cstddef>
#include <cstdint>

// Products of float32 matrices on a unit that multiplies bfloat16 ones (Intel's AMX). A float has
// 24 significant bits, a bfloat16 8: cut into three pieces, high, middle and low, it is held
// exactly. Of the nine products of pieces the six that reach into float's precision are added up in
// float32; what is left out is below 2^-21 of a product. Pieces of infinite numbers, and of numbers
// so small that their pieces are subnormal, do not add up: sums then come out as NaN, or lose what
// is below 2^-126.

namespace hfh::cpu {

/// Other work to be done during a kernel, in many small parts: on a unit of the processor that the
/// kernel leaves idle. `step` is null where there is none.
struct Meanwhile {
  void (*step)(void* state) = nullptr;
  void* state = nullptr;

  void operator()() const {
    if (step != nullptr) step(state);
  }
};

/// Images with zeros around, seen as one row of pixels: each image begins with `top` rows of zeros,
/// each row with `left` zeros, and all rows have `pitch` pixels, with zeros at the end.
struct PaddedImages {
  const float* data;
  int64_t num_images, channels, height, width;
  int64_t image_step, channel_step, row_step, pixel_step;  // channel_step or pixel_step is 1
  int64_t top, left, pitch;

  int64_t image_pixels() const { return (top + height) * pitch; }
  /// All, and zeros behind them: what a last image's taps reach, and more for whole tiles.
  int64_t pixels() const { return num_images * image_pixels() + top * pitch + left + 64; }
};

struct MatrixUnit {
  /// Sizes of a tile of sums, and of the stretch of the inner dimension that one instruction takes.
  static constexpr int64_t kTile = 16, kStep = 32;
  /// Bytes of an element of a packed operand: its three pieces.
  static constexpr int64_t kElementBytes = 6;

  /// Bytes of a packed operand of `extent` rows (of the left one) or columns (of the right one).
  static size_t packed_bytes(int64_t extent, int64_t depth) {
    const auto up = [](int64_t x, int64_t step) { return (x + step - 1) / step * step; };
    return static_cast<size_t>(up(extent, kTile) * up(depth, kStep) * kElementBytes);
  }

  enum class Side { kLeft, kRight };

  /// Packs an operand of extent x depth. It lies in memory with the inner dimension contiguous
  /// (source[i * stride + k]) or the outer (source[k * stride + i]). Extents past the first must
  /// start at multiples of kTile, at `packed_bytes(start, depth)`. `meanwhile` is called once for
  /// every kTile x kStep.
  void (*pack_inner_contiguous)(Side, const float* source, int64_t stride, int64_t extent,
                                int64_t depth, void* packed, Meanwhile meanwhile);
  void (*pack_outer_contiguous)(Side, const float* source, int64_t stride, int64_t extent,
                                int64_t depth, void* packed, Meanwhile meanwhile);

  // Convolutions are products of which an operand is padded images: a tap of the kernel moves all
  // its tiles by some pixels. `scratch` holds `padding_scratch` floats.

  static constexpr int64_t kMaxTaps = 64;

  /// Packs a right operand out of channels x taps x cols, with the inner dimension (step of
  /// channels, tap, channel). Channels or, where `is_transposed`, columns lie `taps` apart in
  /// memory and the others `stride`; columns are at most kTile, and memory goes on for as many.
  void (*pack_taps)(bool is_transposed, const float* source, int64_t stride, int64_t cols,
                    int64_t channels, int64_t taps, void* packed);
  /// target[j * stride + i] = source[i * cols + j]
  void (*transpose)(const float* source, int64_t rows, int64_t cols, float* target, int64_t stride);

  static int64_t padding_scratch(const PaddedImages& images) {
    return 3 * kTile * (images.image_pixels() + 2 * kStep);
  }
  /// Bytes of packed images of kStep channels, or of kTile: a row of kTile pairs for each pixel.
  static int64_t piece_bytes(const PaddedImages& images) { return images.pixels() * kTile * 4; }
  static int64_t packed_bytes(const PaddedImages& images) { return 3 * piece_bytes(images); }
  /// Channels [channel, channel + kStep): a left operand, with channels the inner dimension. A pair
  /// is of channels c and c + kTile.
  void (*pack_channel_pairs)(const PaddedImages&, int64_t channel, void* packed, float* scratch);
  /// Channels [channel, channel + kTile): a right operand, with pixels the inner dimension. A pair
  /// is of pixels p and p + kTile.
  void (*pack_pixel_pairs)(const PaddedImages&, int64_t channel, void* packed, float* scratch);
  /// A left operand of those channels of an image, with pixels the inner dimension.
  void (*pack_pixels)(const PaddedImages&, int64_t image, int64_t channel, void* packed,
                      float* scratch);

  /// A thread's tile registers must be prepared before its first product and released after its
  /// last.
  void (*prepare)();
  void (*release)();

  /// A tile of an operand: kTile rows of the left one or columns of the right one.
  struct Tile {
    int64_t bytes, sums;  // from the operand's start; from the sums' start, in elements
    uint16_t lanes;       // the rows or columns that are wanted; their sums lie side by side
  };
  /// An operand of padded images: its tiles, and the bytes that each step moves them all by.
  struct Images {
    Side side;
    const Tile* tiles;
    const int64_t* steps;
    int64_t piece_bytes;
  };

  /// A product in progress: sums += left right, a step at a time, so that other work can run while
  /// the unit is busy. Sum (i, j) is at sums[i * stride + j], or at sums[j * stride + i] where
  /// `is_transposed`.
  struct Product {
    const void *left, *right;
    int64_t rows, cols, depth;
    float* sums;
    int64_t stride;
    bool is_transposed;
    const Images* images = nullptr;   // where an operand is some
    bool finite = true;               // of the sums so far
    int64_t row = 0, col = 0, k = 0;  // where the next step is
    int pair = 0;                     // of pieces
    int64_t steps_left = 0;           // set by `start`
  };
  void (*start)(Product&);
  /// Takes at most that many steps.
  void (*advance)(Product&, int64_t steps);
};

}  // namespace hfh::cpu
