#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <algorithm>

#include "torch/convolution.h"
#include "torch/parallel.h"

namespace hfh::torch_ops {

namespace {

// Of weights, and of images and their results, that one call of the platform's convolution gets;
// it may hold copies of them in layouts of its own.
constexpr int64_t kWeightBytes = 1 << 19;
constexpr int64_t kImageBytes = 1 << 21;
// Beyond these positions of all images, making large weights costs little beside applying them.
constexpr int64_t kManyPositions = 1024;
// Rows of one group that are worth a call of their own.
constexpr int64_t kRowsTogether = 16;

/// How much one call takes: some groups, or some rows of one, and some images.
struct Portion {
  int64_t groups, rows, images;

  Portion(const Convolution& convolution, at::ScalarType dtype) {
    const auto& input = convolution.input_size;
    const auto output = convolution.output_size();
    const int64_t element = element_size(dtype);
    const int64_t weight_row = convolution.cols() * element;
    const int64_t output_row = output[2] * output[3] * element;
    const int64_t input_bytes = convolution.group_channels() * input[2] * input[3] * element;
    rows = std::min((kImageBytes - input_bytes) / output_row, kWeightBytes / weight_row);
    if (rows >= convolution.group_rows()) {
      rows = convolution.group_rows();
      groups = std::clamp<int64_t>(std::min(kImageBytes / (input_bytes + rows * output_row),
                                            kWeightBytes / (rows * weight_row)),
                                   1, convolution.groups);
    } else {
      rows = rows / kRowsTogether * kRowsTogether;
      groups = 1;
    }
    images = std::clamp<int64_t>(kImageBytes / (groups * (input_bytes + rows * output_row)), 1,
                                 std::max<int64_t>(1, input[0]));
  }
};

/// What one call takes of the channels, and the rows of the virtual weight behind it.
class Part {
 public:
  Part(const Convolution& convolution, int64_t row, int64_t rows, int64_t groups)
      : convolution_(convolution), row_(row), rows_(rows), groups_(groups) {}

  int64_t rows() const { return rows_; }
  int64_t groups() const { return groups_; }
  /// Whether an earlier part has the same channels of the input.
  bool adds_to_input() const { return row_ % convolution_.group_rows() != 0; }

  at::Tensor inputs(const at::Tensor& images, int64_t image, int64_t count) const {
    const int64_t channels = convolution_.group_channels();
    return images.narrow(0, image, count)
        .narrow(1, row_ / convolution_.group_rows() * channels, groups_ * channels);
  }
  at::Tensor outputs(const at::Tensor& images, int64_t image, int64_t count) const {
    return images.narrow(0, image, count).narrow(1, row_, rows_);
  }
  std::optional<at::Tensor> bias(const at::Tensor& bias) const {
    return bias.defined() ? std::optional(bias.narrow(0, row_, rows_)) : std::nullopt;
  }
  CheckedWeight weight(const WeightSource& source) const {
    return source.part(row_, 0, rows_, convolution_.cols());
  }
  std::array<int64_t, 4> weight_size() const {
    return {rows_, convolution_.group_channels(), convolution_.kernel_size[0],
            convolution_.kernel_size[1]};
  }
  /// The weight as the platform takes it.
  at::Tensor dense_weight(const WeightSource& source, at::ScalarType dtype) const {
    at::Tensor matrix = at::empty({rows_, convolution_.cols()}, at::dtype(dtype));
    write_weight(weight(source), matrix);
    return matrix.view(weight_size());
  }

