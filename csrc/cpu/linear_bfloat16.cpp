#include "cpu/declarations.h"
#include "cpu/multiply.h"

// Products of bfloat16 in float32 sums, rounded once. Where the processor multiplies pairs of
// bfloat16, weights are rounded to it and pairs are neighbours along the inner dimension; elsewhere
// all is multiplied in float32.

HFH_NAMESPACE_BEGIN

namespace {

using Elements = BFloat16Elements;
using Element = Elements::Element;
constexpr int64_t kElementCols = Elements::kColumns;

/// A vector of the elements of neighbours in a row.
FloatVector elements_along(const float* row) {
  const FloatVector first = load<FloatVector>(row);
#if defined(__AVX512BF16__)
  const FloatVector second = load<FloatVector>(row + kFloatLanes);
  return (FloatVector)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  return first;
#endif
}

/// A vector of the elements of as many columns, each of a weight and the one below.
FloatVector elements_down(const float* row, int64_t stride) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kByTurns[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto first = (__m512)load<FloatVector>(row);
  const auto second = (__m512)load<FloatVector>(row + stride);
  return (FloatVector)_mm512_permutexvar_epi16(_mm512_load_si512(kByTurns),
                                               (__m512i)_mm512_cvtne2ps_pbh(second, first));
#else
  (void)stride;
  return load<FloatVector>(row);
#endif
}

/// The same of rows of bfloat16; without a `second` it counts as zeros.
FloatVector elements_down(const BFloat16* first, const BFloat16* second) {
  const FloatVector x = load_as<FloatVector>(first);
#if defined(__AVX512BF16__)
  const FloatVector y = second != nullptr ? load_as<FloatVector>(second) : FloatVector{};
  return (FloatVector)((UintVector)y | (UintVector)x >> 16);
#else
  (void)second;
  return x;
#endif
}

constexpr int64_t elements_in(int64_t size) { return (size + kElementCols - 1) / kElementCols; }

// The inner dimension's stretch that a panel spans, and the panel's other side, which lies side by
// side in memory.
constexpr int64_t kDepth = 512, kPanelRows = 128;
// Of the gradient to the input: the inner dimension runs over the weight's rows.
constexpr int64_t kGradDepth = 256, kGradCols = 256;
// Not a power of two, which would map all rows of a tile to the same few cache lines.
constexpr int64_t kInputStride = kDepth / kElementCols + 16;
constexpr int64_t kBatchAtOnce = 64 * kTileRows;

struct Panels {
  float* rows;     // [kFloatLanes, kDepth], or [kFloatLanes, kGradCols]
  Element* input;  // [kTileRows, kInputStride]
  Element* panel;  // [elements, kPanelRows], or [elements, kGradCols]
  float* sums;     // [kBatchAtOnce, kPanelRows], or [kBatchAtOnce, kGradCols]

  explicit Panels(void* memory)
      : rows(static_cast<float*>(memory)),
        input(reinterpret_cast<Element*>(rows + kRows)),
        panel(input + kInput),
        sums(reinterpret_cast<float*>(panel + kPanel)) {}

