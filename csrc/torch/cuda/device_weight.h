#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "cuda/weight.h"
#include "torch/weight.h"

// From an operator's arguments to the CUDA kernels'.

namespace hfh::torch_ops {

/// A virtual weight of `rows` x `cols` without its storage, checked: what chooses a kernel asks,
/// and makes no copies.
cuda::DeviceWeight checked_device_weight(const at::Tensor& pool, const at::Tensor& theta,
                                         int64_t rows, int64_t cols, const WeightArguments& args);

/// A virtual weight of `rows` x `cols`, with the tensors that its kernels point into.
class CheckedDeviceWeight {
 public:
  CheckedDeviceWeight(const at::Tensor& pool, const at::Tensor& theta, int64_t rows, int64_t cols,
                      const WeightArguments& args);

  const cuda::DeviceWeight& get() const { return weight_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }

 private:
  cuda::DeviceWeight weight_;
  at::Tensor pool_, theta_;
  int64_t rows_, cols_;
};

/// A contiguous tensor whose data kernels can read 16 bytes at a time: itself or a copy.
at::Tensor aligned(const at::Tensor& tensor);

/// As torch spells it.
const char* dtype_name(DType dtype);

/// float32, bfloat16 or float16; a TypeError that names the argument for others.
DType checked_device_dtype(const at::Tensor& tensor, const char* name);

/// Refuses a tensor that is not where `like` is.
void check_same_device(const at::Tensor& tensor, const char* name, const at::Tensor& like,
                       const char* like_name);

}  // namespace hfh::torch_ops
