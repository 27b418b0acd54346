#include <ATen/ATen.h>

#include <atomic>

#include "torch/padded_images.h"

// Convolutions of float32 images of stride 1 on the matrix unit, with no patches: an operand of
// padded images is packed once, and each tap of the kernel reads it from another pixel on.

namespace hfh::torch_ops {

namespace {

using namespace padded_images;
using cpu::kernels;
using Side = MatrixUnit::Side;

// A panel of the weight, of a thread's own.
constexpr int64_t kMinPanelRows = 2 * MatrixUnit::kTile, kPanelBytes = 7 << 16;
// Not a power of two, which would map all rows to the same few cache lines.
constexpr int64_t kPadding = 16;

/// A convolution of `source` to `target` with V or, for the gradient to the input, with its
/// transpose: the taps then run backwards.
class Pass {
 public:
  Pass(const Convolution& convolution, const CheckedWeight& weight, bool is_transposed,
       const at::Tensor& source, const at::Tensor& bias, const at::Tensor& target)
      : weight_(weight.get()),
        is_transposed_(is_transposed),
        source_(padded(source, padding(convolution, 0), padding(convolution, 1))),
        bias_(bias.defined() ? bias.const_data_ptr<float>() : nullptr),
        target_(padded(target, 0, 0)),
        data_(target.mutable_data_ptr<float>()),
        taps_(tap_offsets(convolution, source_.pitch)) {
    if (is_transposed) std::reverse(taps_.begin(), taps_.end());
    const int64_t step_bytes =
        kMinPanelRows * num_taps() * MatrixUnit::kStep * MatrixUnit::kElementBytes;
    chunk_ = std::min(round_up(source_.channels, MatrixUnit::kStep),
                      std::max<int64_t>(1, kPanelBytes / step_bytes) * MatrixUnit::kStep);
    const int64_t row_bytes =
        static_cast<int64_t>(MatrixUnit::packed_bytes(1, chunk_ * num_taps())) / MatrixUnit::kTile;
    const int64_t share =
        round_up(ceil_divide(target_.channels, at::get_num_threads()), kMinPanelRows);
    panel_rows_ =
        std::clamp(kPanelBytes / row_bytes / kMinPanelRows * kMinPanelRows, kMinPanelRows, share);
    slice_ = std::min(chunk_, std::max<int64_t>(1, kSliceCols / (num_taps() * MatrixUnit::kStep)) *
                                  MatrixUnit::kStep);
  }

  /// Returns whether all sums are finite.
  bool run() {
    const int64_t at_once = images_within(kPackedBytes, source_, source_.channels);
    for (int64_t image = 0; image < source_.num_images; image += at_once) {
      const int64_t count = std::min(at_once, source_.num_images - image);
      multiply(some_images(source_, image, count), data_ + image * target_.image_step);
    }
    return finite_;
  }

 private:
  int64_t padding(const Convolution& convolution, int dim) const {
    const int64_t padding = convolution.padding[dim];
    const int64_t reach = convolution.dilation[dim] * (convolution.kernel_size[dim] - 1);
    return is_transposed_ ? reach - padding : padding;
  }
  int64_t num_taps() const { return static_cast<int64_t>(taps_.size()); }
  /// The target's pixels, by tiles of positions: padded rows have more of these than the target.
  std::vector<MatrixUnit::Tile> tiles_of(const PaddedImages& source) const {
    std::vector<MatrixUnit::Tile> tiles;
    const int64_t positions = (target_.height - 1) * source.pitch + target_.width;
    for (int64_t image = 0; image < source.num_images; ++image) {
      int64_t pixel = 0;
      for (int64_t first = 0; first < positions; first += MatrixUnit::kTile) {
        MatrixUnit::Tile tile{(image * source.image_pixels() + first) * kPixelBytes,
                              image * target_.image_step + pixel * target_.pixel_step, 0};
        for (int64_t i = 0; i < MatrixUnit::kTile && first + i < positions; ++i) {
          if ((first + i) % source.pitch >= target_.width) continue;
          tile.lanes |= 1 << i;
          ++pixel;
        }
        tiles.push_back(tile);
      }
    }
    return tiles;
  }

