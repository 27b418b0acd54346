#include "torch/cuda/stream.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace hfh::torch_ops {

struct StreamScope::Guard {
  c10::cuda::CUDAGuard device;
};

StreamScope::StreamScope(const at::Tensor& tensor)
    : guard_(new Guard{c10::cuda::CUDAGuard(tensor.device())}) {}

StreamScope::~StreamScope() = default;

cudaStream_t StreamScope::stream() const { return c10::cuda::getCurrentCUDAStream(); }

}  // namespace hfh::torch_ops
