#include "torch/panels.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "torch/gemm.h"
#include "torch/matrix_unit.h"
#include "torch/parallel.h"
#include "torch/slot_products.h"

namespace hfh::torch_ops {

namespace {

using cpu::kernels;
using cpu::TileBounds;

// A panel for the platform's GEMM fills about a quarter of a second-level cache.
constexpr int64_t kPanelBytes = 1 << 19;
constexpr int64_t kPanelRows = 128;
constexpr int64_t kMinPanelRows = 16;
constexpr int64_t kPanelCols = 512;
// Rows that are made at once before they are rounded: draws come for many blocks together.
constexpr int64_t kFloatRows = 16;
// Of the gradient to a bfloat16 input, where a panel holds all rows.
constexpr int64_t kGradPanelCols = 64;
// Weights that a thread should get to make before another is woken.
constexpr int64_t kGrainWeights = 1 << 14;

/// Columns that each thread takes, in whole blocks of 64.
int64_t share_of_thread(int64_t cols) {
  const int64_t threads = at::get_num_threads();
  return round_up((cols + threads - 1) / threads, 64);
}

/// Writes a tile of the virtual weight as `dtype`; float tiles pass through `float_rows`.
void write_tile(const CheckedWeight& weight, const TileBounds& tile, void* out, int64_t stride,
                at::ScalarType dtype, float* float_rows) {
  if (dtype != at::kBFloat16) return kernels().reconstruct(weight.get(), tile, out, stride, {});
  auto* rounded = static_cast<BFloat16*>(out);
  for (int64_t row = 0; row < tile.rows; row += kFloatRows) {
    const int64_t rows = std::min(kFloatRows, tile.rows - row);
    for (int64_t col = 0; col < tile.cols; col += kPanelCols) {
      const int64_t cols = std::min(kPanelCols, tile.cols - col);
      kernels().reconstruct(weight.get(), {tile.row + row, rows, tile.col + col, cols}, float_rows,
                            cols, {});
      for (int64_t i = 0; i < rows; ++i) {
        kernels().round_to_bfloat16(float_rows + i * cols, rounded + (row + i) * stride + col,
                                    cols);
      }
    }
  }
}

/// The calling thread's panel, and some of a tile's rows in floats behind it.
struct PanelScratch {
  void* panel;
  float* float_rows;
};

PanelScratch panel_scratch() {
  auto* memory = static_cast<char*>(
      Scratch<Purpose::kPanels>::get(kPanelBytes + kFloatRows * kPanelCols * sizeof(float)));
  return {memory, reinterpret_cast<float*>(memory + kPanelBytes)};
}

/// Scratch of the fused products.
float* linear_scratch() {
  return static_cast<float*>(
      Scratch<Purpose::kPanels>::get(kernels().linear_scratch() * sizeof(float)));
}

/// `out`, or a float32 tensor to be copied into it.
at::Tensor float_output(const at::Tensor& out) {
  return out.scalar_type() == at::kFloat ? out : at::empty(out.sizes(), at::dtype(at::kFloat));
}

/// The product in float32, whatever the dtypes outside.
void fused_forward(const CheckedWeight& weight, const at::Tensor& input, const at::Tensor& bias,
                   at::Tensor& out) {
  const at::Tensor input_float = input.to(at::kFloat);
  const at::Tensor bias_float = bias.defined() ? bias.to(at::kFloat).contiguous() : bias;
  at::Tensor out_float = float_output(out);
  const cpu::LinearBatch batch{input_float.const_data_ptr<float>(),
                               bias.defined() ? bias_float.const_data_ptr<float>() : nullptr,
                               out_float.mutable_data_ptr<float>(),
                               input.size(0),
                               weight.cols(),
                               weight.rows()};
  if (!slot_products_forward(weight.get(), batch) && !matrix_unit_forward(weight.get(), batch)) {
    const int64_t grain = std::max<int64_t>(8, kGrainWeights / weight.cols());
    at::parallel_for(0, weight.rows(), grain, [&](int64_t begin, int64_t end) {
      // One input is multiplied as the weights are made and takes no scratch.
      float* scratch = batch.batch == 1 ? nullptr : linear_scratch();
      kernels().linear(weight.get(), batch, begin, end, scratch);
    });
  }
  if (!out_float.is_same(out)) out.copy_(out_float);
}

void fused_backward_input(const CheckedWeight& weight, const at::Tensor& grad_output,
                          at::Tensor& grad_input) {
  const at::Tensor grad_output_float = grad_output.to(at::kFloat);
  at::Tensor grad_input_float = float_output(grad_input);
  const cpu::LinearBatch args{grad_output_float.const_data_ptr<float>(),
                              nullptr,
                              grad_input_float.mutable_data_ptr<float>(),
                              grad_output.size(0),
                              weight.rows(),
                              weight.cols()};
  if (!slot_products_backward_input(weight.get(), args) &&
      !matrix_unit_backward_input(weight.get(), args)) {
    parallel_stretches(
        weight.cols(), share_of_thread(weight.cols()), [&](int64_t begin, int64_t end) {
          kernels().linear_backward_input(weight.get(), args, begin, end, linear_scratch());
        });
  }
  if (!grad_input_float.is_same(grad_input)) grad_input.copy_(grad_input_float);
}

cpu::BFloat16Batch bfloat16_batch(const at::Tensor& input, const at::Tensor& bias,
                                  at::Tensor& output) {
  return {static_cast<const BFloat16*>(input.const_data_ptr()),
          bias.defined() ? bias.const_data_ptr<float>() : nullptr,
          static_cast<BFloat16*>(output.mutable_data_ptr()),
          input.size(0),
          input.size(1),
          output.size(1)};
}

void* bfloat16_scratch() { return Scratch<Purpose::kPanels>::get(kernels().bfloat16_scratch()); }

/// Whether panels of bfloat16 are to be multiplied by the platform. It would round sums between
/// stretches of the inner dimension: a panel must hold all of it.
bool takes_platform_panels(int64_t batch, int64_t inner_size, int64_t min_outer_size) {
  return prefers_platform_bfloat16(batch) &&
         inner_size * min_outer_size <= kPanelBytes / static_cast<int64_t>(sizeof(BFloat16));
}

/// The product of bfloat16 tensors; returns whether it is done.
bool bfloat16_forward(const CheckedWeight& weight, const at::Tensor& input, const at::Tensor& bias,
                      at::Tensor& out) {
  const int64_t batch = input.size(0);
  if (batch == 1) {
    fused_forward(weight, input, bias, out);
    return true;
  }
  if (prefers_slot_products_bfloat16(weight.get(), weight.rows(), weight.cols(), batch)) {
    for_each_float_part(weight, batch, [&](int64_t first, int64_t last) {
      at::Tensor part = out.slice(0, first, last);
      fused_forward(weight, input.slice(0, first, last), bias, part);
    });
    return true;
  }
  if (takes_platform_panels(batch, weight.cols(), kMinPanelRows)) return false;
  const at::Tensor bias_float = bias.defined() ? bias.to(at::kFloat).contiguous() : bias;
  const cpu::BFloat16Batch args = bfloat16_batch(input, bias_float, out);
  const int64_t grain = std::max<int64_t>(8, kGrainWeights / weight.cols());
  at::parallel_for(0, weight.rows(), grain, [&](int64_t begin, int64_t end) {
    kernels().linear_bfloat16(weight.get(), args, begin, end, bfloat16_scratch());
  });
  return true;
}

bool bfloat16_backward_input(const CheckedWeight& weight, const at::Tensor& grad_output,
                             at::Tensor& grad_input) {
  const int64_t batch = grad_output.size(0);
  if (prefers_slots_backward_input_bfloat16(weight.get(), weight.rows(), weight.cols(), batch)) {
    for_each_float_part(weight, batch, [&](int64_t first, int64_t last) {
      at::Tensor part = grad_input.slice(0, first, last);
      fused_backward_input(weight, grad_output.slice(0, first, last), part);
    });
    return true;
  }
  if (takes_platform_panels(batch, weight.rows(), kGradPanelCols)) return false;
  const cpu::BFloat16Batch args = bfloat16_batch(grad_output, {}, grad_input);
  parallel_stretches(weight.cols(), share_of_thread(weight.cols()),
                     [&](int64_t begin, int64_t end) {
                       kernels().linear_backward_input_bfloat16(weight.get(), args, begin, end,
                                                                bfloat16_scratch());
                     });
  return true;
}

}  // namespace

void multiply_forward(const CheckedWeight& weight, const at::Tensor& input, const at::Tensor& bias,
                      at::Tensor& out) {
  const auto dtype = input.scalar_type();
  const int64_t batch = input.size(0), panel_size = kPanelBytes / element_size(dtype);
  const bool is_bfloat16 = dtype == at::kBFloat16;
  if (dtype == at::kFloat) return fused_forward(weight, input, bias, out);
  if (is_bfloat16 && bfloat16_forward(weight, input, bias, out)) return;
  const int64_t cols_at_once =
      is_bfloat16 ? weight.cols() : std::min(weight.cols(), panel_size / kPanelRows);
  const int64_t rows_at_once =
      std::min(kPanelRows, std::max(kMinPanelRows, panel_size / cols_at_once));
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
  const int64_t batch = grad_output.size(0), panel_size = kPanelBytes / element_size(dtype);
  const bool is_bfloat16 = dtype == at::kBFloat16;
  if (dtype == at::kFloat) return fused_backward_input(weight, grad_output, grad_input);
  if (is_bfloat16 && bfloat16_backward_input(weight, grad_output, grad_input)) return;
  const int64_t cols_at_once =
      std::min(is_bfloat16 ? kGradPanelCols : kPanelCols, share_of_thread(weight.cols()));
  const int64_t rows_at_once = std::min(weight.rows(), panel_size / cols_at_once);
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

}  // namespace hfh::torch_ops
