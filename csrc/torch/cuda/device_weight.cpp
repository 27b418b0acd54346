#include "torch/cuda/device_weight.h"

#include <ATen/ATen.h>

namespace hfh::torch_ops {

at::Tensor aligned(const at::Tensor& tensor) {
  constexpr uintptr_t kAlignment = 16;
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0 ? tensor
                                                                                : tensor.clone();
}

cuda::DeviceWeight checked_device_weight(const at::Tensor& pool, const at::Tensor& theta,
                                         int64_t rows, int64_t cols, const WeightArguments& args) {
  cuda::DeviceWeight weight{checked_coordinates(pool, theta, rows, cols, args),
                            static_cast<float>(args.scale)};
  check_same_device(theta, "theta", pool, "pool");
  checked_device_dtype(theta, "theta");
  weight.pool_dtype = checked_device_dtype(pool, "pool");
  return weight;
}

CheckedDeviceWeight::CheckedDeviceWeight(const at::Tensor& pool, const at::Tensor& theta,
                                         int64_t rows, int64_t cols, const WeightArguments& args)
    : weight_(checked_device_weight(pool, theta, rows, cols, args)),
      pool_(aligned(pool.contiguous())),
      theta_(theta.to(at::kFloat).contiguous()),
      rows_(rows),
      cols_(cols) {
  weight_.pool = pool_.const_data_ptr();
  weight_.theta = args.depth == 0 ? nullptr : theta_.const_data_ptr<float>();
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kFloat32:
      return "float32";
    default:
      return "float64";
  }
}

DType checked_device_dtype(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "the cuda kernels take ", name,
                       " in float32, bfloat16 or float16; received ", tensor.scalar_type());
  }
}

void check_same_device(const at::Tensor& tensor, const char* name, const at::Tensor& like,
                       const char* like_name) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " must be on the device of ", like_name,
                    ", ", like.device(), ", received ", tensor.device());
}

}  // namespace hfh::torch_ops
