#include "torch/panels.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "torch/gemm.h"

namespace hfh::torch_ops {

namespace {

using cpu::kernels;
using cpu::PoolContributions;
using cpu::TileBounds;

// Up to this batch each weight is multiplied as soon as it is made; above it, panels of weights go
// through the platform's GEMM. Crossover measured on an AVX-512 server CPU, 4096 x 4096.
constexpr int64_t kSmallBatchFloat = 48;
constexpr int64_t kSmallBatchBFloat16 = 4;

// A panel fills about half of a second-level cache.
constexpr int64_t kPanelBytes = 1 << 20;
constexpr int64_t kPanelRows = 128;
// Tiles of the weight's gradient, and the bound of what one lists for the pool.
constexpr int64_t kTileCols = 512;
constexpr int64_t kContributionBytes = 1 << 20;
// Weights that a thread should get to make before another is woken.
constexpr int64_t kGrainWeights = 1 << 14;

/// Scratch of the calling thread, kept from call to call: fresh pages would cost more than the
/// panels that fill them.
class Scratch {
 public:
  static void* get(size_t bytes) {
    static thread_local Scratch scratch;
    if (bytes > scratch.size_) {
      scratch.memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
      scratch.size_ = bytes;
    }
    return scratch.memory_.get();
  }

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

/// Calls `f(begin, end)` for every stretch [begin, end) of [0, size) of length `step`, in parallel.
template <class F>
void parallel_stretches(int64_t size, int64_t step, const F& f) {
  const int64_t count = (size + step - 1) / step;
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i * step, std::min(size, (i + 1) * step));
  });
}

/// Writes a tile of the virtual weight as `dtype`; float tiles pass through `float_rows`.
void write_tile(const CheckedWeight& weight, const TileBounds& tile, void* out, int64_t stride,
                at::ScalarType dtype, float* float_rows) {
  if (dtype != at::kBFloat16) return kernels().reconstruct(weight.get(), tile, out, stride);
  auto* rounded = static_cast<BFloat16*>(out);
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t col = 0; col < tile.cols; col += kTileCols) {
      const int64_t cols = std::min(kTileCols, tile.cols - col);
      kernels().reconstruct(weight.get(), {tile.row + row, 1, tile.col + col, cols}, float_rows,
                            cols);
      kernels().round_to_bfloat16(float_rows, rounded + row * stride + col, cols);
    }
  }
}

/// The calling thread's panel, and a tile's row of floats behind it.
struct PanelScratch {
  void* panel;
  float* float_rows;
};

PanelScratch panel_scratch() {
  auto* memory = static_cast<char*>(Scratch::get(kPanelBytes + kTileCols * sizeof(float)));
  return {memory, reinterpret_cast<float*>(memory + kPanelBytes)};
}

void small_forward(const CheckedWeight& weight, const at::Tensor& input, const at::Tensor& bias,
                   at::Tensor& out) {
  const at::Tensor input_float = input.to(at::kFloat).contiguous();
  const at::Tensor bias_float = bias.defined() ? bias.to(at::kFloat).contiguous() : bias;
  const cpu::SmallBatch batch{
      input_float.const_data_ptr<float>(),
      bias.defined() ? bias_float.const_data_ptr<float>() : nullptr,
      out.mutable_data_ptr(),
      out.scalar_type() == at::kBFloat16 ? DType::kBFloat16 : DType::kFloat32,
      input.size(0),
      weight.cols(),
      weight.rows()};
  const int64_t grain = std::max<int64_t>(8, kGrainWeights / weight.cols());
  at::parallel_for(0, weight.rows(), grain, [&](int64_t begin, int64_t end) {
    const size_t floats = kernels().small_batch_scratch(batch.batch);
    auto* scratch = batch.batch == 1 ? nullptr : Scratch::get(floats * sizeof(float));
    kernels().linear_small(weight.get(), batch, begin, end, static_cast<float*>(scratch));
  });
}

}  // namespace

