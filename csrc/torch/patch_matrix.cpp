#include "torch/patch_matrix.h"

#include <ATen/ATen.h>

#include "cpu/kernels.h"
#include "torch/parallel.h"

namespace hfh::torch_ops {

namespace {

using cpu::kernels;
using cpu::PatchBlock;

// Elements that a thread should get to move before another is woken.
constexpr int64_t kGrainElements = 1 << 14;

int64_t grain_of(int64_t elements) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements));
}

/// Rows [begin, end) of a block.
PatchBlock some_rows(const PatchBlock& block, int64_t begin, int64_t end, int64_t element) {
  auto* data = static_cast<char*>(block.data) + begin * block.stride * element;
  return {block.row + begin, end - begin, block.col, block.cols, data, block.stride};
}

}  // namespace

PatchMatrix::PatchMatrix(const at::Tensor& images, const cpu::Patches& patches, int64_t channel)
    : images_(images), patches_(patches), channel_(channel) {}

const void* PatchMatrix::data() const {
  return static_cast<const char*>(images_.const_data_ptr()) +
         channel_ * patches_.channel_step * element_size(dtype());
}

std::optional<at::Tensor> PatchMatrix::view() const {
  const auto &height = patches_.height, &width = patches_.width;
  const auto fits = [](int64_t size, int64_t step, int64_t expected) {
    return size == 1 || step == expected;
  };
  const auto moves = [](const cpu::Axis& axis) {
    return axis.kernel != 1 || axis.stride != 1 || axis.padding != 0;
  };
  const int64_t row = patches_.channels;
  if (moves(height) || moves(width) || !fits(row, patches_.channel_step, 1) ||
      !fits(width.size, width.step, row) || !fits(height.size, height.step, width.size * row) ||
      !fits(patches_.num_images, patches_.image_step, height.size * width.size * row)) {
    return std::nullopt;
  }
  return images_.as_strided({rows(), row}, {row, 1},
                            images_.storage_offset() + channel_ * patches_.channel_step);
}

PatchBlock PatchMatrix::block_of(int64_t row, int64_t col, const at::Tensor& data) const {
  return {row, data.size(0), col, data.size(1), data.mutable_data_ptr(), data.size(1)};
}

void PatchMatrix::read(int64_t row, int64_t col, const at::Tensor& out) const {
  const PatchBlock block = block_of(row, col, out);
  const int64_t element = element_size(dtype());
  at::parallel_for(0, block.rows, grain_of(block.cols), [&](int64_t begin, int64_t end) {
    kernels().gather_patches(patches_, data(), static_cast<int>(element),
                             some_rows(block, begin, end, element));
  });
}

void PatchMatrix::write(int64_t row, int64_t col, const at::Tensor& block) const {
  const PatchBlock whole = block_of(row, col, block);
  const int64_t element = element_size(dtype());
  at::parallel_for(0, whole.rows, grain_of(whole.cols), [&](int64_t begin, int64_t end) {
    kernels().scatter_positions(patches_, some_rows(whole, begin, end, element),
                                static_cast<int>(element), const_cast<void*>(data()));
  });
}

void PatchMatrix::add(int64_t row, const at::Tensor& block) const {
  const PatchBlock whole = block_of(row, 0, block);
  const int64_t taps = patches_.taps(), element = element_size(dtype());
  const DType kind = dtype() == at::kDouble ? DType::kFloat64 : DType::kFloat32;
  // Patches overlap, channels do not.
  at::parallel_for(0, patches_.channels, grain_of(whole.rows * taps),
                   [&](int64_t begin, int64_t end) {
                     PatchBlock part = whole;
                     part.col = begin * taps;
                     part.cols = (end - begin) * taps;
                     part.data = static_cast<char*>(whole.data) + part.col * element;
                     kernels().add_patches(patches_, part, kind, const_cast<void*>(data()));
                   });
}

}  // namespace hfh::torch_ops
