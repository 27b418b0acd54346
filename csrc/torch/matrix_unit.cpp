#include "torch/matrix_unit.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "torch/parallel.h"

namespace hfh::torch_ops {

namespace {

using cpu::kernels;
using cpu::LinearBatch;
using cpu::MatrixUnit;
using Side = MatrixUnit::Side;

// Fewer inputs leave most of the unit idle. Measured: at 32 both ways take the same time.
constexpr int64_t kMinBatch = 33;
// Smaller bfloat16 batches do not make up for the panels' way through memory.
constexpr int64_t kMinPlatformBatch = 65;
// The packed batch, which all threads read and which stays in a second-level cache beside a panel.
constexpr int64_t kBatchAtOnce = MatrixUnitGradient::kMaxBatch;
constexpr size_t kPackedBatchBytes = 3 << 19;
// A panel of the weight, of a thread's own.
constexpr int64_t kPanelRows = 32, kPanelCols = 512;
// Of the gradient to the input: the inner dimension runs over the weight's rows.
constexpr int64_t kGradPanelRows = 128, kGradPanelCols = 512;
// Not a power of two, which would map all rows to the same few cache lines.
constexpr int64_t kPadding = 16;

/// Consecutive slices of the inner dimension, packed at once.
struct Slices {
  int64_t depth, inner_size;  // of a slice but the last; of all
  size_t bytes;

  int64_t count() const { return (inner_size + depth - 1) / depth; }
  int64_t at_once() const {
    return std::max<int64_t>(1, static_cast<int64_t>(kPackedBatchBytes / bytes));
  }
  int64_t begin(int64_t slice) const { return slice * depth; }
  int64_t size(int64_t slice) const { return std::min(depth, inner_size - begin(slice)); }
};

/// Packs slices [first, last) of a batch, rows of `source`, one after another.
void pack_batch(Side side, const float* source, int64_t stride, int64_t batch, const Slices& slices,
                int64_t first, int64_t last, char* packed) {
  const int64_t tiles = (batch + MatrixUnit::kTile - 1) / MatrixUnit::kTile;
  at::parallel_for(0, (last - first) * tiles, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slice = first + i / tiles, row = i % tiles * MatrixUnit::kTile;
      const int64_t size = slices.size(slice);
      kernels().matrix_unit->pack_inner_contiguous(
          side, source + row * stride + slices.begin(slice), stride,
          std::min(MatrixUnit::kTile, batch - row), size,
          packed + (slice - first) * slices.bytes + MatrixUnit::packed_bytes(row, size), {});
    }
  });
}

/// Products of one thread, each in progress while the thread prepares the panel of the next.
class Pipeline {
 public:
  explicit Pipeline(size_t panel_bytes, int64_t num_floats) : panel_bytes_(panel_bytes) {
    auto* memory = static_cast<char*>(
        Scratch<Purpose::kPanels>::get(2 * panel_bytes + num_floats * sizeof(float)));
    panels_ = memory;
    floats_ = reinterpret_cast<float*>(memory + 2 * panel_bytes);
    kernels().matrix_unit->prepare();
  }
  ~Pipeline() { kernels().matrix_unit->release(); }

  /// Room for a part of a panel as the kernels write it.
  float* floats() { return floats_; }
  /// Where the next panel is to be packed.
  char* panel() { return panels_ + next_ * panel_bytes_; }

  /// What is to be called while the next panel is prepared: about `calls` times.
  cpu::Meanwhile expect(int64_t calls) {
    calls_left_ = std::max<int64_t>(1, calls);
    return {[](void* self) { static_cast<Pipeline*>(self)->step(); }, this};
  }

  /// Finishes the product in progress and starts the next panel's.
  void start(const MatrixUnit::Product& product) {
    finish();
    product_ = product;
    kernels().matrix_unit->start(product_);
    next_ = 1 - next_;
  }

  /// Returns whether all sums so far are finite.
  bool finish() {
    kernels().matrix_unit->advance(product_, product_.steps_left);
    finite_ = finite_ && product_.finite;
    return finite_;
  }

