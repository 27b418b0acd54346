#include <ATen/ATen.h>

#include <algorithm>

#include "torch/convolution.h"

namespace hfh::torch_ops {

namespace {

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

CheckedWeight WeightSource::part(int64_t row, int64_t col, int64_t rows, int64_t cols) const {
  WeightArguments shifted = arguments;
  shifted.row_offset += row;
  shifted.col_offset += col;
  return {pool, theta, rows, cols, shifted};
}

}  // namespace hfh::torch_ops
