#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/patches.h"

namespace hfh::torch_ops {

/// The matrix of what a kernel sees of images at every position of its output: the operand of a
/// convolution seen as a product. Seldom in memory; blocks of it are read, written or added to.
class PatchMatrix {
 public:
  /// Of the channels of `images` [batch, channels, height, width] from `channel` on.
  PatchMatrix(const at::Tensor& images, const cpu::Patches& patches, int64_t channel);

  int64_t rows() const { return patches_.rows(); }
  int64_t cols() const { return patches_.cols(); }
  at::ScalarType dtype() const { return images_.scalar_type(); }
  const cpu::Patches& patches() const { return patches_; }
  /// Of the first channel.
  const void* data() const;

  /// The matrix itself, contiguous, where the images are one in memory.
  std::optional<at::Tensor> view() const;

  /// Rows from `row` on and columns from `col` on, as many as `out` has.
  void read(int64_t row, int64_t col, const at::Tensor& out) const;
  /// The inverse of `read`, for kernels of one tap: patches then do not overlap.
  void write(int64_t row, int64_t col, const at::Tensor& block) const;
  /// Adds to the images what whole rows hold of their gradient, in float32 or float64.
  void add(int64_t row, const at::Tensor& block) const;

 private:
  cpu::PatchBlock block_of(int64_t row, int64_t col, const at::Tensor& data) const;

  at::Tensor images_;
  cpu::Patches patches_;
  int64_t channel_;
};

}  // namespace hfh::torch_ops
