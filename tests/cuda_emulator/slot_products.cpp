#include "cuda/slot_products.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "torch/cuda/device_weight.h"

// Linear by slot products wherever they can run, also where dispatch would choose other kernels.

namespace hfh::torch_ops {

namespace {

/// input [batch, in_features]; the work is spread as over `processors`. The number of parts too.
std::tuple<at::Tensor, int64_t> slot_products(const at::Tensor& input, const at::Tensor& pool,
                                              const at::Tensor& theta,
                                              const std::optional<at::Tensor>& bias,
                                              int64_t out_features, int64_t processors,
                                              HFH_WEIGHT_PARAMETERS) {
  const CheckedDeviceWeight weight(pool, theta, out_features, input.size(1),
                                   WeightArguments{HFH_WEIGHT_ARGUMENTS});
  at::Tensor output = at::full({input.size(0), out_features},
                               std::numeric_limits<float>::quiet_NaN(), input.options());
  const cuda::SlotProductsLinear linear{input.const_data_ptr(),
                                        bias ? bias->const_data_ptr() : nullptr,
                                        output.mutable_data_ptr(),
                                        checked_device_dtype(input, "input"),
                                        input.size(0),
                                        input.size(1),
                                        out_features};
  const std::string reason = cuda::why_not_slot_products(weight.get(), linear);
  TORCH_CHECK(reason.empty(), reason);
  cuda::Device device = cuda::current_device();
  device.processors = static_cast<int>(processors);
  const cuda::SlotProductsPlan plan = cuda::plan_slot_products(weight.get(), linear, device);
  at::Tensor workspace =
      at::full({plan.workspace(linear)}, std::numeric_limits<float>::quiet_NaN(), at::kFloat);
  cuda::slot_products(weight.get(), linear, plan, workspace.mutable_data_ptr<float>(), nullptr);
  return {output, plan.num_parts};
}

}  // namespace

TORCH_LIBRARY(hfh_emulator, m) {
  m.def(
      "slot_products(Tensor input, Tensor pool, Tensor theta, Tensor? bias, int out_features, "
      "int processors, int seed, int num_hashes, int block, int window, int rows_per_window, "
      "int depth, int width, str activation, float scale, int row_offset, int col_offset, "
      "str backend) "
      "-> (Tensor, int)",
      slot_products);
}

}  // namespace hfh::torch_ops
