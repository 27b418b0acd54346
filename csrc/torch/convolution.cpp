#include "torch/convolution.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>

#include "torch/gemm.h"
#include "torch/panels.h"
#include "torch/parallel.h"
#include "torch/patch_matrix.h"

// torch.ops.hfh.conv2d and its gradients on the CPU: products of the virtual weight with the
// patches of the images, of which a bounded number of rows exist at a time.

namespace hfh::torch_ops {

namespace {

// Patches, and products with them that must be moved to where they belong, held at once.
constexpr int64_t kBufferBytes = 3 << 20;
// Of the weight's gradient, where the patches do not fit the buffer all at once.
constexpr int64_t kGradientBytes = 1 << 20;

void check_at_least(at::IntArrayRef values, int64_t low, const char* name) {
  for (const int64_t value : values) {
    TORCH_CHECK_VALUE(value >= low, name, " must be at least ", low, ", received ", values);
  }
}

/// A convolution of images of one size, and its virtual weight's shape.
struct Convolution {
  std::array<int64_t, 4> input_size;
  int64_t out_channels, groups;
  std::array<int64_t, 2> kernel_size, stride, padding, dilation;

  Convolution(at::IntArrayRef size, int64_t out_channels, HFH_GEOMETRY_PARAMETERS)
      : out_channels(out_channels), groups(groups) {
    check_at_least(kernel_size, 1, "kernel_size");
    check_at_least(stride, 1, "stride");
    check_at_least(padding, 0, "padding");
    check_at_least(dilation, 1, "dilation");
    TORCH_CHECK_VALUE(groups >= 1, "groups must be at least 1, received ", groups);
    TORCH_CHECK_VALUE(size.size() == 4,
                      "input must be [batch, channels, height, width], received shape ", size);
    TORCH_CHECK_VALUE(size[1] >= 1 && size[2] >= 1 && size[3] >= 1,
                      "input must have channels, rows and columns, received shape ", size);
    TORCH_CHECK_VALUE(size[1] % groups == 0, "input must have a multiple of groups=", groups,
                      " channels, received shape ", size);
    TORCH_CHECK_VALUE(out_channels >= 1 && out_channels % groups == 0,
                      "out_channels must be a positive multiple of groups=", groups, ", received ",
                      out_channels);
    const auto copy = [](at::IntArrayRef from, auto& to) {
      std::copy_n(from.begin(), to.size(), to.begin());
    };
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

  /// Size of the output in one dimension.
  int64_t positions(int dim) const {
    const int64_t reach = dilation[dim] * (kernel_size[dim] - 1) + 1;
    const int64_t room = input_size[dim + 2] + 2 * padding[dim] - reach;
    return room < 0 ? 0 : room / stride[dim] + 1;
  }
  std::array<int64_t, 4> output_size() const {
    return {input_size[0], out_channels, positions(0), positions(1)};
  }
  int64_t group_rows() const { return out_channels / groups; }
  int64_t group_channels() const { return input_size[1] / groups; }
  int64_t cols() const { return group_channels() * kernel_size[0] * kernel_size[1]; }

  /// Patches of one group's channels of images like the input.
  PatchMatrix patches(const at::Tensor& images, int64_t group) const {
    const auto axis = [&](int dim) {
      return cpu::Axis{input_size[dim + 2], images.stride(dim + 2), kernel_size[dim], stride[dim],
                       padding[dim],        dilation[dim],          positions(dim)};
    };
    const cpu::Patches patches{input_size[0],    images.stride(0), group_channels(),
                               images.stride(1), axis(0),          axis(1)};
    return {images, patches, group * group_channels()};
  }
  /// Pixels of one group's channels of images like the output.
  PatchMatrix pixels(const at::Tensor& images, int64_t group) const {
    const auto axis = [&](int dim) {
      return cpu::Axis{positions(dim), images.stride(dim + 2), 1, 1, 0, 1, positions(dim)};
    };
    const cpu::Patches patches{input_size[0],    images.stride(0), group_rows(),
                               images.stride(1), axis(0),          axis(1)};
    return {images, patches, group * group_rows()};
  }
};

/// The arguments of the part of a virtual weight from (row, col) on.
WeightArguments part_of(WeightArguments weight, int64_t row, int64_t col) {
  weight.row_offset += row;
  weight.col_offset += col;
  return weight;
}

at::MemoryFormat format_like(const at::Tensor& images) {
  const bool channels_last =
      images.is_contiguous(at::MemoryFormat::ChannelsLast) && !images.is_contiguous();
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
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
    if (!view) output.write(row, y);
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

void add_to(WeightGradients& sum, const WeightGradients& part) {
  sum.pool.add_(part.pool);
  for (size_t i = 0; i < sum.theta.size(); ++i) sum.theta[i] += part.theta[i];
}

/// The gradients behind that of one group's weight, grad_output^T patches.
WeightGradients product_backward(const at::Tensor& pool, const at::Tensor& theta,
                                 const WeightArguments& args, const PatchMatrix& grad_output,
                                 const PatchMatrix& patches) {
  const int64_t num_rows = patches.rows(), out = grad_output.cols();
  if (rows_at_once(grad_output, patches, patches.dtype()) >= num_rows) {
    const CheckedWeight weight(pool, theta, out, patches.cols(), args);
    return weight_backward(weight, read_rows<Purpose::kPositions>(grad_output, 0, num_rows),
                           read_rows<Purpose::kPatches>(patches, 0, num_rows));
  }
  // Summed over all rows first, columns by columns: what follows costs more than the product.
  const CheckedWeight whole(pool, theta, out, patches.cols(), args);
  const auto dtype = whole.compute_dtype();
  WeightGradients result{at::zeros({pool.numel()}, at::dtype(dtype)),
                         std::vector<double>(whole.theta_size(), 0.0)};
  const int64_t cols_at_once =
      std::clamp<int64_t>(kGradientBytes / (out * element_size(dtype)), 1, patches.cols());
  const int64_t step =
      std::clamp<int64_t>(kBufferBytes / ((cols_at_once + out) * element_size(dtype)), 1, num_rows);
  at::Tensor gradient = at::empty({out * cols_at_once}, at::dtype(dtype));
  for (int64_t col = 0; col < patches.cols(); col += cols_at_once) {
    const int64_t cols = std::min(cols_at_once, patches.cols() - col);
    at::Tensor sum = gradient.narrow(0, 0, out * cols).view({out, cols}).zero_();
    for (int64_t row = 0; row < num_rows; row += step) {
      const int64_t rows = std::min(step, num_rows - row);
      const at::Tensor grad_y = read_rows<Purpose::kPositions>(grad_output, row, rows);
      at::Tensor x = scratch_matrix<Purpose::kPatches>(rows, cols, patches.dtype());
      patches.read(row, col, x);
      if (dtype == patches.dtype()) {
        gemm(matrix_of(grad_y).transposed(), matrix_of(x), matrix_of(sum), true);
      } else {
        sum.add_(at::mm(grad_y.t(), x));
      }
    }
    const CheckedWeight part(pool, theta, out, cols, part_of(args, 0, col));
    add_to(result, weight_backward(part, sum));
  }
  return result;
}

void check_images(const at::Tensor& images, const char* name, const at::Tensor& pool) {
  check_cpu(images, name);
  check_activation_dtype(images, name, pool);
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
  const WeightArguments args{HFH_WEIGHT_ARGUMENTS};
  const CheckedWeight whole(pool, theta, out_channels, convolution.cols(), args);
  const at::Tensor bias_tensor = bias.value_or(at::Tensor());
  if (bias_tensor.defined()) check_bias(bias_tensor, out_channels, input);
  at::Tensor output = at::empty(convolution.output_size(), input.options(), format_like(input));
  if (output.numel() == 0) return output;
  const int64_t rows = convolution.group_rows();
  for (int64_t group = 0; group < groups; ++group) {
    const CheckedWeight weight(pool, theta, rows, convolution.cols(),
                               part_of(args, group * rows, 0));
    product(weight, convolution.patches(input, group),
            bias_tensor.defined() ? bias_tensor.narrow(0, group * rows, rows) : bias_tensor,
            convolution.pixels(output, group));
  }
  return output;
}

at::Tensor conv2d_backward_input(const at::Tensor& grad_output, const at::Tensor& pool,
                                 const at::Tensor& theta, at::IntArrayRef input_size,
                                 HFH_GEOMETRY_PARAMETERS, HFH_WEIGHT_PARAMETERS) {
  check_images(grad_output, "grad_output", pool);
  TORCH_CHECK_VALUE(grad_output.dim() == 4, "grad_output must be 4-d, received shape ",
                    grad_output.sizes());
  const Convolution convolution(input_size, grad_output.size(1), HFH_GEOMETRY_ARGUMENTS);
  check_grad_output(grad_output, convolution);
  const WeightArguments args{HFH_WEIGHT_ARGUMENTS};
  const CheckedWeight whole(pool, theta, grad_output.size(1), convolution.cols(), args);
  at::Tensor grad_input = at::empty(input_size, grad_output.options(), format_like(grad_output));
  // Sums of overlapping patches are rounded to bfloat16 once, at the end.
  at::Tensor sum = grad_input;
  if (grad_input.scalar_type() == at::kBFloat16) {
    sum = at::empty_like(grad_input, grad_input.options().dtype(at::kFloat));
  }
  sum.zero_();
  if (sum.numel() == 0) return grad_input;
  const int64_t rows = convolution.group_rows();
  for (int64_t group = 0; group < groups; ++group) {
    const CheckedWeight weight(pool, theta, rows, convolution.cols(),
                               part_of(args, group * rows, 0));
    add_product_backward(weight, convolution.pixels(grad_output, group),
                         convolution.patches(sum, group));
  }
  if (!sum.is_same(grad_input)) grad_input.copy_(sum);
  return grad_input;
}

std::tuple<at::Tensor, at::Tensor> conv2d_backward_weight(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& pool,
    const at::Tensor& theta, HFH_GEOMETRY_PARAMETERS, HFH_WEIGHT_PARAMETERS) {
  check_images(input, "input", pool);
  check_cpu(grad_output, "grad_output");
  TORCH_CHECK_TYPE(grad_output.scalar_type() == input.scalar_type(),
                   "grad_output must have input's dtype ", input.scalar_type(), ", received ",
                   grad_output.scalar_type());
  TORCH_CHECK_VALUE(grad_output.dim() == 4, "grad_output must be 4-d, received shape ",
                    grad_output.sizes());
  const Convolution convolution(input.sizes(), grad_output.size(1), HFH_GEOMETRY_ARGUMENTS);
  check_grad_output(grad_output, convolution);
  const WeightArguments args{HFH_WEIGHT_ARGUMENTS};
  const CheckedWeight whole(pool, theta, grad_output.size(1), convolution.cols(), args);
  if (input.numel() == 0) return {at::zeros_like(pool), at::zeros_like(theta)};
  const int64_t rows = convolution.group_rows();
  const auto of_group = [&](int64_t group) {
    return product_backward(pool, theta, part_of(args, group * rows, 0),
                            convolution.pixels(grad_output, group),
                            convolution.patches(input, group));
  };
  WeightGradients result = of_group(0);
  for (int64_t group = 1; group < groups; ++group) add_to(result, of_group(group));
  return {result.pool.to(pool.scalar_type()), whole.theta_gradient(result.theta, theta)};
}

TORCH_LIBRARY_IMPL(hfh, CPU, m) {
  m.impl("conv2d", TORCH_FN(conv2d));
  m.impl("conv2d_backward_input", TORCH_FN(conv2d_backward_input));
  m.impl("conv2d_backward_weight", TORCH_FN(conv2d_backward_weight));
}

}  // namespace

}  // namespace hfh::torch_ops
