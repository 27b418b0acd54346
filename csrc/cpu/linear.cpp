#include "cpu/declarations.h"
#include "cpu/forward.h"
#include "cpu/specialize.h"

HFH_NAMESPACE_BEGIN

namespace {

// Weights are made for a few rows and a stretch of columns at a time, so that both the weights
// (16 KiB) and the inputs that meet them stay in the first-level cache.
constexpr int kRows = 8;
constexpr int kColumns = 512;
// Of the register tile: kTileBatch * kTileRows sums and kTileRows weights in flight.
constexpr int kTileBatch = 4;
constexpr int kTileRows = 4;

void write_output(const cpu::SmallBatch& args, int64_t batch, int64_t row, float value) {
  if (args.bias != nullptr) value += args.bias[row];
  const int64_t i = batch * args.out_features + row;
  if (args.output_dtype == DType::kBFloat16) {
    static_cast<BFloat16*>(args.output)[i] = round_to_bfloat16(value);
  } else {
    static_cast<float*>(args.output)[i] = value;
  }
}

void single_input(const VirtualWeight& weight, const cpu::SmallBatch& args, int64_t row_begin,
                  int64_t row_end) {
  constexpr int64_t kRowsAtOnce = 64;
  specialize(weight, [&]<class W>(W) {
    if constexpr (W::kLanes == 1) return;  // float64 never comes here
    else {
      for (int64_t row = row_begin; row < row_end; row += kRowsAtOnce) {
        const int64_t rows = row_end - row < kRowsAtOnce ? row_end - row : kRowsAtOnce;
        float sums[kRowsAtOnce];
        DotSink<W> sink{args.input, sums, args.in_features};
        reconstruct_tile<W>(weight, {row, rows, 0, args.in_features}, sink);
        for (int64_t r = 0; r < rows; ++r) write_output(args, 0, row + r, sums[r]);
      }
    }
  });
}

/// sums[m][r] += sum over the stretch of input[m] * weights[r], lane by lane.
template <int kBatch>
HFH_HOST_DEVICE void multiply(const float* input, int64_t input_stride, const float* weights,
                              int64_t cols, FloatVector* sums) {
  FloatVector sum[kBatch][kTileRows];
  for (int m = 0; m < kBatch; ++m) {
    for (int r = 0; r < kTileRows; ++r) sum[m][r] = load<FloatVector>(&sums[m * kRows + r]);
  }
  const auto step = [&](auto load_vector, int64_t col) {
    FloatVector w[kTileRows];
    for (int r = 0; r < kTileRows; ++r) w[r] = load_vector(weights + r * kColumns + col);
    for (int m = 0; m < kBatch; ++m) {
      const FloatVector x = load_vector(input + m * input_stride + col);
      for (int r = 0; r < kTileRows; ++r) sum[m][r] += x * w[r];
    }
  };
  int64_t col = 0;
  for (; col + kFloatLanes <= cols; col += kFloatLanes) {
    step([](const float* source) { return load<FloatVector>(source); }, col);
  }
  if (col < cols) {
    const int left = static_cast<int>(cols - col);
    step([left](const float* source) { return load_partial<FloatVector>(source, left); }, col);
  }
  for (int m = 0; m < kBatch; ++m) {
    for (int r = 0; r < kTileRows; ++r) store(&sums[m * kRows + r], sum[m][r]);
  }
}

}  // namespace

size_t small_batch_scratch_kernel(int64_t batch) {
  return kRows * kColumns + static_cast<size_t>(batch) * kRows * kFloatLanes;
}

void linear_small_kernel(const VirtualWeight& weight, const cpu::SmallBatch& args,
                         int64_t row_begin, int64_t row_end, float* scratch) {
  if (args.batch == 1) return single_input(weight, args, row_begin, row_end);
  float* weights = scratch;
  auto* sums = reinterpret_cast<FloatVector*>(scratch + kRows * kColumns);
  for (int64_t row = row_begin; row < row_end; row += kRows) {
    const int64_t rows = row_end - row < kRows ? row_end - row : kRows;
    for (int64_t i = 0; i < args.batch * kRows; ++i) store(&sums[i], FloatVector{});
    for (int64_t col = 0; col < args.in_features; col += kColumns) {
      const int64_t left = args.in_features - col;
      const int64_t cols = left < kColumns ? left : kColumns;
      reconstruct_kernel(weight, {row, rows, col, cols}, weights, kColumns);
      for (int64_t m = 0; m < args.batch; m += kTileBatch) {
        const float* input = args.input + m * args.in_features + col;
        for (int r = 0; r < rows; r += kTileRows) {
          FloatVector* tile_sums = sums + m * kRows + r;
          const float* tile_weights = weights + r * kColumns;
          switch (args.batch - m) {
            case 1: multiply<1>(input, args.in_features, tile_weights, cols, tile_sums); break;
            case 2: multiply<2>(input, args.in_features, tile_weights, cols, tile_sums); break;
            case 3: multiply<3>(input, args.in_features, tile_weights, cols, tile_sums); break;
            default: multiply<4>(input, args.in_features, tile_weights, cols, tile_sums);
          }
        }
      }
    }
    for (int64_t m = 0; m < args.batch; ++m) {
      for (int64_t r = 0; r < rows; ++r) {
        const FloatVector sum = load<FloatVector>(&sums[m * kRows + r]);
        write_output(args, m, row + r, horizontal_sum(sum));
      }
    }
  }
}

HFH_NAMESPACE_END
