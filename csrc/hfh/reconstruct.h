#pragma once

#include "hfh/config.h"
#include "hfh/params.h"

// The reconstruction network g and its gradient: the one C++ text of DESIGN section 3. `V` is a
// scalar or a vector of weights; `splat`, `relu`, `tanh_lanes` and `zero_where_not_positive` for
// it must be declared before this header is included.

HFH_NAMESPACE_BEGIN

/// g with its shape known at compile time: loops unroll and parameters stay in registers.
template <int kHashes, int kDepth, int kWidth, Activation kActivation>
struct FixedShape {
  static constexpr int kHashesBound = kHashes;
  static constexpr int kWidthBound = kWidth;
  HFH_HOST_DEVICE explicit FixedShape(const VirtualWeight&) {}
  HFH_HOST_DEVICE static constexpr int num_hashes() { return kHashes; }
  HFH_HOST_DEVICE static constexpr int depth() { return kDepth; }
  HFH_HOST_DEVICE static constexpr int width() { return kWidth; }
  HFH_HOST_DEVICE static constexpr Activation activation() { return kActivation; }
};

/// g of any shape.
struct AnyShape {
  static constexpr int kHashesBound = kMaxHashes;
  static constexpr int kWidthBound = kMaxWidth;
  explicit AnyShape(const VirtualWeight& weight)
      : num_hashes_(weight.hash.num_hashes), reconstruct_(weight.reconstruct) {}
  int num_hashes() const { return num_hashes_; }
  int depth() const { return reconstruct_.depth; }
  int width() const { return reconstruct_.width; }
  Activation activation() const { return reconstruct_.activation; }

 private:
  int num_hashes_;
  ReconstructParams reconstruct_;
};

/// Number of weights in g's first layer; the sign of hash u may be folded into column u of it.
template <class Shape>
HFH_HOST_DEVICE constexpr int first_layer_size(const Shape& shape) {
  return shape.depth() == 1 ? shape.num_hashes() : shape.num_hashes() * shape.width();
}

template <class Shape>
HFH_HOST_DEVICE constexpr int theta_size_of(const Shape& shape) {
  return theta_size(shape.num_hashes(), shape.depth(), shape.width());
}

template <class V, class Shape>
HFH_HOST_DEVICE void activate(const Shape& shape, V* x) {
  if (shape.activation() == Activation::kReLU) {
    for (int j = 0; j < shape.width(); ++j) x[j] = relu(x[j]);
  } else {
    for (int j = 0; j < shape.width(); ++j) x[j] = tanh_lanes(x[j]);
  }
}

/// Gradient through the activation whose output was `y`, in place.
template <class V, class Shape>
HFH_HOST_DEVICE void activate_backward(const Shape& shape, const V* y, V* gradient) {
  if (shape.activation() == Activation::kReLU) {
    for (int j = 0; j < shape.width(); ++j)
      gradient[j] = zero_where_not_positive(y[j], gradient[j]);
  } else {
    for (int j = 0; j < shape.width(); ++j) gradient[j] -= gradient[j] * y[j] * y[j];
  }
}

/// out[j] = bias[j] + sum_i weight(j * inputs + i) * in[i]
template <class V, class Weight, class T>
HFH_HOST_DEVICE void affine(int outputs, int inputs, const Weight& weight, const T* bias,
                            const V* in, V* out) {
  for (int j = 0; j < outputs; ++j) out[j] = splat<V>(bias[j]);
  // Input by input: one input is live at a time, and the sums are independent of each other.
  for (int i = 0; i < inputs; ++i) {
    for (int j = 0; j < outputs; ++j) out[j] += weight(j * inputs + i) * in[i];
  }
}

