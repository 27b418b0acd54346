#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "torch/convolution.h"

namespace hfh::torch_ops {

/// Tiles of the gradient of a convolution's weight, column by column of tiles: products of
/// grad_output with the input, an operand of padded images, over all pixels.
class ConvolutionGradient {
 public:
  ConvolutionGradient(const Convolution& convolution, const at::Tensor& grad_output,
                      const at::Tensor& input);

  /// Columns that tiles have: all taps of some channels.
  int64_t tile_cols() const { return tile_channels_ * num_taps(); }
  /// Chooses the columns of the tiles to come. Not to be called in a parallel region.
  void select_columns(int64_t col, int64_t cols);
  /// out[rows, cols] = grad_output[row:row + rows] input[the columns selected]. Returns whether all
  /// of it is finite.
  bool multiply(int64_t row, int64_t rows, float* out, int64_t stride) const;
  /// Adds to `out` instead; for kernels of one tap.
  bool add_product(int64_t row, int64_t rows, float* out, int64_t stride) const;

  /// Images to take at a time, for what is packed of them to stay in cache.
  static int64_t images_at_once(const Convolution& convolution, const at::Tensor& input);

 private:
  static int64_t tile_channels(const Convolution& convolution, const at::Tensor& input);
  int64_t num_taps() const { return static_cast<int64_t>(taps_.size()); }
  /// Adds to sums[i * stride + col] or, transposed, to sums[col * stride + i].
  bool add(int64_t row, int64_t rows, float* sums, int64_t stride, bool is_transposed) const;

  cpu::PaddedImages input_, grad_output_;
  std::vector<int64_t> taps_;
  int64_t tile_channels_, channels_ = 0;  // of the input: of a column of tiles, of those chosen
  char* packed_input_ = nullptr;
};

}  // namespace hfh::torch_ops
