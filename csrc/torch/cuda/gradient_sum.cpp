#include "torch/cuda/gradient_sum.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <bit>
#include <cmath>

namespace hfh::torch_ops {

GradientSum::GradientSum(const at::Tensor& like, int64_t num_terms,
                         const std::function<at::Tensor()>& bound)
    : dtype_(like.scalar_type()) {
  const bool is_fixed_point = at::globalContext().deterministicAlgorithms();
  sum_ = at::zeros(like.sizes(), like.options().dtype(is_fixed_point ? at::kLong : at::kFloat));
  if (!is_fixed_point) return;
  // Twice: products of rounded numbers may exceed that of their bounds by a little.
  bound_ = 2 * bound();
  const int bits = std::bit_width(static_cast<uint64_t>(num_terms));
  const at::Tensor exponent = 62 - bits - std::get<1>(at::frexp(bound_));
  units_ = at::ldexp(at::ones_like(bound_), exponent.clamp(-120, 120));
}

const float* GradientSum::units() const {
  return units_.defined() ? units_.const_data_ptr<float>() : nullptr;
}

at::Tensor GradientSum::result(const at::Tensor& witness) const {
  if (!bound_.defined()) return sum_.to(dtype_);
  const at::Tensor total = sum_ / units_.to(at::kDouble);
  at::Tensor is_finite = bound_.isfinite();
  if (witness.defined()) is_finite = is_finite.logical_and(witness.isfinite().all());
  return total.masked_fill(is_finite.logical_not(), std::nan("")).to(dtype_);
}

at::Tensor slope_bound(const at::Tensor& theta, const cuda::DeviceWeight& weight) {
  const float scale = std::fabs(weight.scale);
  if (theta.numel() == 0) return at::full({}, scale, theta.options().dtype(at::kFloat));
  const at::Tensor parameters = theta.to(at::kFloat).abs();
  const int64_t depth = weight.reconstruct.depth, width = weight.reconstruct.width;
  at::Tensor slopes = at::eye(weight.hash.num_hashes, parameters.options());
  int64_t first = 0;
  for (int64_t layer = 1; layer <= depth; ++layer) {
    const int64_t inputs = slopes.size(0), outputs = layer < depth ? width : 1;
    const at::Tensor matrix = parameters.narrow(0, first, outputs * inputs);
    // No matrix product: cuBLAS's refuse where algorithms have to be deterministic.
    slopes = (matrix.view({outputs, inputs, 1}) * slopes).sum(1);
    first += outputs * (inputs + 1);
  }
  return slopes.max() * scale;
}

at::Tensor theta_gradient(const at::Tensor& parts, const at::Tensor& theta,
                          const cuda::DeviceWeight& weight) {
  if (theta.numel() == 0) return at::zeros_like(theta);
  at::Tensor gradient = parts.sum(0);
  const ReconstructParams& g = weight.reconstruct;
  const int64_t scaled = first_scaled(weight.hash.num_hashes, g.depth, g.width);
  gradient.narrow(0, scaled, gradient.numel() - scaled).mul_(weight.scale);
  return gradient.to(theta.scalar_type());
}

}  // namespace hfh::torch_ops
