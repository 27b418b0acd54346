#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime.h>

#include <memory>

namespace hfh::torch_ops {

/// Makes a tensor's device the current one while it lives, and gives PyTorch's stream on it.
class StreamScope {
 public:
  explicit StreamScope(const at::Tensor& tensor);
  ~StreamScope();
  StreamScope(const StreamScope&) = delete;
  StreamScope& operator=(const StreamScope&) = delete;

  cudaStream_t stream() const;

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

}  // namespace hfh::torch_ops
