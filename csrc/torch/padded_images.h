#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "torch/convolution.h"
#include "torch/parallel.h"

// What the convolutions on the matrix unit share.

namespace hfh::torch_ops::padded_images {

using cpu::MatrixUnit;
using cpu::PaddedImages;

inline constexpr int64_t kPixelBytes = 4 * MatrixUnit::kTile;
// Packed images, which all threads read: most of a second-level cache.
inline constexpr int64_t kPackedBytes = 3 << 19;
// Columns of the weight that are reconstructed at once.
inline constexpr int64_t kSliceCols = 576;

/// Dense images with `top` rows and `left` pixels of zeros before each.
inline PaddedImages padded(const at::Tensor& images, int64_t top, int64_t left) {
  // The steps of dimensions of one element may be anything.
  const int64_t pixel_step = images.is_contiguous() ? 1 : images.size(1);
  return {images.const_data_ptr<float>(),
          images.size(0),
          images.size(1),
          images.size(2),
          images.size(3),
          images.stride(0),
          images.stride(1),
          images.stride(2),
          pixel_step,
          top,
          left,
          left + images.size(3)};
}

inline PaddedImages some_images(PaddedImages images, int64_t first, int64_t count) {
  images.data += first * images.image_step;
  images.num_images = count;
  return images;
}

/// How many images fit, with so many channels packed.
inline int64_t images_within(int64_t bytes, const PaddedImages& images, int64_t channels) {
  PaddedImages none = images;
  none.num_images = 0;
  const int64_t pixel_bytes = round_up(channels, MatrixUnit::kStep) * MatrixUnit::kElementBytes;
  const int64_t pixels = bytes / pixel_bytes - none.pixels();
  return std::clamp<int64_t>(pixels / images.image_pixels(), 1,
                             std::max<int64_t>(1, images.num_images));
}

inline float* padding_scratch(const PaddedImages& images) {
  return static_cast<float*>(
      Scratch<Purpose::kPatches>::get(MatrixUnit::padding_scratch(images) * sizeof(float)));
}

/// Pixels that each tap is away from the first, in the order of the weight's columns.
inline std::vector<int64_t> tap_offsets(const Convolution& convolution, int64_t pitch) {
  std::vector<int64_t> offsets;
  for (int64_t y = 0; y < convolution.kernel_size[0]; ++y) {
    for (int64_t x = 0; x < convolution.kernel_size[1]; ++x) {
      offsets.push_back(y * convolution.dilation[0] * pitch + x * convolution.dilation[1]);
    }
  }
  return offsets;
}

}  // namespace hfh::torch_ops::padded_images