void multiply_forward(const CheckedWeight& weight, const at::Tensor& input,
                      const at::Tensor& bias, at::Tensor& out) {
  const auto dtype = input.scalar_type();
  const int64_t batch = input.size(0);
  if ((dtype == at::kFloat && batch <= kSmallBatchFloat) ||
      (dtype == at::kBFloat16 && batch <= kSmallBatchBFloat16)) {
    return small_forward(weight, input, bias, out);
  }
  const int64_t element = static_cast<int64_t>(c10::elementSize(dtype));
  // bfloat16 sums must not be rounded between stretches of columns: those panels take whole rows.
  const int64_t cols_at_once =
      dtype == at::kBFloat16 ? std::min(weight.cols(), kPanelBytes / element / 16)
                             : std::min(weight.cols(), kPanelBytes / element / kPanelRows);
  const int64_t rows_at_once =
      std::min(kPanelRows, std::max<int64_t>(16, kPanelBytes / element / cols_at_once));
  const Matrix x = matrix_of(input), y = matrix_of(out);
  parallel_stretches(weight.rows(), rows_at_once, [&](int64_t row, int64_t row_end) {
    const PanelScratch scratch = panel_scratch();
    const int64_t rows = row_end - row;
    for (int64_t col = 0; col < weight.cols(); col += cols_at_once) {
      const int64_t cols = std::min(cols_at_once, weight.cols() - col);
      const Matrix panel{scratch.panel, rows, cols, cols, 1, dtype};
      write_tile(weight, {row, rows, col, cols}, panel.data, cols, dtype, scratch.float_rows);
      gemm(x.slice(0, batch, col, cols), panel.transposed(), y.slice(0, batch, row, rows), col > 0);
    }
  });
  if (bias.defined()) out.add_(bias);
}

void multiply_backward_input(const CheckedWeight& weight, const at::Tensor& grad_output,
                             at::Tensor& grad_input) {
  const auto dtype = grad_output.scalar_type();
  const int64_t batch = grad_output.size(0);
  const int64_t element = static_cast<int64_t>(c10::elementSize(dtype));
  const int64_t share = round_up((weight.cols() + at::get_num_threads() - 1) / at::get_num_threads(),
                                 64);
  const int64_t cols_at_once = std::min(dtype == at::kBFloat16 ? kTileCols / 8 : kTileCols, share);
  const int64_t rows_at_once = std::min(weight.rows(), kPanelBytes / element / cols_at_once);
  const Matrix grad_y = matrix_of(grad_output), grad_x = matrix_of(grad_input);
  parallel_stretches(weight.cols(), cols_at_once, [&](int64_t col, int64_t col_end) {
    const PanelScratch scratch = panel_scratch();
    const int64_t cols = col_end - col;
    for (int64_t row = 0; row < weight.rows(); row += rows_at_once) {
      const int64_t rows = std::min(rows_at_once, weight.rows() - row);
      const Matrix panel{scratch.panel, rows, cols, cols, 1, dtype};
      write_tile(weight, {row, rows, col, cols}, panel.data, cols, dtype, scratch.float_rows);
      gemm(grad_y.slice(0, batch, row, rows), panel, grad_x.slice(0, batch, col, cols), row > 0);
    }
  });
}

void write_weight(const CheckedWeight& weight, at::Tensor& out) {
  const Matrix matrix = matrix_of(out);
  const int64_t rows_at_once =
      std::max<int64_t>(1, kGrainWeights / std::max<int64_t>(1, weight.cols()));
  parallel_stretches(weight.rows(), rows_at_once, [&](int64_t row, int64_t row_end) {
    const PanelScratch scratch = panel_scratch();
    const Matrix tile = matrix.slice(row, row_end - row, 0, weight.cols());
    write_tile(weight, {row, row_end - row, 0, weight.cols()}, tile.data, tile.row_stride,
               tile.dtype, scratch.float_rows);
  });
}

