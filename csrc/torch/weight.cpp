#include "torch/weight.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace hfh::torch_ops {

namespace {

constexpr int64_t kUint32End = int64_t{1} << 32;
constexpr int64_t kPoolEnd = int64_t{1} << 31;

int log2_exact(int64_t power) {
  int log2 = 0;
  while ((int64_t{1} << log2) < power) ++log2;
  return log2;
}

}  // namespace

HashParams checked_hash(int64_t seed, int64_t num_hashes, int64_t pool_size, int64_t block,
                        int64_t window, int64_t rows_per_window) {
  TORCH_CHECK_VALUE(seed >= 0 && seed < kUint32End, "seed must be in [0, 2**32), received ", seed);
  TORCH_CHECK_VALUE(num_hashes >= 1 && num_hashes <= kMaxHashes, "num_hashes must be in [1, ",
                    kMaxHashes, "], received ", num_hashes);
  TORCH_CHECK_VALUE(block >= 1 && block <= kMaxBlock && (block & (block - 1)) == 0,
                    "block must be a power of two in [1, ", kMaxBlock, "], received ", block);
  TORCH_CHECK_VALUE(pool_size >= 1 && pool_size < kPoolEnd && pool_size % block == 0,
                    "pool size must be a multiple of block (", block, ") in [1, 2**31), received ",
                    pool_size);
  TORCH_CHECK_VALUE((window == 0) == (rows_per_window == 0),
                    "window and rows_per_window go together, received ", window, " and ",
                    rows_per_window);
  if (window != 0) {
    TORCH_CHECK_VALUE(window >= block && window <= pool_size && window % block == 0,
                      "window must be a multiple of block (", block, ") of at most the pool size (",
                      pool_size, "), received ", window);
    TORCH_CHECK_VALUE(rows_per_window > 0 && rows_per_window < kUint32End,
                      "rows_per_window must be in [1, 2**32), received ", rows_per_window);
  }
  return {static_cast<uint32_t>(seed),
          static_cast<uint32_t>(pool_size / block),
          static_cast<uint32_t>((window == 0 ? pool_size : window) / block),
          static_cast<uint32_t>(rows_per_window),
          static_cast<int32_t>(num_hashes),
          log2_exact(block)};
}

void check_cpu(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu(), name, " must be on the cpu, received ", tensor.device());
}

void check_activation_dtype(const at::Tensor& tensor, const char* name, const at::Tensor& pool) {
  const auto dtype = tensor.scalar_type();
  const bool both_double = dtype == at::kDouble && pool.scalar_type() == at::kDouble;
  const bool both_single =
      (dtype == at::kFloat || dtype == at::kBFloat16) &&
      (pool.scalar_type() == at::kFloat || pool.scalar_type() == at::kBFloat16);
  TORCH_CHECK_TYPE(both_double || both_single, "the cpu kernels take ", name,
                   " and pool in float32 or bfloat16, or both in float64; received ", dtype,
                   " and ", pool.scalar_type(), " (backend='reference' takes any)");
}

void check_bias_shape(const at::Tensor& bias, int64_t size, const at::Tensor& input) {
  TORCH_CHECK_VALUE(bias.dim() == 1 && bias.numel() == size, "bias must have shape [", size,
                    "], received ", bias.sizes());
  TORCH_CHECK_TYPE(bias.scalar_type() == input.scalar_type(), "bias must have input's dtype ",
                   input.scalar_type(), ", received ", bias.scalar_type());
}

void check_bias(const at::Tensor& bias, int64_t size, const at::Tensor& input) {
  check_cpu(bias, "bias");
  check_bias_shape(bias, size, input);
}