  static constexpr int64_t kRows = kFloatLanes * kDepth, kInput = kTileRows * kInputStride;
  static constexpr int64_t kPanel = kDepth / kElementCols * kPanelRows;
  static constexpr int64_t kSums = kBatchAtOnce * kGradCols;
  static constexpr size_t kBytes =
      (kRows + kSums) * sizeof(float) + (kInput + kPanel) * sizeof(Element);
};
static_assert(kFloatLanes * kGradCols <= Panels::kRows && kPanelRows <= kGradCols);
static_assert(kGradDepth <= kDepth && kGradDepth * kGradCols <= kDepth * kPanelRows);

/// panel[e][r]: element e of row r of the tile. What lies past the tile's rows is undefined, what
/// lies past its columns in a last element zero.
void reconstruct_transposed(const VirtualWeight& weight, const cpu::TileBounds& tile,
                            const Panels& scratch) {
  for (int64_t r = 0; r < tile.rows; r += kFloatLanes) {
    const int64_t rows = tile.rows - r < kFloatLanes ? tile.rows - r : kFloatLanes;
    reconstruct_kernel(weight, {tile.row + r, rows, tile.col, tile.cols}, scratch.rows, kDepth);
    if (tile.cols % kElementCols != 0) {
      for (int64_t i = 0; i < kFloatLanes; ++i) scratch.rows[i * kDepth + tile.cols] = 0.0f;
    }
    for (int64_t k = 0; k < tile.cols; k += kFloatLanes * kElementCols) {
      FloatVector square[kFloatLanes];
      for (int i = 0; i < kFloatLanes; ++i) {
        square[i] = elements_along(scratch.rows + i * kDepth + k);
      }
      transpose_vectors(square);
      Element* target = scratch.panel + k / kElementCols * kPanelRows + r;
      for (int i = 0; i < kFloatLanes; ++i) store(target + i * kPanelRows, square[i]);
    }
  }
}

/// panel[e][c]: element e of column c of the tile; the same holds.
void reconstruct_upright(const VirtualWeight& weight, const cpu::TileBounds& tile,
                         const Panels& scratch) {
  for (int64_t r = 0; r < tile.rows; r += kFloatLanes) {
    const int64_t rows = tile.rows - r < kFloatLanes ? tile.rows - r : kFloatLanes;
    reconstruct_kernel(weight, {tile.row + r, rows, tile.col, tile.cols}, scratch.rows, kGradCols);
    if (rows % kElementCols != 0) {
      for (int64_t c = 0; c < kGradCols; ++c) scratch.rows[rows * kGradCols + c] = 0.0f;
    }
    for (int64_t i = 0; i < rows; i += kElementCols) {
      Element* target = scratch.panel + (r + i) / kElementCols * kGradCols;
      for (int64_t c = 0; c < tile.cols; c += kFloatLanes) {
        store(target + c, elements_down(scratch.rows + i * kGradCols + c, kGradCols));
      }
    }
  }
}

/// The elements of one input; those past its end zero.
void copy_elements(const BFloat16* input, int64_t cols, Element* elements) {
#if defined(__AVX512BF16__)
  if (cols % 2 != 0) elements[cols / 2] = 0;
  std::memcpy(elements, input, cols * sizeof(BFloat16));
#else
  int64_t k = 0;
  for (; k + kFloatLanes <= cols; k += kFloatLanes) {
    store(elements + k, load_as<FloatVector>(input + k));
  }
  for (; k < cols; ++k) elements[k] = to_float(input[k]);
#endif
}

/// target[e][c]: element e of column c, along the rows of `source`.
void copy_elements_down(const BFloat16* source, int64_t source_stride, int64_t rows, int64_t cols,
                        Element* target, int64_t stride) {
  for (int64_t i = 0; i < rows; i += kElementCols, target += stride) {
    const BFloat16* first = source + i * source_stride;
    const BFloat16* second = i + 1 < rows ? first + source_stride : nullptr;
    int64_t c = 0;
    for (; c + kFloatLanes <= cols; c += kFloatLanes) {
      store(target + c, elements_down(first + c, second != nullptr ? second + c : nullptr));
    }
    if (c == cols) continue;
    BFloat16 ends[2][kFloatLanes] = {};
    std::memcpy(ends[0], first + c, (cols - c) * sizeof(BFloat16));
    if (second != nullptr) std::memcpy(ends[1], second + c, (cols - c) * sizeof(BFloat16));
    store(target + c, elements_down(ends[0], ends[1]));
  }
}

/// The operands of a tile of the weight's gradient, some of the batch at a time.
struct TileOperands {
  static constexpr int64_t kBatch = 256, kElements = kBatch / kElementCols;
  static constexpr int64_t kRows = cpu::GradientTile::kRows, kCols = cpu::GradientTile::kCols;
  static constexpr int64_t kStride = kElements + 16;
  Element* input;        // [kElements, kCols]
  Element* turned;       // [kElements, kRows]
  Element* grad_output;  // [kRows, kStride]

  explicit TileOperands(void* memory)
      : input(static_cast<Element*>(memory)),
        turned(input + kElements * kCols),
        grad_output(turned + kElements * kRows) {}
  static constexpr size_t kBytes =
      (kElements * (kCols + kRows) + kRows * kStride) * sizeof(Element);
};

/// sums += input[count, depth] panel, of inputs `input_stride` apart.
template <int64_t kStride>
void multiply_panel(const BFloat16* input, int64_t input_stride, int64_t count, int64_t depth,
                    int64_t cols, const Panels& scratch) {
  for (int64_t m = 0; m < count; m += kTileRows) {
    const int64_t rows = count - m < kTileRows ? count - m : kTileRows;
    for (int64_t i = 0; i < rows; ++i) {
      copy_elements(input + (m + i) * input_stride, depth, scratch.input + i * kInputStride);
    }
    multiply_add<kInputStride, Elements>(rows, cols, elements_in(depth), scratch.input,
                                         scratch.panel, kStride, scratch.sums + m * kStride,
                                         kStride);
  }
}

}  // namespace

