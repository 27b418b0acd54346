#include <c10/util/Exception.h>
#include <torch/library.h>

#include "torch/cuda/operators.h"

// Puts the CUDA operators, emulated, in the place of the CPU's kernels.

namespace {

/// PyTorch warns of kernels that are replaced.
struct NoWarnings : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

namespace cuda_ops = hfh::torch_ops::cuda_ops;

TORCH_LIBRARY_IMPL(hfh, CPU, m) {
  NoWarnings no_warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&no_warnings);
  m.impl("linear", TORCH_FN(cuda_ops::linear));
  m.impl("linear_backward_input", TORCH_FN(cuda_ops::linear_backward_input));
  m.impl("materialize", TORCH_FN(cuda_ops::materialize));
  m.impl("embedding", TORCH_FN(cuda_ops::embedding));
  m.impl("embedding_backward", TORCH_FN(cuda_ops::embedding_backward));
  m.impl("embedding_bag", TORCH_FN(cuda_ops::embedding_bag));
  m.impl("embedding_bag_backward", TORCH_FN(cuda_ops::embedding_bag_backward));
  m.impl("materialize_backward", TORCH_FN(cuda_ops::materialize_backward));
  m.impl("linear_backward_weight", TORCH_FN(cuda_ops::linear_backward_weight));
}
