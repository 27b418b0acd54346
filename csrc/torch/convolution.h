#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "torch/panels.h"
#include "torch/patch_matrix.h"

namespace hfh::torch_ops {

/// How a kernel moves over an image, in the order of the schemas in hfh_kernels/ops/conv2d.
#define HFH_GEOMETRY_PARAMETERS                                                 \
  at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, \
      at::IntArrayRef dilation, int64_t groups
#define HFH_GEOMETRY_ARGUMENTS kernel_size, stride, padding, dilation, groups

/// A convolution of images of one size, checked, and its virtual weight's shape.
struct Convolution {
  std::array<int64_t, 4> input_size;
  int64_t out_channels, groups;
  std::array<int64_t, 2> kernel_size, stride, padding, dilation;

  Convolution(at::IntArrayRef size, int64_t out_channels, HFH_GEOMETRY_PARAMETERS);

  /// Size of the output in one dimension.
  int64_t positions(int dim) const;
  std::array<int64_t, 4> output_size() const {
    return {input_size[0], out_channels, positions(0), positions(1)};
  }
  int64_t group_rows() const { return out_channels / groups; }
  int64_t group_channels() const { return input_size[1] / groups; }
  int64_t cols() const { return group_channels() * kernel_size[0] * kernel_size[1]; }

  /// Patches of one group's channels of images like the input.
  PatchMatrix patches(const at::Tensor& images, int64_t group) const;
  /// Pixels of one group's channels of images like the output.
  PatchMatrix pixels(const at::Tensor& images, int64_t group) const;

  // For the gradient of the input, of one group and of stride 1:
  /// Pixels of images like the input.
  PatchMatrix input_pixels(const at::Tensor& images) const;
  /// For each of them the positions that see it, of images like the output: patches as well.
  PatchMatrix grad_patches(const at::Tensor& images) const;
};

/// The parameters behind a virtual weight, of which each group of a convolution takes some rows.
struct WeightSource {
  const at::Tensor &pool, &theta;
  WeightArguments arguments;

  /// `rows` x `cols` of the weight from (row, col) on.
  CheckedWeight part(int64_t row, int64_t col, int64_t rows, int64_t cols) const;
};

/// Whether a convolution of such images, or its gradients, belong on the matrix unit.
bool prefers_matrix_unit(const Convolution& convolution, const at::Tensor& images);

/// Each returns whether it is done: it is not where something is not finite.
bool matrix_unit_forward(const Convolution& convolution, const CheckedWeight& weight,
                         const at::Tensor& input, const at::Tensor& bias, at::Tensor& output);
bool matrix_unit_backward_input(const Convolution& convolution, const CheckedWeight& weight,
                                const at::Tensor& grad_output, at::Tensor& grad_input);
/// Where this is not done, the sum is of no use.
bool add_matrix_unit_backward_weight(const Convolution& convolution, const CheckedWeight& weight,
                                     const at::Tensor& grad_output, const at::Tensor& input,
                                     WeightGradients& sum);

/// Whether packed products, on vector units, are the fastest way.
bool prefers_packed_product(const Convolution& convolution, at::ScalarType dtype);
bool prefers_packed_input_gradient(const Convolution& convolution, at::ScalarType dtype);
bool prefers_packed_weight_gradient(const Convolution& convolution, at::ScalarType dtype);

/// target = patches V^T + bias or, with V transposed, patches V.
void packed_product(const CheckedWeight& weight, bool is_transposed, const PatchMatrix& patches,
                    const at::Tensor& bias, const PatchMatrix& target);
/// Adds the gradients behind the weight's, grad_output^T patches.
void add_packed_backward_weight(const WeightSource& weight, const PatchMatrix& grad_output,
                                const PatchMatrix& patches, WeightGradients& sum);

/// Whether the platform's own convolution, given a bounded part of the weight and of the images at
/// a time, is faster than products with patches: for groups, small weights and many positions.
bool prefers_platform(const Convolution& convolution, at::ScalarType dtype);

void platform_forward(const Convolution& convolution, const WeightSource& weight,
                      const at::Tensor& input, const at::Tensor& bias, at::Tensor& output);
void platform_backward_input(const Convolution& convolution, const WeightSource& weight,
                             const at::Tensor& grad_output, at::Tensor& grad_input);
void add_platform_backward_weight(const Convolution& convolution, const WeightSource& weight,
                                  const at::Tensor& grad_output, const at::Tensor& input,
                                  WeightGradients& sum);

}  // namespace hfh::torch_ops