VirtualWeight checked_coordinates(const at::Tensor& pool, const at::Tensor& theta, int64_t rows,
                                  int64_t cols, const WeightArguments& args) {
  TORCH_CHECK_VALUE(pool.dim() == 1, "pool must be 1-d, received shape ", pool.sizes());
  TORCH_CHECK_VALUE(args.depth >= 0 && args.depth <= kMaxDepth, "depth must be in [0, ", kMaxDepth,
                    "], received ", args.depth);
  TORCH_CHECK_VALUE(args.width >= 1 && args.width <= kMaxWidth, "width must be in [1, ", kMaxWidth,
                    "], received ", args.width);
  const bool is_tanh = args.activation == "tanh";
  TORCH_CHECK_VALUE(is_tanh || args.activation == "relu",
                    "activation must be 'relu' or 'tanh', received '", args.activation, "'");
  TORCH_CHECK_VALUE(args.row_offset >= 0 && args.row_offset + rows <= kUint32End,
                    "row_offset must be in [0, 2**32 - rows], received ", args.row_offset, " with ",
                    rows, " rows");
  TORCH_CHECK_VALUE(args.col_offset >= 0 && args.col_offset + cols <= kUint32End,
                    "col_offset must be in [0, 2**32 - columns], received ", args.col_offset,
                    " with ", cols, " columns");

  VirtualWeight weight{};
  weight.hash = checked_hash(args.seed, args.num_hashes, pool.numel(), args.block, args.window,
                             args.rows_per_window);
  const int64_t size = theta_size(weight.hash.num_hashes, static_cast<int>(args.depth),
                                  static_cast<int>(args.width));
  TORCH_CHECK_VALUE(theta.dim() == 1 && theta.numel() == size, "theta must have shape [", size,
                    "] for num_hashes ", args.num_hashes, ", depth ", args.depth, " and width ",
                    args.width, ", received ", theta.sizes());
  weight.reconstruct = {static_cast<int32_t>(args.depth), static_cast<int32_t>(args.width),
                        is_tanh ? Activation::kTanh : Activation::kReLU};
  weight.row_offset = static_cast<uint32_t>(args.row_offset);
  weight.col_offset = static_cast<uint32_t>(args.col_offset);
  if (args.depth == 0) {
    // One hash and a mixing weight of 1: the same numbers, and no kernel of its own.
    weight.hash.num_hashes = 1;
    weight.reconstruct.depth = 1;
  }
  return weight;
}

CheckedWeight::CheckedWeight(const at::Tensor& pool, const at::Tensor& theta, int64_t rows,
                             int64_t cols, const WeightArguments& args)
    : rows_(rows), cols_(cols), depth_(static_cast<int>(args.depth)), scale_(args.scale) {
  check_cpu(pool, "pool");
  check_cpu(theta, "theta");
  weight_ = checked_coordinates(pool, theta, rows, cols, args);

  pool_ = pool.contiguous();
  weight_.pool = pool_.const_data_ptr();
  switch (pool.scalar_type()) {
    case at::kFloat:
      weight_.pool_dtype = DType::kFloat32;
      break;
    case at::kBFloat16:
      weight_.pool_dtype = DType::kBFloat16;
      break;
    case at::kDouble:
      weight_.pool_dtype = DType::kFloat64;
      break;
    default:
      TORCH_CHECK_TYPE(false,
                       "the cpu kernels take pool in float32, bfloat16 or float64; received ",
                       pool.scalar_type(), " (backend='reference' takes any)");
  }

  if (depth_ == 0) {
    theta_ = {scale_};
  } else {
    const auto size = static_cast<int>(theta.numel());
    theta_.resize(size);
    if (theta.scalar_type() == at::kFloat && theta.is_contiguous()) {
      const float* values = theta.const_data_ptr<float>();
      std::copy(values, values + size, theta_.begin());
    } else {
      const at::Tensor values = theta.to(at::kDouble).contiguous();
      std::copy_n(values.const_data_ptr<double>(), size, theta_.begin());
    }
    const int scaled = first_scaled(weight_.hash.num_hashes, depth_, weight_.reconstruct.width);
    for (int i = scaled; i < size; ++i) theta_[i] *= scale_;
  }
  theta_float_.assign(theta_.begin(), theta_.end());
  weight_.theta = weight_.pool_dtype == DType::kFloat64
                      ? static_cast<const void*>(theta_.data())
                      : static_cast<const void*>(theta_float_.data());
}

at::ScalarType CheckedWeight::compute_dtype() const {
  return weight_.pool_dtype == DType::kFloat64 ? at::kDouble : at::kFloat;
}

at::Tensor CheckedWeight::theta_gradient(const std::vector<double>& gradient,
                                         const at::Tensor& theta) const {
  at::Tensor result = at::empty(theta.sizes(), theta.options().dtype(at::kDouble));
  const int size = static_cast<int>(theta.numel());
  const int scaled = first_scaled(weight_.hash.num_hashes, depth_, weight_.reconstruct.width);
  auto* values = result.mutable_data_ptr<double>();
  for (int i = 0; i < size; ++i) values[i] = gradient[i] * (i >= scaled ? scale_ : 1.0);
  return result.to(theta.scalar_type());
}

}  // namespace hfh::torch_ops