 private:
  const Convolution& convolution_;
  int64_t row_, rows_, groups_;
};

template <class F>
void for_each_part(const Convolution& convolution, const Portion& portion, const F& f) {
  const int64_t group_rows = convolution.group_rows();
  for (int64_t group = 0; group < convolution.groups; group += portion.groups) {
    const int64_t groups = std::min(portion.groups, convolution.groups - group);
    const int64_t end = (group + groups) * group_rows, step = groups * portion.rows;
    for (int64_t row = group * group_rows; row < end; row += step) {
      f(Part(convolution, row, std::min(step, end - row), groups));
    }
  }
}

template <class F>
void for_each_stretch(const Convolution& convolution, const Portion& portion, const F& f) {
  const int64_t num_images = convolution.input_size[0];
  for (int64_t image = 0; image < num_images; image += portion.images) {
    f(image, std::min(portion.images, num_images - image));
  }
}

}  // namespace

bool prefers_platform(const Convolution& convolution, at::ScalarType dtype) {
  // Elsewhere the platform unfolds images whole.
  if (dtype == at::kDouble || !at::hasMKLDNN() || !at::globalContext().userEnabledMkldnn() ||
      Portion(convolution, dtype).rows <= 0) {
    return false;
  }
  if (convolution.groups > 1) return true;
  const auto output = convolution.output_size();
  return dtype == at::kFloat &&
         (convolution.out_channels * convolution.cols() * element_size(dtype) <= kWeightBytes ||
          output[0] * output[2] * output[3] >= kManyPositions);
}

void platform_forward(const Convolution& convolution, const WeightSource& source,
                      const at::Tensor& input, const at::Tensor& bias, at::Tensor& output) {
  const auto dtype = input.scalar_type();
  const Portion portion(convolution, dtype);
  for_each_part(convolution, portion, [&](const Part& part) {
    const at::Tensor weight = part.dense_weight(source, dtype);
    for_each_stretch(convolution, portion, [&](int64_t image, int64_t count) {
      part.outputs(output, image, count)
          .copy_(at::convolution(part.inputs(input, image, count), weight, part.bias(bias),
                                 convolution.stride, convolution.padding, convolution.dilation,
                                 false, {0, 0}, part.groups()));
    });
  });
}

void platform_backward_input(const Convolution& convolution, const WeightSource& source,
                             const at::Tensor& grad_output, at::Tensor& grad_input) {
  const auto dtype = grad_output.scalar_type();
  const Portion portion(convolution, dtype);
  for_each_part(convolution, portion, [&](const Part& part) {
    const at::Tensor weight = part.dense_weight(source, dtype);
    for_each_stretch(convolution, portion, [&](int64_t image, int64_t count) {
      at::Tensor target = part.inputs(grad_input, image, count);
      // Of the input only the size matters.
      const at::Tensor gradient = std::get<0>(at::convolution_backward(
          part.outputs(grad_output, image, count), target, weight, std::nullopt, convolution.stride,
          convolution.padding, convolution.dilation, false, {0, 0}, part.groups(),
          {true, false, false}));
      if (part.adds_to_input()) {
        target.add_(gradient);
      } else {
        target.copy_(gradient);
      }
    });
  });
}

void add_platform_backward_weight(const Convolution& convolution, const WeightSource& source,
                                  const at::Tensor& grad_output, const at::Tensor& input,
                                  WeightGradients& result) {
  const auto dtype = input.scalar_type();
  const Portion portion(convolution, dtype);
  for_each_part(convolution, portion, [&](const Part& part) {
    const at::Tensor sum = at::zeros({part.rows(), convolution.cols()}, at::kFloat);
    // Of the weight, too, only the size matters.
    const at::Tensor weight = at::empty({1}, at::dtype(dtype)).expand(part.weight_size());
    for_each_stretch(convolution, portion, [&](int64_t image, int64_t count) {
      const at::Tensor gradient = std::get<1>(at::convolution_backward(
          part.outputs(grad_output, image, count), part.inputs(input, image, count), weight,
          std::nullopt, convolution.stride, convolution.padding, convolution.dilation, false,
          {0, 0}, part.groups(), {false, true, false}));
      sum.add_(gradient.reshape(sum.sizes()));
    });
    add_weight_backward(part.weight(source), sum, result);
  });
}

}  // namespace hfh::torch_ops
