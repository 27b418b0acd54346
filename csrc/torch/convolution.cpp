#include "torch/convolution.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "torch/gemm.h"
#include "torch/parallel.h"

// torch.ops.hfh.conv2d and its gradients on the CPU: products of the virtual weight with the
// patches of the images, of which a bounded number of rows exist at a time.

namespace hfh::torch_ops {

namespace {

// Patches, and products with them that must be moved to where they belong, held at once.
constexpr int64_t kBufferBytes = 3 << 20;
// Of the weight's gradient, where the patches do not fit the buffer all at once.
constexpr int64_t kGradientBytes = 1 << 20;

at::MemoryFormat format_like(const at::Tensor& images) {
  const bool channels_last =
      images.is_contiguous(at::MemoryFormat::ChannelsLast) && !images.is_contiguous();
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

/// Images that the matrix unit can read: a sum's gradient, say, is expanded.
at::Tensor dense_images(const at::Tensor& images) {
  return images.is_contiguous(at::MemoryFormat::ChannelsLast) ? images : images.contiguous();
}

/// A matrix in the calling thread's scratch.
template <Purpose purpose>
at::Tensor scratch_matrix(int64_t rows, int64_t cols, at::ScalarType dtype) {
  void* memory = Scratch<purpose>::get(rows * cols * element_size(dtype));
  return at::from_blob(memory, {rows, cols}, at::dtype(dtype));
}

/// Rows of two operands to hold at once; none is held of one that is a view.
int64_t rows_at_once(const PatchMatrix& a, const PatchMatrix& b, at::ScalarType dtype) {
  const int64_t cols = (a.view() ? 0 : a.cols()) + (b.view() ? 0 : b.cols());
  if (cols == 0) return std::max<int64_t>(1, a.rows());
  return std::clamp<int64_t>(kBufferBytes / (cols * element_size(dtype)), 1, a.rows());
}

/// Rows of the matrix: a view where it has one, else a copy.
template <Purpose purpose>
at::Tensor read_rows(const PatchMatrix& matrix, int64_t row, int64_t rows) {
  if (const auto view = matrix.view()) return view->narrow(0, row, rows);
  at::Tensor block = scratch_matrix<purpose>(rows, matrix.cols(), matrix.dtype());
  matrix.read(row, 0, block);
  return block;
}

/// output = patches V^T + bias
void product(const CheckedWeight& weight, const PatchMatrix& patches, const at::Tensor& bias,
             const PatchMatrix& output) {
  const int64_t step = rows_at_once(patches, output, output.dtype());
  for (int64_t row = 0; row < output.rows(); row += step) {
    const int64_t rows = std::min(step, output.rows() - row);
    const at::Tensor x = read_rows<Purpose::kPatches>(patches, row, rows);
    const auto view = output.view();
    at::Tensor y = view ? view->narrow(0, row, rows)
                        : scratch_matrix<Purpose::kPositions>(rows, output.cols(), output.dtype());
    multiply_forward(weight, x, bias, y);
    if (!view) output.write(row, 0, y);
  }
}

/// Adds to the patches' images, which must be zero, the gradient grad_output V of the patches.
void add_product_backward(const CheckedWeight& weight, const PatchMatrix& grad_output,
                          const PatchMatrix& grad_patches) {
  const auto dtype = grad_patches.dtype();
  const int64_t step = rows_at_once(grad_output, grad_patches, dtype);
  for (int64_t row = 0; row < grad_output.rows(); row += step) {
    const int64_t rows = std::min(step, grad_output.rows() - row);
    const at::Tensor grad_y = read_rows<Purpose::kPositions>(grad_output, row, rows);
    const auto view = grad_patches.view();
    at::Tensor grad_x = view ? view->narrow(0, row, rows)
                             : scratch_matrix<Purpose::kPatches>(rows, grad_patches.cols(), dtype);
    multiply_backward_input(weight, grad_y.to(dtype), grad_x);
    if (!view) grad_patches.add(row, grad_x);
  }
}

/// Adds the gradients behind that of one group's rows of the weight, grad_output^T patches.
void add_product_backward(const WeightSource& source, int64_t row, const PatchMatrix& grad_output,
                          const PatchMatrix& patches, WeightGradients& result) {
  const int64_t num_rows = patches.rows(), out = grad_output.cols();
  const CheckedWeight weight = source.part(row, 0, out, patches.cols());
  if (rows_at_once(grad_output, patches, patches.dtype()) >= num_rows) {
    return add_weight_backward(weight, read_rows<Purpose::kPositions>(grad_output, 0, num_rows),
                               read_rows<Purpose::kPatches>(patches, 0, num_rows), result);
  }
  // Summed over all positions first: what comes behind costs more than the product.
  const auto dtype = weight.compute_dtype();
  const int64_t cols_at_once =
      std::clamp<int64_t>(kGradientBytes / (out * element_size(dtype)), 1, patches.cols());
  const int64_t step =
      std::clamp<int64_t>(kBufferBytes / ((cols_at_once + out) * element_size(dtype)), 1, num_rows);
  const at::Tensor gradient = at::empty({out * cols_at_once}, at::dtype(dtype));
  for (int64_t col = 0; col < patches.cols(); col += cols_at_once) {
    const int64_t cols = std::min(cols_at_once, patches.cols() - col);
    const at::Tensor sum = gradient.narrow(0, 0, out * cols).view({out, cols}).zero_();
    for (int64_t first = 0; first < num_rows; first += step) {
      const int64_t rows = std::min(step, num_rows - first);
      const at::Tensor grad_y = read_rows<Purpose::kPositions>(grad_output, first, rows);
      const at::Tensor x = scratch_matrix<Purpose::kPatches>(rows, cols, patches.dtype());
      patches.read(first, col, x);
      if (dtype == patches.dtype()) {
        gemm(matrix_of(grad_y).transposed(), matrix_of(x), matrix_of(sum), true);
      } else {
        sum.add_(at::mm(grad_y.t(), x));
      }
    }
    add_weight_backward(source.part(row, col, out, cols), sum, result);
  }
}

void check_images(const at::Tensor& images, const char* name, const at::Tensor& pool) {
  check_cpu(images, name);
  check_activation_dtype(images, name, pool);
  TORCH_CHECK_VALUE(images.dim() == 4, name,
                    " must be [batch, channels, height, width], received shape ", images.sizes());
}

void check_grad_output(const at::Tensor& grad_output, const Convolution& convolution) {
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef(convolution.output_size()),
                    "grad_output must have shape ", at::IntArrayRef(convolution.output_size()),
                    ", received ", grad_output.sizes());
}

at::Tensor conv2d(const at::Tensor& input, const at::Tensor& pool, const at::Tensor& theta,
                  const std::optional<at::Tensor>& bias, int64_t out_channels,
                  HFH_GEOMETRY_PARAMETERS, HFH_WEIGHT_PARAMETERS) {
  check_images(input, "input", pool);
  const Convolution convolution(input.sizes(), out_channels, HFH_GEOMETRY_ARGUMENTS);
  const WeightSource source{pool, theta, {HFH_WEIGHT_ARGUMENTS}};
  const CheckedWeight whole = source.part(0, 0, out_channels, convolution.cols());
  const at::Tensor bias_tensor = bias.value_or(at::Tensor());
  if (bias_tensor.defined()) check_bias(bias_tensor, out_channels, input);
  at::Tensor output = at::empty(convolution.output_size(), input.options(), format_like(input));
  if (output.numel() == 0) return output;
  if (prefers_matrix_unit(convolution, input) &&
      matrix_unit_forward(convolution, whole, dense_images(input), bias_tensor, output)) {
    return output;
  }
  if (prefers_packed_product(convolution, input.scalar_type())) {
    packed_product(whole, false, convolution.patches(input, 0), bias_tensor,
                   convolution.pixels(output, 0));
    return output;
  }
  if (prefers_platform(convolution, input.scalar_type())) {
    platform_forward(convolution, source, input, bias_tensor, output);
    return output;
  }
  const int64_t rows = convolution.group_rows();
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row = group * rows;
    product(source.part(row, 0, rows, convolution.cols()), convolution.patches(input, group),
            bias_tensor.defined() ? bias_tensor.narrow(0, row, rows) : bias_tensor,
            convolution.pixels(output, group));
  }
  return output;
}

at::Tensor conv2d_backward_input(const at::Tensor& grad_output, const at::Tensor& pool,
                                 const at::Tensor& theta, at::IntArrayRef input_size,
                                 HFH_GEOMETRY_PARAMETERS, HFH_WEIGHT_PARAMETERS) {
  check_images(grad_output, "grad_output", pool);
  const Convolution convolution(input_size, grad_output.size(1), HFH_GEOMETRY_ARGUMENTS);
  check_grad_output(grad_output, convolution);
  const WeightSource source{pool, theta, {HFH_WEIGHT_ARGUMENTS}};
  const CheckedWeight whole = source.part(0, 0, convolution.out_channels, convolution.cols());
  at::Tensor grad_input = at::empty(input_size, grad_output.options(), format_like(grad_output));
  if (grad_input.numel() == 0) return grad_input;
  if (prefers_matrix_unit(convolution, grad_output) &&
      matrix_unit_backward_input(convolution, whole, dense_images(grad_output), grad_input)) {
    return grad_input;
  }
  if (prefers_packed_input_gradient(convolution, grad_output.scalar_type())) {
    packed_product(whole, true, convolution.grad_patches(grad_output), {},
                   convolution.input_pixels(grad_input));
    return grad_input;
  }
  if (prefers_platform(convolution, grad_output.scalar_type())) {
    platform_backward_input(convolution, source, grad_output, grad_input);
    return grad_input;
  }
  // Sums of overlapping patches are rounded to bfloat16 once, at the end.
  const bool is_bfloat16 = grad_input.scalar_type() == at::kBFloat16;
  const at::Tensor sum = is_bfloat16 ? at::zeros_like(grad_input, at::kFloat) : grad_input.zero_();
  const int64_t rows = convolution.group_rows();
  for (int64_t group = 0; group < groups; ++group) {
    add_product_backward(source.part(group * rows, 0, rows, convolution.cols()),
                         convolution.pixels(grad_output, group), convolution.patches(sum, group));
  }
  if (is_bfloat16) grad_input.copy_(sum);
  return grad_input;
}

std::tuple<at::Tensor, at::Tensor> conv2d_backward_weight(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& pool,
    const at::Tensor& theta, HFH_GEOMETRY_PARAMETERS, HFH_WEIGHT_PARAMETERS) {
  check_images(input, "input", pool);
  check_images(grad_output, "grad_output", pool);
  TORCH_CHECK_TYPE(grad_output.scalar_type() == input.scalar_type(),
                   "grad_output must have input's dtype ", input.scalar_type(), ", received ",
                   grad_output.scalar_type());
  const Convolution convolution(input.sizes(), grad_output.size(1), HFH_GEOMETRY_ARGUMENTS);
  check_grad_output(grad_output, convolution);
  const WeightSource source{pool, theta, {HFH_WEIGHT_ARGUMENTS}};
  const CheckedWeight whole = source.part(0, 0, convolution.out_channels, convolution.cols());
  if (input.numel() == 0) return {at::zeros_like(pool), at::zeros_like(theta)};
  WeightGradients gradients = zero_gradients(whole);
  const auto results = [&] {
    return std::tuple(gradients.pool.to(pool.scalar_type()),
                      whole.theta_gradient(gradients.theta, theta));
  };
  const bool tries_unit =
      prefers_matrix_unit(convolution, input) && prefers_matrix_unit(convolution, grad_output);
  if (tries_unit && add_matrix_unit_backward_weight(convolution, whole, dense_images(grad_output),
                                                    dense_images(input), gradients)) {
    return results();
  }
  if (tries_unit) gradients = zero_gradients(whole);
  if (prefers_packed_weight_gradient(convolution, input.scalar_type())) {
    add_packed_backward_weight(source, convolution.pixels(grad_output, 0),
                               convolution.patches(input, 0), gradients);
  } else if (prefers_platform(convolution, input.scalar_type())) {
    add_platform_backward_weight(convolution, source, grad_output, input, gradients);
  } else {
    for (int64_t group = 0; group < groups; ++group) {
      add_product_backward(source, group * convolution.group_rows(),
                           convolution.pixels(grad_output, group),
                           convolution.patches(input, group), gradients);
    }
  }
  return results();
}

TORCH_LIBRARY_IMPL(hfh, CPU, m) {
  m.impl("conv2d", TORCH_FN(conv2d));
  m.impl("conv2d_backward_input", TORCH_FN(conv2d_backward_input));
  m.impl("conv2d_backward_weight", TORCH_FN(conv2d_backward_weight));
}

}  // namespace

}  // namespace hfh::torch_ops
