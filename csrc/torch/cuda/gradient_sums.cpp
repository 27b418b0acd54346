#include "torch/cuda/gradient_sums.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace hfh::torch_ops {

namespace {

/// At most how much a weight changes with an element: the activations' slopes are at most 1.
at::Tensor slope(const cuda::DeviceWeight& weight, const at::Tensor& theta) {
  if (theta.numel() == 0)
    return at::full({}, std::fabs(weight.scale), theta.options().dtype(at::kFloat));
  const int64_t hashes = weight.hash.num_hashes;
  const int64_t depth = weight.reconstruct.depth, width = weight.reconstruct.width;
  const at::Tensor magnitudes = theta.to(at::kFloat).abs();
  at::Tensor slopes = at::eye(hashes, magnitudes.options());
  int64_t start = 0;
  for (int64_t layer = 1; layer <= depth; ++layer) {
    const int64_t inputs = layer == 1 ? hashes : width, outputs = layer == depth ? 1 : width;
    const at::Tensor matrix = magnitudes.narrow(0, start, outputs * inputs);
    // No matrix product: cuBLAS's refuse where algorithms have to be deterministic.
    slopes = (matrix.view({outputs, inputs, 1}) * slopes).sum(1);
    start += outputs * inputs + outputs;
  }
  return slopes.max() * std::fabs(weight.scale);
}

}  // namespace

PoolSum::PoolSum(const CheckedDeviceWeight& weight, const at::Tensor& pool, const at::Tensor& theta,
                 int64_t num_terms, const std::function<at::Tensor()>& weight_bound)
    : dtype_(pool.scalar_type()) {
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  total_ = at::zeros(pool.sizes(), pool.options().dtype(deterministic ? at::kLong : at::kFloat));
  if (!deterministic) return;
  // Twice: products of rounded numbers may exceed that of their bounds by a little.
  bound_ = 2 * weight_bound() * slope(weight.get(), theta);
  const at::Tensor exponent =
      62 - std::bit_width(static_cast<uint64_t>(num_terms)) - std::get<1>(at::frexp(bound_));
  units_ = at::ldexp(at::ones_like(bound_), exponent.clamp(-120, 120));
}

cuda::PoolGradient PoolSum::argument() {
  cuda::PoolGradient sums{};
  if (in_units()) {
    sums.pool_units = reinterpret_cast<unsigned long long*>(total_.mutable_data_ptr<int64_t>());
    sums.units = units_.const_data_ptr<float>();
  } else {
    sums.pool = total_.mutable_data_ptr<float>();
  }
  return sums;
}

at::Tensor PoolSum::result() const {
  if (!in_units()) return total_.to(dtype_);
  const at::Tensor total = total_ / units_.to(at::kDouble);
  return at::where(bound_.isfinite(), total, std::numeric_limits<double>::quiet_NaN()).to(dtype_);
}

GradientSums::GradientSums(const CheckedDeviceWeight& weight, const at::Tensor& pool,
                           const at::Tensor& theta, int64_t num_stretches,
                           const std::function<at::Tensor()>& weight_bound)
    : weight_(weight),
      device_(cuda::current_device()),
      pool_(weight, pool, theta, weight.rows() * weight.cols() * weight.get().hash.num_hashes,
            weight_bound),
      theta_parts_(
          at::zeros({num_stretches, device_.processors,
                     theta_size(weight.get().hash.num_hashes, weight.get().reconstruct.depth,
                                weight.get().reconstruct.width)},
                    theta.options().dtype(at::kFloat))),
      theta_(theta) {}

void GradientSums::add(const at::Tensor& gradient, int64_t row, cudaStream_t stream) {
  const cuda::WeightGradient part{gradient.const_data_ptr(), checked_device_dtype(gradient, "grad"),
                                  gradient.stride(0),        row,
                                  gradient.size(0),          gradient.size(1)};
  cuda::PoolGradient sums = pool_.argument();
  sums.theta = theta_parts_.select(0, stretch_++).mutable_data_ptr<float>();
  const cuda::BackwardPlan plan =
      cuda::plan_weight_backward(weight_.get(), part, pool_.in_units(), device_);
  cuda::weight_backward(weight_.get(), part, sums, plan, stream);
}

std::tuple<at::Tensor, at::Tensor> GradientSums::result() const {
  // HashedNets' g has a parameter for the kernels only.
  const at::Tensor theta = theta_.numel() == 0
                               ? at::empty_like(theta_)
                               : theta_parts_.sum(at::IntArrayRef{0, 1}).to(theta_.scalar_type());
  return {pool_.result(), theta};
}

}  // namespace hfh::torch_ops