/// Gradient of `affine`: adds to that of weight and bias, and writes that of the input.
template <class V, class T>
HFH_HOST_DEVICE void affine_backward(int outputs, int inputs, const T* weight, const V* in,
                                     const V* grad_out, V* grad_weight, V* grad_bias, V* grad_in) {
  for (int j = 0; j < outputs; ++j) {
    grad_bias[j] += grad_out[j];
    for (int i = 0; i < inputs; ++i) {
      grad_weight[j * inputs + i] += grad_out[j] * in[i];
      const V product = weight[j * inputs + i] * grad_out[j];
      grad_in[i] = j == 0 ? product : grad_in[i] + product;
    }
  }
}

/// What the last layer of g takes in, for a depth of 2 or more; returns that layer's parameters.
/// `first(i)` is weight i of the first layer, which the caller may have signed; `theta` is the
/// whole parameter vector.
template <class V, class Shape, class First, class T>
HFH_HOST_DEVICE const T* hidden_layers(const Shape& shape, const First& first, const T* theta,
                                       const V* a, V* hidden) {
  const int inputs = shape.num_hashes(), width = shape.width();
  const T* layer = theta + inputs * width;
  affine(width, inputs, first, layer, a, hidden);
  layer += width;
  activate(shape, hidden);
  if (shape.depth() == 3) {
    V next[Shape::kWidthBound];
    affine(width, width, [layer](int i) { return layer[i]; }, layer + width * width, hidden, next);
    layer += width * width + width;
    activate(shape, next);
    for (int j = 0; j < width; ++j) hidden[j] = next[j];
  }
  return layer;
}

/// V = g(a), with `first` and `theta` as in `hidden_layers`.
template <class V, class Shape, class First, class T>
HFH_HOST_DEVICE V reconstruct(const Shape& shape, const First& first, const T* theta, const V* a) {
  if (shape.depth() == 1) {
    V sum = first(0) * a[0];
    for (int u = 1; u < shape.num_hashes(); ++u) sum += first(u) * a[u];
    return sum;
  }
  V hidden[Shape::kWidthBound];
  const T* last = hidden_layers(shape, first, theta, a, hidden);
  V value;
  affine(1, shape.width(), [last](int i) { return last[i]; }, last + shape.width(), hidden, &value);
  return value;
}

/// Given the gradient of V, adds to that of theta and writes that of a (the signed elements).
template <class V, class Shape, class T>
HFH_HOST_DEVICE void reconstruct_backward(const Shape& shape, const T* theta, const V* a,
                                          V gradient, V* grad_theta, V* grad_a) {
  const int inputs = shape.num_hashes(), width = shape.width();
  if (shape.depth() == 1) {
    for (int u = 0; u < inputs; ++u) {
      grad_theta[u] += gradient * a[u];
      grad_a[u] = theta[u] * gradient;
    }
    return;
  }
  V hidden[Shape::kWidthBound], grad_hidden[Shape::kWidthBound];
  const int bias = inputs * width;
  affine(width, inputs, [theta](int i) { return theta[i]; }, theta + bias, a, hidden);
  activate(shape, hidden);
  int layer = bias + width;
  if (shape.depth() == 2) {
    affine_backward(1, width, theta + layer, hidden, &gradient, grad_theta + layer,
                    grad_theta + layer + width, grad_hidden);
  } else {
    const int middle = layer, middle_bias = middle + width * width;
    layer = middle_bias + width;
    V next[Shape::kWidthBound], grad_next[Shape::kWidthBound];
    affine(
        width, width, [theta, middle](int i) { return theta[middle + i]; }, theta + middle_bias,
        hidden, next);
    activate(shape, next);
    affine_backward(1, width, theta + layer, next, &gradient, grad_theta + layer,
                    grad_theta + layer + width, grad_next);
    activate_backward(shape, next, grad_next);
    affine_backward(width, width, theta + middle, hidden, grad_next, grad_theta + middle,
                    grad_theta + middle_bias, grad_hidden);
  }
  activate_backward(shape, hidden, grad_hidden);
  affine_backward(width, inputs, theta, a, grad_hidden, grad_theta, grad_theta + bias, grad_a);
}

HFH_NAMESPACE_END