  void multiply(const PaddedImages& source, float* target) {
    const int64_t step_bytes = MatrixUnit::packed_bytes(source);
    const int64_t num_steps = ceil_divide(source.channels, MatrixUnit::kStep);
    char* packed = static_cast<char*>(Scratch<Purpose::kPackedBatch>::get(num_steps * step_bytes));
    at::parallel_for(0, ceil_divide(source.channels, MatrixUnit::kStep), 1,
                     [&](int64_t begin, int64_t end) {
                       float* scratch = padding_scratch(source);
                       for (int64_t i = begin; i < end; ++i) {
                         kernels().matrix_unit->pack_channel_pairs(
                             source, i * MatrixUnit::kStep, packed + i * step_bytes, scratch);
                       }
                     });
    const std::vector<MatrixUnit::Tile> tiles = tiles_of(source);
    std::vector<int64_t> steps;
    for (int64_t step = 0; step < chunk_ / MatrixUnit::kStep; ++step) {
      for (const int64_t tap : taps_) steps.push_back(step * step_bytes + tap * kPixelBytes);
    }
    const MatrixUnit::Images images{Side::kLeft, tiles.data(), steps.data(),
                                    MatrixUnit::piece_bytes(source)};
    const int64_t positions = static_cast<int64_t>(tiles.size()) * MatrixUnit::kTile;
    const bool is_channels_last = target_.pixel_step != 1;
    const int64_t stride = is_channels_last ? target_.pixel_step : target_.channel_step;
    at::parallel_for(
        0, ceil_divide(target_.channels, panel_rows_), 1, [&](int64_t begin, int64_t end) {
          const int64_t panel_bytes = MatrixUnit::packed_bytes(panel_rows_, chunk_ * num_taps());
          auto* panel = static_cast<char*>(
              Scratch<Purpose::kPanels>::get(panel_bytes + floats_of_slice() * sizeof(float)));
          auto* floats = reinterpret_cast<float*>(panel + panel_bytes);
          const MatrixUnit& unit = *kernels().matrix_unit;
          unit.prepare();
          for (int64_t row = begin * panel_rows_; row < end * panel_rows_; row += panel_rows_) {
            const int64_t rows = std::min(panel_rows_, target_.channels - row);
            start_sums(target, source.num_images, row, rows);
            for (int64_t channel = 0; channel < source.channels; channel += chunk_) {
              const int64_t channels = std::min(chunk_, source.channels - channel);
              pack_panel(row, rows, channel, channels, panel, floats);
              MatrixUnit::Product product{packed + channel / MatrixUnit::kStep * step_bytes,
                                          panel,
                                          positions,
                                          rows,
                                          round_up(channels, MatrixUnit::kStep) * num_taps(),
                                          target + row * target_.channel_step,
                                          stride,
                                          !is_channels_last,
                                          &images};
              unit.start(product);
              unit.advance(product, product.steps_left);
              if (!product.finite) finite_ = false;
            }
          }
          unit.release();
        });
  }

  int64_t floats_of_slice() const {
    return is_transposed_ ? slice_ * (panel_rows_ * num_taps() + kPadding)
                          : MatrixUnit::kTile * (slice_ * num_taps() + kPadding);
  }

  /// Sums start at the bias.
  void start_sums(float* target, int64_t num_images, int64_t row, int64_t rows) const {
    const int64_t pixels = target_.height * target_.width;
    for (int64_t image = 0; image < num_images; ++image) {
      float* sums = target + image * target_.image_step + row * target_.channel_step;
      if (target_.pixel_step == 1) {
        for (int64_t i = 0; i < rows; ++i) {
          const float value = bias_ == nullptr ? 0.0f : bias_[row + i];
          std::fill_n(sums + i * target_.channel_step, pixels, value);
        }
      } else {
        for (int64_t pixel = 0; pixel < pixels; ++pixel, sums += target_.pixel_step) {
          if (bias_ == nullptr) {
            std::fill_n(sums, rows, 0.0f);
          } else {
            std::copy_n(bias_ + row, rows, sums);
          }
        }
      }
    }
  }

  /// Reconstructs and packs what leads from channels of the source to `rows` of the target.
  void pack_panel(int64_t row, int64_t rows, int64_t channel, int64_t channels, char* panel,
                  float* floats) const {
    const int64_t taps = num_taps(), row_tiles = ceil_divide(rows, MatrixUnit::kTile);
    const auto packed = [&](int64_t tile, int64_t first) {
      return panel +
             MatrixUnit::packed_bytes(tile * MatrixUnit::kTile,
                                      round_up(channels, MatrixUnit::kStep) * taps) +
             MatrixUnit::packed_bytes(MatrixUnit::kTile, first * taps);
    };
    for (int64_t first = 0; first < channels; first += slice_) {
      const int64_t count = std::min(slice_, channels - first);
      for (int64_t tile = 0; tile < row_tiles; ++tile) {
        const int64_t tile_row = tile * MatrixUnit::kTile;
        const int64_t tile_rows = std::min(MatrixUnit::kTile, rows - tile_row);
        if (is_transposed_) {
          const int64_t stride = panel_rows_ * taps + kPadding;
          if (tile == 0) {
            kernels().reconstruct(weight_, {channel + first, count, row * taps, rows * taps},
                                  floats, stride, {});
          }
          kernels().matrix_unit->pack_taps(true, floats + tile_row * taps, stride, tile_rows, count,
                                           taps, packed(tile, first));
        } else {
          const int64_t stride = slice_ * taps + kPadding;
          kernels().reconstruct(weight_,
                                {row + tile_row, tile_rows, (channel + first) * taps, count * taps},
                                floats, stride, {});
          kernels().matrix_unit->pack_taps(false, floats, stride, tile_rows, count, taps,
                                           packed(tile, first));
        }
      }
    }
  }

  const VirtualWeight& weight_;
  bool is_transposed_;
  PaddedImages source_;
  const float* bias_;
  PaddedImages target_;
  float* data_;
  std::vector<int64_t> taps_;
  int64_t panel_rows_;
  int64_t chunk_, slice_;  // channels of the source in a panel and in a part reconstructed at once
  std::atomic<bool> finite_ = true;
};

}  // namespace

bool matrix_unit_forward(const Convolution& convolution, const CheckedWeight& weight,
                         const at::Tensor& input, const at::Tensor& bias, at::Tensor& output) {
  return Pass(convolution, weight, false, input, bias, output).run();
}

bool matrix_unit_backward_input(const Convolution& convolution, const CheckedWeight& weight,
                                const at::Tensor& grad_output, at::Tensor& grad_input) {
  return Pass(convolution, weight, true, grad_output, {}, grad_input).run();
}

}  // namespace hfh::torch_ops