 private:
  void step() {
    if (product_.steps_left == 0) return;
    const int64_t steps = (product_.steps_left + calls_left_ - 1) / calls_left_;
    calls_left_ = std::max<int64_t>(1, calls_left_ - 1);
    kernels().matrix_unit->advance(product_, steps);
  }

  size_t panel_bytes_;
  char* panels_;
  float* floats_;
  int next_ = 0;
  MatrixUnit::Product product_{};
  int64_t calls_left_ = 1;
  bool finite_ = true;
};

/// Calls that reconstructing and packing a panel makes to `Meanwhile`.
int64_t calls_of_panel(const VirtualWeight& weight, int64_t rows, int64_t cols) {
  const int64_t vectors = std::max<int64_t>(weight.hash.block(), kernels().lanes);
  return rows * ceil_divide(cols, vectors) +
         ceil_divide(rows, MatrixUnit::kTile) * ceil_divide(cols, MatrixUnit::kStep);
}

char* packed_batch(size_t bytes) {
  return static_cast<char*>(Scratch<Purpose::kPackedBatch>::get(bytes));
}

}  // namespace

bool prefers_matrix_unit(int64_t batch) {
  return batch >= kMinBatch && kernels().matrix_unit != nullptr;
}

bool prefers_platform_bfloat16(int64_t batch) {
  return batch >= kMinPlatformBatch && kernels().matrix_unit != nullptr;
}

bool matrix_unit_forward(const VirtualWeight& weight, const LinearBatch& args) {
  if (!prefers_matrix_unit(args.batch)) return false;
  const MatrixUnit& unit = *kernels().matrix_unit;
  constexpr int64_t kStride = kPanelCols + kPadding;
  std::atomic<bool> finite = true;
  for (int64_t m = 0; m < args.batch; m += kBatchAtOnce) {
    const int64_t batch = std::min(kBatchAtOnce, args.batch - m);
    const float* input = args.input + m * args.in_features;
    float* output = args.output + m * args.out_features;
    const Slices slices{kPanelCols, args.in_features, MatrixUnit::packed_bytes(batch, kPanelCols)};
    const int64_t at_once = std::min(slices.at_once(), slices.count());
    char* packed = packed_batch(at_once * slices.bytes);
    for (int64_t first = 0; first < slices.count(); first += at_once) {
      const int64_t last = std::min(slices.count(), first + at_once);
      pack_batch(Side::kRight, input, args.in_features, batch, slices, first, last, packed);
      at::parallel_for(
          0, ceil_divide(args.out_features, kPanelRows), 1, [&](int64_t begin, int64_t end) {
            Pipeline pipeline(MatrixUnit::packed_bytes(kPanelRows, kPanelCols),
                              MatrixUnit::kTile * kStride);
            for (int64_t slice = first; slice < last; ++slice) {
              for (int64_t row = begin * kPanelRows; row < end * kPanelRows; row += kPanelRows) {
                const int64_t rows = std::min(kPanelRows, args.out_features - row);
                if (slice == 0) set_bias(args, m, batch, row, row + rows);
                const int64_t cols = slices.size(slice);
                const cpu::Meanwhile meanwhile =
                    pipeline.expect(calls_of_panel(weight, rows, cols));
                for (int64_t r = 0; r < rows; r += MatrixUnit::kTile) {
                  const int64_t tile_rows = std::min(MatrixUnit::kTile, rows - r);
                  kernels().reconstruct(weight, {row + r, tile_rows, slices.begin(slice), cols},
                                        pipeline.floats(), kStride, meanwhile);
                  unit.pack_inner_contiguous(
                      Side::kLeft, pipeline.floats(), kStride, tile_rows, cols,
                      pipeline.panel() + MatrixUnit::packed_bytes(r, cols), meanwhile);
                }
                pipeline.start({pipeline.panel(), packed + (slice - first) * slices.bytes, rows,
                                batch, cols, output + row, args.out_features, true});
              }
            }
            if (!pipeline.finish()) finite = false;
          });
    }
  }
  return finite;
}

