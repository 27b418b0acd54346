#include <ATen/ATen.h>

#include "torch/matrix_unit_convolution.h"
#include "torch/padded_images.h"

namespace hfh::torch_ops {

namespace {

using namespace padded_images;
using cpu::kernels;
using Side = MatrixUnit::Side;

// Of the inner dimension of the weight's gradient, packed at once where images are small.
constexpr int64_t kGradientSteps = 32;

}  // namespace

int64_t ConvolutionGradient::tile_channels(const Convolution& convolution,
                                           const at::Tensor& input) {
  const int64_t taps = convolution.kernel_size[0] * convolution.kernel_size[1];
  return std::min(input.size(1), round_up(ceil_divide(kSliceCols, taps), MatrixUnit::kTile));
}

int64_t ConvolutionGradient::images_at_once(const Convolution& convolution,
                                            const at::Tensor& input) {
  const PaddedImages images = padded(input, convolution.padding[0], convolution.padding[1]);
  // Packed as pairs of pixels they take twice that. Measured: fewer at once take longer, as all
  // that follows a tile of the gradient is done for each stretch of images.
  return images_within(kPackedBytes, images, tile_channels(convolution, input));
}

ConvolutionGradient::ConvolutionGradient(const Convolution& convolution,
                                         const at::Tensor& grad_output, const at::Tensor& input)
    : input_(padded(input, convolution.padding[0], convolution.padding[1])),
      grad_output_(padded(grad_output, 0, 0)),
      taps_(tap_offsets(convolution, input_.pitch)),
      tile_channels_(tile_channels(convolution, input)) {
  grad_output_.pitch = input_.pitch;
}

void ConvolutionGradient::select_columns(int64_t col, int64_t cols) {
  channels_ = cols / num_taps();
  const int64_t count = ceil_divide(channels_, MatrixUnit::kTile);
  const int64_t bytes = MatrixUnit::packed_bytes(input_);
  packed_input_ = static_cast<char*>(Scratch<Purpose::kPackedBatch>::get(count * bytes));
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    float* scratch = padding_scratch(input_);
    for (int64_t i = begin; i < end; ++i) {
      kernels().matrix_unit->pack_pixel_pairs(input_, col / num_taps() + i * MatrixUnit::kTile,
                                              packed_input_ + i * bytes, scratch);
    }
  });
}

bool ConvolutionGradient::multiply(int64_t row, int64_t rows, float* out, int64_t stride) const {
  const int64_t cols = channels_ * num_taps();
  if (num_taps() == 1) {
    for (int64_t i = 0; i < rows; ++i) std::fill_n(out + i * stride, cols, 0.0f);
    return add_product(row, rows, out, stride);
  }
  // Transposed: the sums of a tile, which are of one tap, lie apart in the weight's rows.
  auto* sums = static_cast<float*>(Scratch<Purpose::kPositions>::get(rows * cols * sizeof(float)));
  std::fill_n(sums, rows * cols, 0.0f);
  const bool finite = add(row, rows, sums, rows, true);
  kernels().matrix_unit->transpose(sums, cols, rows, out, stride);
  return finite;
}

bool ConvolutionGradient::add_product(int64_t row, int64_t rows, float* out, int64_t stride) const {
  return add(row, rows, out, stride, false);
}

bool ConvolutionGradient::add(int64_t row, int64_t rows, float* sums, int64_t stride,
                              bool is_transposed) const {
  const MatrixUnit& unit = *kernels().matrix_unit;
  const int64_t steps_of_image = ceil_divide(grad_output_.image_pixels(), MatrixUnit::kStep);
  const int64_t at_once =
      std::clamp(kGradientSteps / steps_of_image, int64_t{1}, grad_output_.num_images);
  const int64_t depth = at_once * steps_of_image * MatrixUnit::kStep;
  auto* packed =
      static_cast<char*>(Scratch<Purpose::kPanels>::get(MatrixUnit::packed_bytes(rows, depth)));
  const int64_t tile_bytes = MatrixUnit::packed_bytes(input_);
  const int64_t col_step = is_transposed ? stride : 1;
  std::vector<MatrixUnit::Tile> tiles;
  for (int64_t tap = 0; tap < num_taps(); ++tap) {
    for (int64_t channel = 0; channel < channels_; channel += MatrixUnit::kTile) {
      const int64_t lanes = std::min(MatrixUnit::kTile, channels_ - channel);
      tiles.push_back({channel / MatrixUnit::kTile * tile_bytes + taps_[tap] * kPixelBytes,
                       (channel * num_taps() + tap) * col_step,
                       static_cast<uint16_t>((1 << lanes) - 1)});
    }
  }
  float* scratch = padding_scratch(input_);
  bool finite = true;
  unit.prepare();
  for (int64_t first = 0; first < grad_output_.num_images; first += at_once) {
    const int64_t images = std::min(at_once, grad_output_.num_images - first);
    const int64_t size = images * steps_of_image * MatrixUnit::kStep;
    std::vector<int64_t> steps;
    for (int64_t i = 0; i < images; ++i) {
      for (int64_t step = 0; step < steps_of_image; ++step) {
        steps.push_back(((first + i) * input_.image_pixels() + step * MatrixUnit::kStep) *
                        kPixelBytes);
      }
      for (int64_t r = 0; r < rows; r += MatrixUnit::kTile) {
        unit.pack_pixels(
            grad_output_, first + i, row + r,
            packed + MatrixUnit::packed_bytes(r, size) +
                i * MatrixUnit::packed_bytes(MatrixUnit::kTile, steps_of_image * MatrixUnit::kStep),
            scratch);
      }
    }
    const MatrixUnit::Images operand{Side::kRight, tiles.data(), steps.data(),
                                     MatrixUnit::piece_bytes(input_)};
    MatrixUnit::Product product{packed,
                                packed_input_,
                                rows,
                                static_cast<int64_t>(tiles.size()) * MatrixUnit::kTile,
                                size,
                                sums,
                                is_transposed ? num_taps() * stride : stride,
                                is_transposed,
                                &operand};
    unit.start(product);
    unit.advance(product, product.steps_left);
    finite = finite && product.finite;
  }
  unit.release();
  return finite;
}

}  // namespace hfh::torch_ops
