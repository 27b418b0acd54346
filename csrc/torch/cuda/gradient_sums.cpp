#include "torch/cuda/gradient_sums.h"

#include <ATen/ATen.h>

namespace hfh::torch_ops {

GradientSums::GradientSums(const CheckedDeviceWeight& weight, const at::Tensor& pool,
                           const at::Tensor& theta, int64_t num_stretches,
                           const std::function<at::Tensor()>& weight_bound)
    : weight_(weight),
      device_(cuda::current_device()),
      pool_(pool, weight.rows() * weight.cols() * weight.get().hash.num_hashes,
            [&] { return weight_bound() * slope_bound(theta, weight.get()); }),
      theta_parts_(
          at::zeros({num_stretches, device_.processors,
                     theta_size(weight.get().hash.num_hashes, weight.get().reconstruct.depth,
                                weight.get().reconstruct.width)},
                    theta.options().dtype(at::kFloat))),
      theta_(theta) {}

void GradientSums::add(const at::Tensor& gradient, int64_t row, cudaStream_t stream) {
  const bool in_units = pool_.units() != nullptr;
  const cuda::WeightGradient part{gradient.const_data_ptr(), checked_device_dtype(gradient, "grad"),
                                  gradient.stride(0),        row,
                                  gradient.size(0),          gradient.size(1)};
  cuda::PoolGradient sums{};
  if (in_units) {
    sums.pool_units = static_cast<unsigned long long*>(pool_.data());
    sums.units = pool_.units();
  } else {
    sums.pool = static_cast<float*>(pool_.data());
  }
  sums.theta = theta_parts_.select(0, stretch_++).mutable_data_ptr<float>();
  const cuda::BackwardPlan plan =
      cuda::plan_weight_backward(weight_.get(), part, in_units, device_);
  cuda::weight_backward(weight_.get(), part, sums, plan, stream);
}

std::tuple<at::Tensor, at::Tensor> GradientSums::result() const {
  const at::Tensor parts = theta_parts_.flatten(0, 1);
  return {pool_.result(parts), theta_gradient(parts, theta_, weight_.get())};
}

}  // namespace hfh::torch_ops