bool matrix_unit_backward_input(const VirtualWeight& weight, const LinearBatch& args) {
  if (!prefers_matrix_unit(args.batch)) return false;
  const MatrixUnit& unit = *kernels().matrix_unit;
  constexpr int64_t kStride = kGradPanelCols + kPadding;
  std::atomic<bool> finite = true;
  for (int64_t m = 0; m < args.batch; m += kBatchAtOnce) {
    const int64_t batch = std::min(kBatchAtOnce, args.batch - m);
    const float* grad_output = args.input + m * args.in_features;
    float* grad_input = args.output + m * args.out_features;
    const Slices slices{kGradPanelRows, args.in_features,
                        MatrixUnit::packed_bytes(batch, kGradPanelRows)};
    const int64_t at_once = std::min(slices.at_once(), slices.count());
    char* packed = packed_batch(at_once * slices.bytes);
    for (int64_t first = 0; first < slices.count(); first += at_once) {
      const int64_t last = std::min(slices.count(), first + at_once);
      pack_batch(Side::kLeft, grad_output, args.in_features, batch, slices, first, last, packed);
      at::parallel_for(
          0, ceil_divide(args.out_features, kGradPanelCols), 1, [&](int64_t begin, int64_t end) {
            Pipeline pipeline(MatrixUnit::packed_bytes(kGradPanelCols, kGradPanelRows),
                              kGradPanelRows * kStride);
            for (int64_t col = begin * kGradPanelCols; col < end * kGradPanelCols;
                 col += kGradPanelCols) {
              const int64_t cols = std::min(kGradPanelCols, args.out_features - col);
              for (int64_t i = 0; first == 0 && i < batch; ++i) {
                std::fill_n(grad_input + i * args.out_features + col, cols, 0.0f);
              }
              for (int64_t slice = first; slice < last; ++slice) {
                const int64_t rows = slices.size(slice);
                const cpu::Meanwhile meanwhile =
                    pipeline.expect(calls_of_panel(weight, rows, cols));
                kernels().reconstruct(weight, {slices.begin(slice), rows, col, cols},
                                      pipeline.floats(), kStride, meanwhile);
                unit.pack_outer_contiguous(Side::kRight, pipeline.floats(), kStride, cols, rows,
                                           pipeline.panel(), meanwhile);
                pipeline.start({packed + (slice - first) * slices.bytes, pipeline.panel(), batch,
                                cols, rows, grad_input + col, args.out_features, false});
              }
            }
            if (!pipeline.finish()) finite = false;
          });
    }
  }
  return finite;
}

MatrixUnitGradient::MatrixUnitGradient(const float* grad_output, int64_t out_features,
                                       const float* input, int64_t in_features, int64_t batch)
    : grad_output_(grad_output),
      input_(input),
      out_features_(out_features),
      in_features_(in_features),
      batch_(batch) {}

void MatrixUnitGradient::select_columns(int64_t col, int64_t cols) {
  cols_ = cols;
  packed_input_ = packed_batch(MatrixUnit::packed_bytes(cols, batch_));
  at::parallel_for(0, ceil_divide(cols, MatrixUnit::kTile), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * MatrixUnit::kTile;
    kernels().matrix_unit->pack_outer_contiguous(
        Side::kRight, input_ + col + first, in_features_,
        std::min(end * MatrixUnit::kTile, cols) - first, batch_,
        packed_input_ + MatrixUnit::packed_bytes(first, batch_), {});
  });
}

bool MatrixUnitGradient::multiply(int64_t row, int64_t rows, float* out, int64_t stride) const {
  const MatrixUnit& unit = *kernels().matrix_unit;
  void* packed = Scratch<Purpose::kPanels>::get(MatrixUnit::packed_bytes(rows, batch_));
  unit.pack_outer_contiguous(Side::kLeft, grad_output_ + row, out_features_, rows, batch_, packed,
                             {});
  for (int64_t i = 0; i < rows; ++i) std::fill_n(out + i * stride, cols_, 0.0f);
  MatrixUnit::Product product{packed, packed_input_, rows, cols_, batch_, out, stride, false};
  unit.prepare();
  unit.start(product);
  unit.advance(product, product.steps_left);
  unit.release();
  return product.finite;
}

}  // namespace hfh::torch_ops
