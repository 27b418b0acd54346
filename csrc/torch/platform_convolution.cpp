#include <ATen/ATen.h>

#include <algorithm>

#include "torch/convolution.h"
#include "torch/parallel.h"

namespace hfh::torch_ops {

namespace {

// Of weights, and of images and their results, that one call of the platform's convolution gets;
// it may hold copies of them in layouts of its own.
constexpr int64_t kWeightBytes = 1 << 19;
constexpr int64_t kImageBytes = 1 << 20;

struct GroupBytes {
  int64_t weight, image;

  GroupBytes(const Convolution& convolution, at::ScalarType dtype) {
    const auto& input = convolution.input_size;
    const auto output = convolution.output_size();
    weight = convolution.group_rows() * convolution.cols() * element_size(dtype);
    image = (convolution.group_channels() * input[2] * input[3] +
             convolution.group_rows() * output[2] * output[3]) *
            element_size(dtype);
  }
};

/// What one call takes: some groups' weights, and some images' channels of those groups.
class Part {
 public:
  Part(const Convolution& convolution, int64_t group, int64_t num_groups)
      : convolution_(convolution), group_(group), num_groups_(num_groups) {}

  int64_t rows() const { return num_groups_ * convolution_.group_rows(); }
  int64_t groups() const { return num_groups_; }
  at::Tensor inputs(const at::Tensor& images, int64_t image, int64_t count) const {
    return channels(images, convolution_.group_channels(), image, count);
  }
  at::Tensor outputs(const at::Tensor& images, int64_t image, int64_t count) const {
    return channels(images, convolution_.group_rows(), image, count);
  }
  CheckedWeight weight(const WeightSource& source) const {
    return source.part(group_ * convolution_.group_rows(), 0, rows(), convolution_.cols());
  }
  /// The weight as the platform takes it.
  at::Tensor dense_weight(const WeightSource& source, at::ScalarType dtype) const {
    at::Tensor matrix = at::empty({rows(), convolution_.cols()}, at::dtype(dtype));
    write_weight(weight(source), matrix);
    return matrix.view(weight_size());
  }
  std::array<int64_t, 4> weight_size() const {
    return {rows(), convolution_.group_channels(), convolution_.kernel_size[0],
            convolution_.kernel_size[1]};
  }
  at::Tensor bias(const at::Tensor& bias) const {
    return bias.defined() ? bias.narrow(0, group_ * convolution_.group_rows(), rows()) : bias;
  }

 private:
  at::Tensor channels(const at::Tensor& images, int64_t of_group, int64_t image,
                      int64_t count) const {
    return images.narrow(0, image, count).narrow(1, group_ * of_group, num_groups_ * of_group);
  }

  const Convolution& convolution_;
  int64_t group_, num_groups_;
};

/// Calls `begin(part)` for each part of the groups, and `f(part, image, count)` that it returns
/// for stretches of the images.
template <class Begin>
void for_each_part(const Convolution& convolution, at::ScalarType dtype, const Begin& begin) {
  const GroupBytes bytes(convolution, dtype);
  const int64_t num_images = convolution.input_size[0];
  const int64_t groups_at_once = std::clamp<int64_t>(
      std::min(kWeightBytes / bytes.weight, kImageBytes / bytes.image), 1, convolution.groups);
  const int64_t images_at_once =
      std::clamp<int64_t>(kImageBytes / (groups_at_once * bytes.image), 1, num_images);
  for (int64_t group = 0; group < convolution.groups; group += groups_at_once) {
    const Part part(convolution, group, std::min(groups_at_once, convolution.groups - group));
    const auto f = begin(part);
    for (int64_t image = 0; image < num_images; image += images_at_once) {
      f(image, std::min(images_at_once, num_images - image));
    }
  }
}

}  // namespace

bool fits_platform(const Convolution& convolution, at::ScalarType dtype) {
  const GroupBytes bytes(convolution, dtype);
  // The platform unfolds float64 images whole.
  return convolution.groups > 1 && dtype != at::kDouble && bytes.weight <= kWeightBytes &&
         bytes.image <= kImageBytes;
}

void platform_forward(const Convolution& convolution, const WeightSource& source,
                      const at::Tensor& input, const at::Tensor& bias, at::Tensor& output) {
  const auto dtype = input.scalar_type();
  for_each_part(convolution, dtype, [&](const Part& part) {
    const at::Tensor weight = part.dense_weight(source, dtype);
    const auto bias_part = bias.defined() ? std::optional(part.bias(bias)) : std::nullopt;
    return [&, weight, bias_part](int64_t image, int64_t count) {
      part.outputs(output, image, count)
          .copy_(at::convolution(part.inputs(input, image, count), weight, bias_part,
                                 convolution.stride, convolution.padding, convolution.dilation,
                                 false, {0, 0}, part.groups()));
    };
  });
}

void platform_backward_input(const Convolution& convolution, const WeightSource& source,
                             const at::Tensor& grad_output, at::Tensor& grad_input) {
  const auto dtype = grad_output.scalar_type();
  for_each_part(convolution, dtype, [&](const Part& part) {
    const at::Tensor weight = part.dense_weight(source, dtype);
    return [&, weight](int64_t image, int64_t count) {
      const at::Tensor target = part.inputs(grad_input, image, count);
      // Of the input only the size matters.
      target.copy_(std::get<0>(at::convolution_backward(
          part.outputs(grad_output, image, count), target, weight, std::nullopt, convolution.stride,
          convolution.padding, convolution.dilation, false, {0, 0}, part.groups(),
          {true, false, false})));
    };
  });
}

WeightGradients platform_backward_weight(const Convolution& convolution, const WeightSource& source,
                                         const at::Tensor& grad_output, const at::Tensor& input) {
  const auto dtype = input.scalar_type();
  WeightGradients result = zero_gradients(source.part(0, 0, 0, 0));
  for_each_part(convolution, dtype, [&](const Part& part) {
    const at::Tensor sum = at::zeros({part.rows(), convolution.cols()}, at::kFloat);
    // Of the weight, too, only the size matters.
    const at::Tensor weight = at::empty({1}, at::dtype(dtype)).expand(part.weight_size());
    return [&, sum, weight](int64_t image, int64_t count) {
      const at::Tensor gradient = std::get<1>(at::convolution_backward(
          part.outputs(grad_output, image, count), part.inputs(input, image, count), weight,
          std::nullopt, convolution.stride, convolution.padding, convolution.dilation, false,
          {0, 0}, part.groups(), {false, true, false}));
      sum.add_(gradient.reshape(sum.sizes()));
      if (image + count == convolution.input_size[0]) {
        add_to(result, weight_backward(part.weight(source), sum));
      }
    };
  });
  return result;
}

}  // namespace hfh::torch_ops
