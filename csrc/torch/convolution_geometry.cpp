#include <ATen/ATen.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "torch/convolution.h"
#include "torch/parallel.h"

namespace hfh::torch_ops {

namespace {

// Where the matrix unit is faster. Measured: of 32 channels and fewer too much is spent on sums; 16
// positions (one image of 4 x 4) or tiles three quarters empty (2 x 2) leave most of it idle.
constexpr int64_t kUnitChannels = 48, kUnitPositions = 33;
// Where what it takes of memory stays small: of an image's pixels, and with all channels.
constexpr int64_t kUnitPixels = 4096, kUnitElements = 5 << 17;

void check_at_least(at::IntArrayRef values, int64_t low, const char* name) {
  for (const int64_t value : values) {
    TORCH_CHECK_VALUE(value >= low, name, " must be at least ", low, ", received ", values);
  }
}

template <size_t n>
void copy(at::IntArrayRef from, std::array<int64_t, n>& to) {
  std::copy_n(from.begin(), n, to.begin());
}

}  // namespace

Convolution::Convolution(at::IntArrayRef size, int64_t out_channels, HFH_GEOMETRY_PARAMETERS)
    : out_channels(out_channels), groups(groups) {
  check_at_least(kernel_size, 1, "kernel_size");
  check_at_least(stride, 1, "stride");
  check_at_least(padding, 0, "padding");
  check_at_least(dilation, 1, "dilation");
  TORCH_CHECK_VALUE(groups >= 1, "groups must be at least 1, received ", groups);
  TORCH_CHECK_VALUE(size.size() == 4, "input_size must have 4 numbers, received ", size);
  TORCH_CHECK_VALUE(size[1] >= 1 && size[2] >= 1 && size[3] >= 1,
                    "input must have channels, rows and columns, received shape ", size);
  TORCH_CHECK_VALUE(size[1] % groups == 0, "input must have a multiple of groups=", groups,
                    " channels, received shape ", size);
  TORCH_CHECK_VALUE(out_channels >= 1 && out_channels % groups == 0,
                    "out_channels must be a positive multiple of groups=", groups, ", received ",
                    out_channels);
  copy(size, input_size);
  copy(kernel_size, this->kernel_size);
  copy(stride, this->stride);
  copy(padding, this->padding);
  copy(dilation, this->dilation);
  TORCH_CHECK_VALUE(positions(0) >= 1 && positions(1) >= 1,
                    "input must be as large as the kernel once padded, received shape ", size,
                    " for kernel_size=", kernel_size, ", padding=", padding,
                    " and dilation=", dilation);
}

int64_t Convolution::positions(int dim) const {
  const int64_t reach = dilation[dim] * (kernel_size[dim] - 1) + 1;
  const int64_t room = input_size[dim + 2] + 2 * padding[dim] - reach;
  return room < 0 ? 0 : room / stride[dim] + 1;
}

PatchMatrix Convolution::patches(const at::Tensor& images, int64_t group) const {
  const auto axis = [&](int dim) {
    return cpu::Axis{input_size[dim + 2], images.stride(dim + 2), kernel_size[dim], stride[dim],
                     padding[dim],        dilation[dim],          positions(dim)};
  };
  const cpu::Patches patches{input_size[0],    images.stride(0), group_channels(),
                             images.stride(1), axis(0),          axis(1)};
  return {images, patches, group * group_channels()};
}

PatchMatrix Convolution::pixels(const at::Tensor& images, int64_t group) const {
  const auto axis = [&](int dim) {
    return cpu::Axis{positions(dim), images.stride(dim + 2), 1, 1, 0, 1, positions(dim)};
  };
  const cpu::Patches patches{input_size[0],    images.stride(0), group_rows(),
                             images.stride(1), axis(0),          axis(1)};
  return {images, patches, group * group_rows()};
}

PatchMatrix Convolution::input_pixels(const at::Tensor& images) const {
  const auto axis = [&](int dim) {
    return cpu::Axis{input_size[dim + 2], images.stride(dim + 2), 1, 1, 0, 1, input_size[dim + 2]};
  };
  const cpu::Patches patches{input_size[0],    images.stride(0), input_size[1],
                             images.stride(1), axis(0),          axis(1)};
  return {images, patches, 0};
}

PatchMatrix Convolution::grad_patches(const at::Tensor& images) const {
  const auto axis = [&](int dim) {
    const int64_t reach = dilation[dim] * (kernel_size[dim] - 1);
    return cpu::Axis{positions(dim),       images.stride(dim + 2), kernel_size[dim],   1,
                     reach - padding[dim], dilation[dim],          input_size[dim + 2]};
  };
  const cpu::Patches patches{input_size[0],    images.stride(0), out_channels,
                             images.stride(1), axis(0),          axis(1)};
  return {images, patches, 0};
}

CheckedWeight WeightSource::part(int64_t row, int64_t col, int64_t rows, int64_t cols) const {
  WeightArguments shifted = arguments;
  shifted.row_offset += row;
  shifted.col_offset += col;
  return {pool, theta, rows, cols, shifted};
}

bool prefers_matrix_unit(const Convolution& convolution, const at::Tensor& images) {
  if (cpu::kernels().matrix_unit == nullptr || images.scalar_type() != at::kFloat ||
      convolution.groups != 1 ||
      convolution.kernel_size[0] * convolution.kernel_size[1] > cpu::MatrixUnit::kMaxTaps ||
      std::min(convolution.input_size[1], convolution.out_channels) < kUnitChannels) {
    return false;
  }
  for (int dim = 0; dim < 2; ++dim) {
    const int64_t reach = convolution.dilation[dim] * (convolution.kernel_size[dim] - 1);
    if (convolution.stride[dim] != 1 || convolution.padding[dim] > reach) return false;
  }
  // Both the input and, for its gradient, the output are padded, to the same size.
  const int64_t pitch = convolution.input_size[3] + 2 * convolution.padding[1];
  const int64_t padded = (convolution.input_size[2] + 2 * convolution.padding[0]) * pitch;
  const int64_t channels = std::max(convolution.input_size[1], convolution.out_channels);
  const int64_t pixels = convolution.positions(0) * convolution.positions(1);
  const int64_t positions = (convolution.positions(0) - 1) * pitch + convolution.positions(1);
  return padded <= kUnitPixels && padded * channels <= kUnitElements &&
         convolution.input_size[0] * pixels >= kUnitPositions &&
         2 * pixels >= round_up(positions, cpu::MatrixUnit::kTile);
}

}  // namespace hfh::torch_ops
