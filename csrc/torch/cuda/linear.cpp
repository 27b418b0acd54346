#include "cuda/linear.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "cuda/crossovers.h"
#include "cuda/slot_products.h"
#include "torch/cuda/device_weight.h"
#include "torch/cuda/operators.h"
#include "torch/cuda/stream.h"

// hfh::linear and its input's gradient, and hfh::materialize, on CUDA.

namespace hfh::torch_ops::cuda_ops {

namespace {

using cuda::LayerSize;

// Rows and columns of a panel: whole groups of rows, whole segments.
constexpr int64_t kPanelMultiple = 64;

/// [..., features] as [batch, features], contiguous and aligned as the kernels read it.
at::Tensor as_matrix(const at::Tensor& tensor) {
  return aligned(tensor.reshape({-1, tensor.size(-1)}).contiguous());
}

void check_input(const at::Tensor& input, const char* name, const at::Tensor& pool) {
  TORCH_CHECK_VALUE(input.dim() >= 1, name,
                    " must have at least one dimension, received a 0-d tensor");
  checked_device_dtype(input, name);
  check_same_device(input, name, pool, "pool");
}

/// Rows of a panel of so many columns, or the other way round.
int64_t panel_size(int64_t other_size, int64_t element_size) {
  const int64_t size = cuda::kPanelBytes / (other_size * element_size);
  return std::max(kPanelMultiple, size / kPanelMultiple * kPanelMultiple);
}

/// input [batch, in] V^T + bias to out [batch, out_features], a panel of V's rows at a time.
void multiply_panels(const CheckedDeviceWeight& weight, const LayerSize& size,
                     const at::Tensor& input, const at::Tensor& bias, at::Tensor& out,
                     const cuda::Device& device, cudaStream_t stream) {
  const int64_t most =
      std::min(size.out_features, panel_size(size.in_features, input.element_size()));
  const at::Tensor panel = at::empty({most, size.in_features}, input.options());
  for (int64_t row = 0; row < size.out_features; row += most) {
    const int64_t rows = std::min(most, size.out_features - row);
    const at::Tensor weights = panel.narrow(0, 0, rows);
    cuda::write_panel(weight.get(), size, row, rows, weights.mutable_data_ptr(), device, stream);
    at::Tensor to = out.narrow(1, row, rows);
    if (bias.defined()) {
      at::addmm_out(to, bias.narrow(0, row, rows), input, weights.t());
    } else {
      at::mm_out(to, input, weights.t());
    }
  }
}

enum class LinearKernel { kNone, kSlotProducts, kTiles, kPanels };

struct Product {
  cuda::DeviceWeight weight;
  LayerSize size;
  int64_t batch;
  DType dtype;
};

/// Whether the kernels read a copy of a float32 pool in the input's dtype, as autocast reads
/// weights: where the copy is little beside the weights that it makes.
bool rounds_pool(const at::Tensor& pool, const at::Tensor& input, const LayerSize& size) {
  return pool.scalar_type() == at::kFloat && at::isReducedFloatingType(input.scalar_type()) &&
         pool.numel() <= size.out_features * size.in_features / 8;
}

/// The pool as the kernels of a product read it.
at::Tensor elements_of(const at::Tensor& pool, const at::Tensor& input, const LayerSize& size) {
  return rounds_pool(pool, input, size) ? pool.to(input.scalar_type()) : pool;
}

/// A product of `input` as it will be, before any copy is made.
Product product_of(const at::Tensor& input, const at::Tensor& pool, const LayerSize& size,
                   const cuda::DeviceWeight& weight) {
  const int64_t batch = c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
  const DType dtype = checked_device_dtype(input, "input");
  Product product{weight, size, batch, dtype};
  if (rounds_pool(pool, input, size)) product.weight.pool_dtype = dtype;
  return product;
}

cuda::SlotProductsLinear slot_products_of(const Product& product) {
  cuda::SlotProductsLinear linear{};
  linear.dtype = product.dtype;
  linear.batch = product.batch;
  linear.in_features = product.size.in_features;
  linear.out_features = product.size.out_features;
  return linear;
}

std::string why_not_panels(const Product& product) {
  if (product.dtype != product.weight.pool_dtype) {
    return std::string(
               "input and pool must both be bfloat16 or both float16, or pool float32 and ") +
           "at most 1/8 of the weight, received input in " + dtype_name(product.dtype) +
           " and pool in " + dtype_name(product.weight.pool_dtype);
  }
  return cuda::why_not_panel(product.weight, product.size);
}

/// Why a kernel cannot run; empty where it can.
std::string why_not(LinearKernel kernel, const Product& product) {
  if (kernel == LinearKernel::kSlotProducts) {
    return cuda::why_not_slot_products(product.weight, slot_products_of(product));
  }
  const std::string reason = why_not_panels(product);
  if (!reason.empty() || kernel == LinearKernel::kPanels) return reason;
  return cuda::why_not_linear_small(product.weight, product.size, product.batch);
}

/// The kernel that is expected to be fastest of those that can run; kNone and why there is none.
LinearKernel choose(const Product& product, std::string& reason) {
  const bool slots = why_not(LinearKernel::kSlotProducts, product).empty();
  reason = why_not(LinearKernel::kPanels, product);
  if (slots && (!reason.empty() || cuda::slot_products_win(product.weight.hash, product.batch,
                                                           product.size.out_features))) {
    return LinearKernel::kSlotProducts;
  }
  if (!reason.empty()) return LinearKernel::kNone;
  return why_not(LinearKernel::kTiles, product).empty() ? LinearKernel::kTiles
                                                        : LinearKernel::kPanels;
}

constexpr std::pair<std::string_view, LinearKernel> kNamed[] = {
    {"cuda:slot_products", LinearKernel::kSlotProducts},
    {"cuda:tiles", LinearKernel::kTiles},
    {"cuda:panels", LinearKernel::kPanels},
};

/// The kernel that `backend` names, else the one chosen.
LinearKernel require_kernel(const Product& product, c10::string_view backend) {
  std::string reason;
  for (const auto& [name, kernel] : kNamed) {
    if (backend != name) continue;
    reason = why_not(kernel, product);
    TORCH_CHECK(reason.empty(), "backend '", backend, "' cannot run: ", reason);
    return kernel;
  }
  TORCH_CHECK_VALUE(backend == "auto" || backend == "cuda",
                    "backend must be 'auto', 'cuda', 'triton' or the name of a kernel of linear, "
                    "received '",
                    backend, "'");
  const LinearKernel kernel = choose(product, reason);
  TORCH_CHECK(kernel != LinearKernel::kNone, "backend 'cuda' cannot run: ", reason);
  return kernel;
}

}  // namespace

std::string why_not_platform_product(c10::string_view backend) {
  const bool refuses = backend == "auto" && at::globalContext().deterministicAlgorithms();
  return refuses ? "the platform's product may not be deterministic" : "";
}

std::string why_not_linear(const at::Tensor& input, const at::Tensor& pool, const at::Tensor& theta,
                           int64_t out_features, HFH_WEIGHT_PARAMETERS) {
  check_input(input, "input", pool);
  const LayerSize size{out_features, input.size(-1)};
  const Product product = product_of(
      input, pool, size,
      checked_device_weight(pool, theta, out_features, size.in_features, {HFH_WEIGHT_ARGUMENTS}));
  for (const auto& [name, kernel] : kNamed) {
    if (backend == name) return why_not(kernel, product);
  }
  std::string reason;
  const LinearKernel kernel = choose(product, reason);
  if (kernel == LinearKernel::kNone) return reason;
  return kernel == LinearKernel::kPanels ? why_not_platform_product(backend) : "";
}

std::string why_not_linear_backward_input(const at::Tensor& grad_output, const at::Tensor& pool,
                                          const at::Tensor& theta, int64_t in_features,
                                          HFH_WEIGHT_PARAMETERS) {
  check_input(grad_output, "grad_output", pool);
  const LayerSize size{grad_output.size(-1), in_features};
  const std::string reason = why_not_panels(product_of(
      grad_output, pool, size,
      checked_device_weight(pool, theta, size.out_features, in_features, {HFH_WEIGHT_ARGUMENTS})));
  return reason.empty() ? why_not_platform_product(backend) : reason;
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& pool, const at::Tensor& theta,
                  const std::optional<at::Tensor>& bias, int64_t out_features,
                  HFH_WEIGHT_PARAMETERS) {
  check_input(input, "input", pool);
  TORCH_CHECK_VALUE(out_features >= 0, "out_features must not be negative, received ",
                    out_features);
  const LayerSize size{out_features, input.size(-1)};
  const CheckedDeviceWeight weight(elements_of(pool, input, size), theta, out_features,
                                   size.in_features, {HFH_WEIGHT_ARGUMENTS});
  const Product product = product_of(input, pool, size, weight.get());
  const at::Tensor bias_tensor = bias.has_value() ? bias->contiguous() : at::Tensor();
  if (bias_tensor.defined()) {
    check_same_device(bias_tensor, "bias", input, "input");
    check_bias_shape(bias_tensor, out_features, input);
  }
  auto sizes = input.sizes().vec();
  sizes.back() = out_features;
  at::Tensor out = at::empty(sizes, input.options());
  if (out.numel() == 0) return out;
  at::Tensor out_matrix = out.view({product.batch, out_features});
  if (size.in_features == 0) {
    out_matrix.zero_();
    if (bias_tensor.defined()) out_matrix.add_(bias_tensor);
    return out;
  }
  const LinearKernel kernel = require_kernel(product, backend);
  const StreamScope scope(input);
  const cuda::Device device = cuda::current_device();
  const at::Tensor matrix = as_matrix(input);
  const void* bias_data = bias_tensor.defined() ? bias_tensor.const_data_ptr() : nullptr;
  const auto workspace = [&](int64_t numbers) {
    return at::empty({numbers}, input.options().dtype(at::kFloat));
  };
  switch (kernel) {
    case LinearKernel::kSlotProducts: {
      cuda::SlotProductsLinear slots = slot_products_of(product);
      slots.input = matrix.const_data_ptr();
      slots.bias = bias_data;
      slots.output = out.mutable_data_ptr();
      const auto plan = cuda::plan_slot_products(weight.get(), slots, device);
      const at::Tensor space = workspace(plan.workspace(slots));
      cuda::slot_products(weight.get(), slots, plan, space.mutable_data_ptr<float>(),
                          scope.stream());
      break;
    }
    case LinearKernel::kTiles: {
      const cuda::LinearSmall small{size, product.batch, matrix.const_data_ptr(), bias_data,
                                    out.mutable_data_ptr()};
      const at::Tensor space = workspace(cuda::linear_small_workspace(weight.get(), small, device));
      cuda::linear_small(weight.get(), small, space.mutable_data_ptr<float>(), device,
                         scope.stream());
      break;
    }
    default:
      multiply_panels(weight, size, matrix, bias_tensor, out_matrix, device, scope.stream());
  }
  return out;
}

at::Tensor linear_backward_input(const at::Tensor& grad_output, const at::Tensor& pool,
                                 const at::Tensor& theta, int64_t in_features,
                                 HFH_WEIGHT_PARAMETERS) {
  check_input(grad_output, "grad_output", pool);
  const int64_t out_features = grad_output.size(-1);
  const LayerSize size{out_features, in_features};
  const CheckedDeviceWeight weight(elements_of(pool, grad_output, size), theta, out_features,
                                   in_features, {HFH_WEIGHT_ARGUMENTS});
  auto sizes = grad_output.sizes().vec();
  sizes.back() = in_features;
  at::Tensor grad_input = at::empty(sizes, grad_output.options());
  if (grad_input.numel() == 0) return grad_input;
  if (out_features == 0) return grad_input.zero_();
  const Product product = product_of(grad_output, pool, size, weight.get());
  const std::string reason = why_not_panels(product);
  TORCH_CHECK(reason.empty(), "backend 'cuda' cannot run: ", reason);
  const StreamScope scope(grad_output);
  const cuda::Device device = cuda::current_device();
  const at::Tensor gradients = as_matrix(grad_output);
  at::Tensor out = grad_input.view({product.batch, in_features});
  // Panels of columns: each is all that some columns of the result need.
  const int64_t most = std::min(in_features, panel_size(out_features, grad_output.element_size()));
  const at::Tensor panel = at::empty({out_features * most}, grad_output.options());
  cuda::DeviceWeight columns = weight.get();
  for (int64_t col = 0; col < in_features; col += most) {
    const int64_t cols = std::min(most, in_features - col);
    columns.col_offset = weight.get().col_offset + static_cast<uint32_t>(col);
    const at::Tensor weights = panel.narrow(0, 0, out_features * cols).view({out_features, cols});
    cuda::write_panel(columns, {out_features, cols}, 0, out_features, weights.mutable_data_ptr(),
                      device, scope.stream());
    at::Tensor to = out.narrow(1, col, cols);
    at::mm_out(to, gradients, weights);
  }
  return grad_input;
}

at::Tensor materialize(const at::Tensor& pool, const at::Tensor& theta, int64_t rows, int64_t cols,
                       HFH_WEIGHT_PARAMETERS) {
  TORCH_CHECK_VALUE(rows >= 0, "rows must not be negative, received ", rows);
  TORCH_CHECK_VALUE(cols >= 0, "cols must not be negative, received ", cols);
  const CheckedDeviceWeight weight(pool, theta, rows, cols, {HFH_WEIGHT_ARGUMENTS});
  at::Tensor out = at::empty({rows, cols}, pool.options());
  if (out.numel() == 0) return out;
  const std::string reason = cuda::why_not_panel(weight.get(), {rows, cols});
  TORCH_CHECK(reason.empty(), "backend 'cuda' cannot run: ", reason);
  const StreamScope scope(pool);
  cuda::write_panel(weight.get(), {rows, cols}, 0, rows, out.mutable_data_ptr(),
                    cuda::current_device(), scope.stream());
  return out;
}

}  // namespace hfh::torch_ops::cuda_ops
