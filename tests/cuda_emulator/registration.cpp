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

TORCH_LIBRARY_IMPL(hfh, CPU, m) {
  NoWarnings no_warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&no_warnings);
}