namespace {

/// One tile in flight: its gradient, where that is a product, and what it adds to the pool.
struct TileWork {
  at::Tensor gradient, offsets, values;
  std::vector<double> grad_theta;
  PoolContributions contributions;
};

/// Runs over all tiles in rounds, a tile a thread. In each, threads first work on their tiles, then
/// add all the round's contributions to the stretch of the pool that each of them owns: no races,
/// and sums in one order whatever the number of threads.
template <class TileGradient>
WeightGradients backward_in_rounds(const CheckedWeight& weight, at::ScalarType gradient_dtype,
                                   bool gradient_is_product, const TileGradient& tile_gradient) {
  const VirtualWeight& virtual_weight = weight.get();
  const auto dtype = weight.compute_dtype();
  const int64_t element = static_cast<int64_t>(c10::elementSize(dtype));
  const int64_t pool_size =
      int64_t{virtual_weight.hash.num_slots} << virtual_weight.hash.log2_block;
  WeightGradients result{at::zeros({pool_size}, at::dtype(dtype)),
                         std::vector<double>(weight.theta_size(), 0.0)};
  if (weight.rows() == 0 || weight.cols() == 0) return result;

  const int64_t tile_cols = std::min(kTileCols, weight.cols());
  int64_t row_entries = 0, row_values = 0;
  kernels().contribution_bounds(virtual_weight, {0, 1, 0, tile_cols}, &row_entries, &row_values);
  const int64_t row_bytes = row_entries * sizeof(uint32_t) + row_values * element;
  const int64_t tile_rows =
      std::min(std::max<int64_t>(1, kContributionBytes / row_bytes), weight.rows());
  const int64_t tiles_across = (weight.cols() + tile_cols - 1) / tile_cols;
  const int64_t tiles_down = (weight.rows() + tile_rows - 1) / tile_rows;
  const int64_t num_tiles = tiles_across * tiles_down;
  const int64_t tiles_in_round = std::min<int64_t>(num_tiles, at::get_num_threads());

  std::vector<TileWork> round(tiles_in_round);
  for (TileWork& work : round) {
    if (gradient_is_product) {
      work.gradient = at::empty({tile_rows, tile_cols}, at::dtype(gradient_dtype));
    }
    work.offsets = at::empty({tile_rows * row_entries}, at::dtype(at::kInt));
    work.values = at::empty({tile_rows * row_values}, at::dtype(dtype));
    work.grad_theta.resize(weight.theta_size());
    work.contributions = {reinterpret_cast<uint32_t*>(work.offsets.mutable_data_ptr<int>()),
                          work.values.mutable_data_ptr(), 0, 0};
  }
  const int64_t stretch = round_up((pool_size + tiles_in_round - 1) / tiles_in_round,
                                   virtual_weight.hash.block());
  const DType kernel_gradient_dtype = gradient_dtype == at::kBFloat16 ? DType::kBFloat16
                                      : gradient_dtype == at::kFloat  ? DType::kFloat32
                                                                      : DType::kFloat64;
  for (int64_t first = 0; first < num_tiles; first += tiles_in_round) {
    const int64_t count = std::min(tiles_in_round, num_tiles - first);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        TileWork& work = round[i];
        const int64_t row = (first + i) / tiles_across * tile_rows;
        const int64_t col = (first + i) % tiles_across * tile_cols;
        const TileBounds tile{row, std::min(tile_rows, weight.rows() - row), col,
                              std::min(tile_cols, weight.cols() - col)};
        const Matrix gradient = tile_gradient(tile, work.gradient);
        std::fill(work.grad_theta.begin(), work.grad_theta.end(), 0.0);
        kernels().backward(virtual_weight, tile, gradient.data, kernel_gradient_dtype,
                           gradient.row_stride, work.grad_theta.data(), &work.contributions);
      }
    });
    parallel_stretches(pool_size, stretch, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; ++i) {
        kernels().scatter(round[i].contributions, virtual_weight.pool_dtype,
                          static_cast<uint32_t>(begin), static_cast<uint32_t>(end),
                          result.pool.mutable_data_ptr());
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      for (size_t j = 0; j < result.theta.size(); ++j) {
        result.theta[j] += round[i].grad_theta[j];
      }
    }
  }
  return result;
}

}  // namespace

WeightGradients weight_backward(const CheckedWeight& weight, const at::Tensor& gradient) {
  const Matrix matrix = matrix_of(gradient);
  return backward_in_rounds(weight, gradient.scalar_type(), false,
                            [&](const TileBounds& tile, at::Tensor&) {
                              return matrix.slice(tile.row, tile.rows, tile.col, tile.cols);
                            });
}

WeightGradients weight_backward(const CheckedWeight& weight, const at::Tensor& grad_output,
                                const at::Tensor& input) {
  const Matrix grad_y = matrix_of(grad_output), x = matrix_of(input);
  const int64_t batch = input.size(0);
  return backward_in_rounds(
      weight, input.scalar_type(), true, [&](const TileBounds& tile, at::Tensor& storage) {
        const Matrix product = matrix_of(storage).slice(0, tile.rows, 0, tile.cols);
        gemm(grad_y.slice(0, batch, tile.row, tile.rows).transposed(),
             x.slice(0, batch, tile.col, tile.cols), product, false);
        return product;
      });
}

}  // namespace hfh::torch_ops
