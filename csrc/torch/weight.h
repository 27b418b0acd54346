#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <vector>

#include "cpu/kernels.h"
#include "hfh/params.h"

// From an operator's arguments to `VirtualWeight`, checked.

namespace hfh::torch_ops {

/// The arguments that every operator over a virtual weight shares, in the order of the schemas in
/// hfh_kernels/ops/library.py.
#define HFH_WEIGHT_PARAMETERS                                                                      \
  int64_t seed, int64_t num_hashes, int64_t block, int64_t window, int64_t rows_per_window,        \
      int64_t depth, int64_t width, c10::string_view activation, double scale, int64_t row_offset, \
      int64_t col_offset, c10::string_view backend
#define HFH_WEIGHT_ARGUMENTS                                                                     \
  seed, num_hashes, block, window, rows_per_window, depth, width, activation, scale, row_offset, \
      col_offset, backend

struct WeightArguments {
  int64_t seed, num_hashes, block, window, rows_per_window, depth, width;
  c10::string_view activation;
  double scale;
  int64_t row_offset, col_offset;
  c10::string_view backend;  // on CUDA: "auto", "cuda" or "triton"
};

/// A virtual weight of `rows` x `cols`, with everything its kernels point into.
class CheckedWeight {
 public:
  CheckedWeight(const at::Tensor& pool, const at::Tensor& theta, int64_t rows, int64_t cols,
                const WeightArguments& args);

  const VirtualWeight& get() const { return weight_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  /// float64 where the pool is, else float32: what the kernels compute in.
  at::ScalarType compute_dtype() const;
  /// g's parameter gradient in the user's terms, from that of the parameters the kernels see.
  at::Tensor theta_gradient(const std::vector<double>& gradient, const at::Tensor& theta) const;
  int theta_size() const { return static_cast<int>(theta_.size()); }

 private:
  VirtualWeight weight_;
  at::Tensor pool_;
  std::vector<double> theta_;
  std::vector<float> theta_float_;
  int64_t rows_, cols_;
  int depth_;
  double scale_;
};

HashParams checked_hash(int64_t seed, int64_t num_hashes, int64_t pool_size, int64_t block,
                        int64_t window, int64_t rows_per_window);

/// A virtual weight of `rows` x `cols` without its storage: hash, network and offsets, checked
/// together with the shapes of pool and theta. Depth 0 has become depth 1 with one hash.
VirtualWeight checked_coordinates(const at::Tensor& pool, const at::Tensor& theta, int64_t rows,
                                  int64_t cols, const WeightArguments& args);

/// Refuses tensors that the CPU kernels cannot take, naming the argument and what it received.
void check_cpu(const at::Tensor& tensor, const char* name);
void check_activation_dtype(const at::Tensor& tensor, const char* name, const at::Tensor& pool);
void check_bias(const at::Tensor& bias, int64_t size, const at::Tensor& input);
/// The same on any device.
void check_bias_shape(const at::Tensor& bias, int64_t size, const at::Tensor& input);

}  // namespace hfh::torch_ops
