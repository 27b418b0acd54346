#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "torch/gemm.h"
#include "torch/panels.h"
#include "torch/parallel.h"

namespace hfh::torch_ops {

namespace {

using cpu::kernels;
using cpu::PoolContributions;
using cpu::TileBounds;

// Tiles of the weight's gradient, and the bound of what one lists for the pool.
constexpr int64_t kTileCols = 512;
constexpr int64_t kContributionBytes = 5 << 17;
// What each thread but the first may hold of pool gradients.
constexpr int64_t kReplicaBytes = 4 << 20;

DType kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? DType::kBFloat16
         : dtype == at::kFloat  ? DType::kFloat32
                                : DType::kFloat64;
}

/// One tile in flight: its gradient, where that is a product, and what it adds to the pool.
struct TileWork {
  at::Tensor gradient, offsets, values;
  std::vector<double> grad_theta;
  PoolContributions contributions;
};

/// The tiles of a weight's gradient, row-major, and the work on each of them.
template <class TileGradient>
class BackwardTiles {
 public:
  BackwardTiles(const CheckedWeight& weight, at::ScalarType gradient_dtype,
                bool gradient_is_product, const TileGradient& tile_gradient)
      : weight_(weight),
        dtype_(gradient_dtype),
        is_product_(gradient_is_product),
        tile_gradient_(tile_gradient),
        tile_cols_(std::min(kTileCols, weight.cols())) {
    kernels().contribution_bounds(weight.get(), {0, 1, 0, tile_cols_}, &row_entries_, &row_values_);
    const int64_t row_bytes = row_entries_ * static_cast<int64_t>(sizeof(uint32_t)) +
                              row_values_ * element_size(weight.compute_dtype());
    tile_rows_ = std::min(std::max<int64_t>(1, kContributionBytes / row_bytes), weight.rows());
    tiles_across_ = (weight.cols() + tile_cols_ - 1) / tile_cols_;
  }

  int64_t count() const { return tiles_across_ * ((weight_.rows() + tile_rows_ - 1) / tile_rows_); }

  TileWork allocate() const {
    TileWork work;
    if (is_product_) work.gradient = at::empty({tile_rows_, tile_cols_}, at::dtype(dtype_));
    work.offsets = at::empty({tile_rows_ * row_entries_}, at::dtype(at::kInt));
    work.values = at::empty({tile_rows_ * row_values_}, at::dtype(weight_.compute_dtype()));
    work.grad_theta.assign(weight_.theta_size(), 0.0);
    work.contributions = {reinterpret_cast<uint32_t*>(work.offsets.mutable_data_ptr<int>()),
                          work.values.mutable_data_ptr(), 0, 0};
    return work;
  }

  /// Lists what tile `index` adds to the pool, and adds its part to `work.grad_theta`.
  void run(int64_t index, TileWork& work) const {
    const int64_t row = index / tiles_across_ * tile_rows_;
    const int64_t col = index % tiles_across_ * tile_cols_;
    const TileBounds tile{row, std::min(tile_rows_, weight_.rows() - row), col,
                          std::min(tile_cols_, weight_.cols() - col)};
    const Matrix gradient = tile_gradient_(tile, work.gradient);
    kernels().backward(weight_.get(), tile, gradient.data, kernel_dtype(dtype_),
                       gradient.row_stride, work.grad_theta.data(), &work.contributions);
  }

 private:
  const CheckedWeight& weight_;
  at::ScalarType dtype_;
  bool is_product_;
  const TileGradient& tile_gradient_;
  int64_t tile_cols_, tile_rows_, tiles_across_, row_entries_ = 0, row_values_ = 0;
};

void add_theta(std::vector<double>& sum, std::vector<double>& part) {
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += std::exchange(part[i], 0.0);
}

/// Each thread takes a stretch of the tiles and adds to a pool gradient of its own; these are
/// summed in the threads' order.
template <class Tiles>
void backward_by_replicas(const VirtualWeight& weight, const Tiles& tiles, int64_t num_replicas,
                          WeightGradients& result) {
  std::vector<at::Tensor> replicas{result.pool};
  std::vector<TileWork> work;
  for (int64_t i = 0; i < num_replicas; ++i) {
    if (i > 0) replicas.push_back(at::empty_like(result.pool));
    work.push_back(tiles.allocate());
  }
  const int64_t pool_size = result.pool.numel();
  const int64_t share = (tiles.count() + num_replicas - 1) / num_replicas;
  at::parallel_for(0, num_replicas, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      void* replica = replicas[i].mutable_data_ptr();
      if (i > 0) std::memset(replica, 0, replicas[i].nbytes());
      for (int64_t t = i * share; t < std::min(tiles.count(), (i + 1) * share); ++t) {
        tiles.run(t, work[i]);
        kernels().scatter(work[i].contributions, weight.pool_dtype, 0,
                          static_cast<uint32_t>(pool_size), replica);
      }
    }
  });
  for (int64_t i = 0; i < num_replicas; ++i) {
    if (i > 0) result.pool.add_(replicas[i]);
    add_theta(result.theta, work[i].grad_theta);
  }
}

