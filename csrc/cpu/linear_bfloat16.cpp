#include "cpu/declarations.h"
#include "cpu/multiply.h"

// The product of bfloat16 inputs. A panel of weights meets all inputs before the next is made; sums
// are float32, and rounded once. Where the processor multiplies pairs of bfloat16, weights are
// rounded to it and pairs are of neighbouring columns; elsewhere all is multiplied in float32.

HFH_NAMESPACE_BEGIN

namespace {

using Elements = BFloat16Elements;
using Element = Elements::Element;
constexpr int64_t kElementCols = Elements::kColumns;

/// The elements of a vector's worth of columns.
FloatVector elements_of(const float* row) {
  const FloatVector first = load<FloatVector>(row);
#if defined(__AVX512BF16__)
  const FloatVector second = load<FloatVector>(row + kFloatLanes);
  return (FloatVector)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  return first;
#endif
}

// Columns that a panel spans, and those that are made at once: 16 rows of them stay in a
// first-level cache.
constexpr int64_t kDepth = 512;
constexpr int64_t kColsAtOnce = 256;
constexpr int64_t kPanelRows = 128;
// Not a power of two, which would map all rows of a tile to the same few cache lines.
constexpr int64_t kInputStride = kDepth / kElementCols + 16;
constexpr int64_t kBatchAtOnce = 64 * kTileRows;

struct Panels {
  float* rows;     // [kFloatLanes, kColsAtOnce]
  Element* input;  // [kTileRows, kInputStride]
  Element* panel;  // [kDepth / kElementCols, kPanelRows]
  float* sums;     // [kBatchAtOnce, kPanelRows]

  explicit Panels(void* memory)
      : rows(static_cast<float*>(memory)),
        input(reinterpret_cast<Element*>(rows + kFloatLanes * kColsAtOnce)),
        panel(input + kTileRows * kInputStride),
        sums(reinterpret_cast<float*>(panel + kDepth / kElementCols * kPanelRows)) {}
  static constexpr size_t kBytes =
      (kFloatLanes * kColsAtOnce + kBatchAtOnce * kPanelRows) * sizeof(float) +
      (kTileRows * kInputStride + kDepth / kElementCols * kPanelRows) * sizeof(Element);
};

/// panel[e][r]: element e of row r of the tile. What lies past the tile's rows is undefined, what
/// lies past its columns in a last element zero.
void reconstruct_elements(const VirtualWeight& weight, const cpu::TileBounds& tile,
                          const Panels& scratch) {
  for (int64_t r = 0; r < tile.rows; r += kFloatLanes) {
    const int64_t rows = tile.rows - r < kFloatLanes ? tile.rows - r : kFloatLanes;
    for (int64_t col = 0; col < tile.cols; col += kColsAtOnce) {
      const int64_t cols = tile.cols - col < kColsAtOnce ? tile.cols - col : kColsAtOnce;
      reconstruct_kernel(weight, {tile.row + r, rows, tile.col + col, cols}, scratch.rows,
                         kColsAtOnce);
      if (cols % kElementCols != 0) {
        for (int64_t i = 0; i < kFloatLanes; ++i) scratch.rows[i * kColsAtOnce + cols] = 0.0f;
      }
      for (int64_t k = 0; k < cols; k += kFloatLanes * kElementCols) {
        FloatVector square[kFloatLanes];
        for (int i = 0; i < kFloatLanes; ++i) {
          square[i] = elements_of(scratch.rows + i * kColsAtOnce + k);
        }
        transpose_vectors(square);
        Element* target = scratch.panel + (col + k) / kElementCols * kPanelRows + r;
        for (int i = 0; i < kFloatLanes; ++i) store(target + i * kPanelRows, square[i]);
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

}  // namespace

size_t linear_bfloat16_scratch_kernel() { return Panels::kBytes; }

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
        reconstruct_elements(weight, {row, rows, col, cols}, scratch);
        for (int64_t m = 0; m < count; m += kTileRows) {
          const int64_t tile_rows = count - m < kTileRows ? count - m : kTileRows;
          for (int64_t i = 0; i < tile_rows; ++i) {
            copy_elements(input + (m + i) * args.in_features + col, cols,
                          scratch.input + i * kInputStride);
          }
          multiply_add<kInputStride, Elements>(
              tile_rows, rows, (cols + kElementCols - 1) / kElementCols, scratch.input,
              scratch.panel, kPanelRows, scratch.sums + m * kPanelRows, kPanelRows);
        }
      }
      for (int64_t m = 0; m < count; ++m) {
        round_to_bfloat16_kernel(scratch.sums + m * kPanelRows,
                                 args.output + (first + m) * args.out_features + row, rows);
      }
    }
  }
}

HFH_NAMESPACE_END
