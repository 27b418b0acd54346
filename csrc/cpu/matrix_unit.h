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

  /// A thread's tile registers must be prepared before its first product and released after its
  /// last.
  void (*prepare)();
  void (*release)();

  /// A product in progress: sums += left right, a step at a time, so that other work can run while
  /// the unit is busy. Sum (i, j) is at sums[i * stride + j], or at sums[j * stride + i] where
  /// `is_transposed`.
  struct Product {
    const void *left, *right;
    int64_t rows, cols, depth;
    float* sums;
    int64_t stride;
    bool is_transposed;
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