size_t bfloat16_scratch_kernel() {
  return Panels::kBytes > TileOperands::kBytes ? Panels::kBytes : TileOperands::kBytes;
}

void linear_bfloat16_kernel(const VirtualWeight& weight, const cpu::BFloat16Batch& args,
                            int64_t row_begin, int64_t row_end, void* memory) {
  const Panels scratch(memory);
  for (int64_t first = 0; first < args.batch; first += kBatchAtOnce) {
    const int64_t count = args.batch - first < kBatchAtOnce ? args.batch - first : kBatchAtOnce;
    const BFloat16* input = args.input + first * args.in_features;
    for (int64_t row = row_begin; row < row_end; row += kPanelRows) {
      const int64_t rows = row_end - row < kPanelRows ? row_end - row : kPanelRows;
      for (int64_t m = 0; m < count; ++m) {
        float* sums = scratch.sums + m * kPanelRows;
        for (int64_t r = 0; r < rows; ++r) sums[r] = args.bias != nullptr ? args.bias[row + r] : 0;
      }
      for (int64_t col = 0; col < args.in_features; col += kDepth) {
        const int64_t cols = args.in_features - col < kDepth ? args.in_features - col : kDepth;
        reconstruct_transposed(weight, {row, rows, col, cols}, scratch);
        multiply_panel<kPanelRows>(input + col, args.in_features, count, cols, rows, scratch);
      }
      for (int64_t m = 0; m < count; ++m) {
        round_to_bfloat16_kernel(scratch.sums + m * kPanelRows,
                                 args.output + (first + m) * args.out_features + row, rows);
      }
    }
  }
}

void linear_backward_input_bfloat16_kernel(const VirtualWeight& weight,
                                           const cpu::BFloat16Batch& args, int64_t col_begin,
                                           int64_t col_end, void* memory) {
  const Panels scratch(memory);
  for (int64_t first = 0; first < args.batch; first += kBatchAtOnce) {
    const int64_t count = args.batch - first < kBatchAtOnce ? args.batch - first : kBatchAtOnce;
    const BFloat16* grad_output = args.input + first * args.in_features;
    for (int64_t col = col_begin; col < col_end; col += kGradCols) {
      const int64_t cols = col_end - col < kGradCols ? col_end - col : kGradCols;
      for (int64_t i = 0; i < count * kGradCols; ++i) scratch.sums[i] = 0.0f;
      for (int64_t row = 0; row < args.in_features; row += kGradDepth) {
        const int64_t rows =
            args.in_features - row < kGradDepth ? args.in_features - row : kGradDepth;
        reconstruct_upright(weight, {row, rows, col, cols}, scratch);
        multiply_panel<kGradCols>(grad_output + row, args.in_features, count, rows, cols, scratch);
      }
      for (int64_t m = 0; m < count; ++m) {
        round_to_bfloat16_kernel(scratch.sums + m * kGradCols,
                                 args.output + (first + m) * args.out_features + col, cols);
      }
    }
  }
}

void weight_gradient_bfloat16_kernel(const cpu::BFloat16Gradient& args, const cpu::TileBounds& tile,
                                     float* gradient, int64_t stride, void* memory) {
  const TileOperands scratch(memory);
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t c = 0; c < tile.cols; ++c) gradient[r * stride + c] = 0.0f;
  }
  for (int64_t first = 0; first < args.batch; first += TileOperands::kBatch) {
    const int64_t left = args.batch - first;
    const int64_t count = left < TileOperands::kBatch ? left : TileOperands::kBatch;
    const BFloat16* input = args.input + first * args.in_features + tile.col;
    const BFloat16* grad_output = args.grad_output + first * args.out_features + tile.row;
    copy_elements_down(input, args.in_features, count, tile.cols, scratch.input,
                       TileOperands::kCols);
    copy_elements_down(grad_output, args.out_features, count, tile.rows, scratch.turned,
                       TileOperands::kRows);
    for (int64_t r = 0; r < tile.rows; r += kFloatLanes) {
      for (int64_t e = 0; e < elements_in(count); e += kFloatLanes) {
        transpose_square(
            reinterpret_cast<float*>(scratch.turned + e * TileOperands::kRows + r),
            TileOperands::kRows,
            reinterpret_cast<float*>(scratch.grad_output + r * TileOperands::kStride + e),
            TileOperands::kStride);
      }
    }
    multiply_add<TileOperands::kStride, Elements>(tile.rows, tile.cols, elements_in(count),
                                                  scratch.grad_output, scratch.input,
                                                  TileOperands::kCols, gradient, stride);
  }
}

HFH_NAMESPACE_END