/// For pools too large to have one a thread: rounds of a tile a thread. In each, threads first work
/// on their tiles, then add the round's contributions to the stretch of the pool that each owns.
template <class Tiles>
void backward_by_rounds(const VirtualWeight& weight, const Tiles& tiles, int64_t num_threads,
                        WeightGradients& result) {
  std::vector<TileWork> round;
  for (int64_t i = 0; i < num_threads; ++i) round.push_back(tiles.allocate());
  const int64_t pool_size = result.pool.numel();
  const int64_t stretch =
      round_up((pool_size + num_threads - 1) / num_threads, weight.hash.block());
  for (int64_t first = 0; first < tiles.count(); first += num_threads) {
    const int64_t count = std::min(num_threads, tiles.count() - first);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) tiles.run(first + i, round[i]);
    });
    parallel_stretches(pool_size, stretch, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; ++i) {
        kernels().scatter(round[i].contributions, weight.pool_dtype, static_cast<uint32_t>(begin),
                          static_cast<uint32_t>(end), result.pool.mutable_data_ptr());
      }
    });
    for (int64_t i = 0; i < count; ++i) add_theta(result.theta, round[i].grad_theta);
  }
}

template <class TileGradient>
WeightGradients backward_of_tiles(const CheckedWeight& weight, at::ScalarType gradient_dtype,
                                  bool gradient_is_product, const TileGradient& tile_gradient) {
  const VirtualWeight& virtual_weight = weight.get();
  const int64_t pool_size = int64_t{virtual_weight.hash.num_slots}
                            << virtual_weight.hash.log2_block;
  WeightGradients result{at::zeros({pool_size}, at::dtype(weight.compute_dtype())),
                         std::vector<double>(weight.theta_size(), 0.0)};
  if (weight.rows() == 0 || weight.cols() == 0) return result;
  const BackwardTiles tiles(weight, gradient_dtype, gradient_is_product, tile_gradient);
  const int64_t threads = std::min<int64_t>(tiles.count(), at::get_num_threads());
  // What is held beyond the gradient that the caller gets: of a bfloat16 pool, the first one too.
  const int64_t extra_replicas = threads - (virtual_weight.pool_dtype == DType::kBFloat16 ? 0 : 1);
  const auto extra_bytes = extra_replicas * static_cast<int64_t>(result.pool.nbytes());
  if (threads == 1 || extra_bytes <= (threads - 1) * kReplicaBytes) {
    backward_by_replicas(virtual_weight, tiles, threads, result);
  } else {
    backward_by_rounds(virtual_weight, tiles, threads, result);
  }
  return result;
}

}  // namespace

WeightGradients weight_backward(const CheckedWeight& weight, const at::Tensor& gradient) {
  const Matrix matrix = matrix_of(gradient);
  return backward_of_tiles(weight, gradient.scalar_type(), false,
                           [&](const TileBounds& tile, at::Tensor&) {
                             return matrix.slice(tile.row, tile.rows, tile.col, tile.cols);
                           });
}

WeightGradients weight_backward(const CheckedWeight& weight, const at::Tensor& grad_output,
                                const at::Tensor& input) {
  const Matrix grad_y = matrix_of(grad_output), x = matrix_of(input);
  const int64_t batch = input.size(0);
  return backward_of_tiles(
      weight, input.scalar_type(), true, [&](const TileBounds& tile, at::Tensor& storage) {
        const Matrix product = matrix_of(storage).slice(0, tile.rows, 0, tile.cols);
        gemm(grad_y.slice(0, batch, tile.row, tile.rows).transposed(),
             x.slice(0, batch, tile.col, tile.cols), product, false);
        return product;
      });
}

}  // namespace hfh::torch_ops
