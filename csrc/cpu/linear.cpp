#include "cpu/declarations.h"
#include "cpu/forward.h"
#include "cpu/multiply.h"
#include "cpu/specialize.h"

HFH_NAMESPACE_BEGIN

namespace {

void single_input(const VirtualWeight& weight, const cpu::LinearBatch& args, int64_t row_begin,
                  int64_t row_end) {
  specialize(weight, [&]<class W>(W) {
    if constexpr (W::kLanes > 1) {  // float64 never comes here
      DotSink<W> sink{args.input, args.output + row_begin, args.in_features};
      const Tile tile{row_begin, row_end - row_begin, 0, args.in_features};
      reconstruct_tile<W>(weight, rows_of(weight, tile), tile, sink);
    }
  });
  for (int64_t row = row_begin; args.bias != nullptr && row < row_end; ++row) {
    args.output[row] += args.bias[row];
  }
}

// What stays in the second-level cache: kDepth columns of the inputs, and panels of kPanelRows
// weight rows that meet them, transposed so that a vector holds neighbouring output features.
constexpr int64_t kDepth = 512;
constexpr int64_t kPanelRows = 128;
// Not a power of two, which would map all rows of a tile to the same few cache lines.
constexpr int64_t kInputStride = kDepth + 16;
constexpr int64_t kBatchAtOnce = 64 * kTileRows;
constexpr int64_t kInputFloats = kBatchAtOnce * kInputStride;

struct PanelScratch {
  float* input;  // [kBatchAtOnce, kInputStride]
  float* rows;   // [kFloatLanes, kDepth]
  float* panel;  // [kDepth, kPanelRows]

  explicit PanelScratch(float* memory)
      : input(memory), rows(input + kInputFloats), panel(rows + kFloatLanes * kDepth) {}
  static constexpr size_t kFloats = kInputFloats + kFloatLanes * kDepth + kDepth * kPanelRows;
};

/// panel[k][r] = V[tile.row + r][tile.col + k]; what lies past the tile is undefined.
void reconstruct_transposed(const VirtualWeight& weight, const Tile& tile,
                            const PanelScratch& scratch) {
  for (int64_t r = 0; r < tile.rows; r += kFloatLanes) {
    const int64_t count = tile.rows - r < kFloatLanes ? tile.rows - r : kFloatLanes;
    reconstruct_kernel(weight, {tile.row + r, count, tile.col, tile.cols}, scratch.rows, kDepth);
    for (int64_t k = 0; k < tile.cols; k += kFloatLanes) {
      transpose_square(scratch.rows + k, kDepth, scratch.panel + k * kPanelRows + r, kPanelRows);
    }
  }
}

void panel_rows(const VirtualWeight& weight, const cpu::LinearBatch& args, int64_t row_begin,
                int64_t row_end, float* memory) {
  const PanelScratch scratch(memory);
  // A large batch crowds the panel's lines out while it passes by: let it pass less often.
  const int64_t rows_at_once = args.batch <= 256 ? kPanelRows / 2 : kPanelRows;
  for (int64_t first = 0; first < args.batch; first += kBatchAtOnce) {
    const int64_t count = args.batch - first < kBatchAtOnce ? args.batch - first : kBatchAtOnce;
    const float* input = args.input + first * args.in_features;
    float* output = args.output + first * args.out_features;
    cpu::set_bias(args, first, count, row_begin, row_end);
    for (int64_t col = 0; col < args.in_features; col += kDepth) {
      const int64_t cols = args.in_features - col < kDepth ? args.in_features - col : kDepth;
      for (int64_t m = 0; m < count; ++m) {
        std::memcpy(scratch.input + m * kInputStride, input + m * args.in_features + col,
                    cols * sizeof(float));
      }
      for (int64_t row = row_begin; row < row_end; row += rows_at_once) {
        const int64_t rows = row_end - row < rows_at_once ? row_end - row : rows_at_once;
        reconstruct_transposed(weight, {row, rows, col, cols}, scratch);
        multiply_add<kInputStride>(count, rows, cols, scratch.input, scratch.panel, kPanelRows,
                                   output + row, args.out_features);
      }
    }
  }
}

// Of the gradient to the input: panels of the weight as it is, so that a vector holds neighbouring
// input features.
constexpr int64_t kGradRows = 64;
constexpr int64_t kGradCols = 512;
constexpr int64_t kGradStride = kGradRows + 16;
constexpr int64_t kGradBatch = kInputFloats / kGradStride;
static_assert(kInputFloats + kGradRows * kGradCols <= PanelScratch::kFloats);

}  // namespace

size_t linear_scratch_kernel() { return PanelScratch::kFloats; }

void linear_kernel(const VirtualWeight& weight, const cpu::LinearBatch& args, int64_t row_begin,
                   int64_t row_end, float* scratch) {
  if (args.batch == 1) return single_input(weight, args, row_begin, row_end);
  panel_rows(weight, args, row_begin, row_end, scratch);
}

void linear_backward_input_kernel(const VirtualWeight& weight, const cpu::LinearBatch& args,
                                  int64_t col_begin, int64_t col_end, float* scratch) {
  float* grad_output = scratch;
  float* panel = scratch + kInputFloats;
  for (int64_t first = 0; first < args.batch; first += kGradBatch) {
    const int64_t count = args.batch - first < kGradBatch ? args.batch - first : kGradBatch;
    const float* input = args.input + first * args.in_features;
    float* output = args.output + first * args.out_features;
    for (int64_t m = 0; m < count; ++m) {
      float* row = output + m * args.out_features;
      for (int64_t col = col_begin; col < col_end; ++col) row[col] = 0.0f;
    }
    for (int64_t col = col_begin; col < col_end; col += kGradCols) {
      const int64_t cols = col_end - col < kGradCols ? col_end - col : kGradCols;
      for (int64_t row = 0; row < args.in_features; row += kGradRows) {
        const int64_t rows =
            args.in_features - row < kGradRows ? args.in_features - row : kGradRows;
        for (int64_t m = 0; m < count; ++m) {
          std::memcpy(grad_output + m * kGradStride, input + m * args.in_features + row,
                      rows * sizeof(float));
        }
        reconstruct_kernel(weight, {row, rows, col, cols}, panel, kGradCols);
        multiply_add<kGradStride>(count, cols, rows, grad_output, panel, kGradCols, output + col,
                                  args.out_features);
      }
    }
  }
}

HFH_NAMESPACE_END
