#pragma once

#include "cpu/walk.h"

HFH_NAMESPACE_BEGIN

/// Where the pool's gradient goes, `cpu::PoolContributions` with a type: added at once to `sum`
/// where that is the thread's own; else listed in a fixed order, so that threads which own disjoint
/// stretches of the pool can add it up without races and in one order.
template <class Scalar>
struct Contributions {
  Scalar* sum;  // or null
  uint32_t* offset;
  Scalar* values;
  int64_t count;
};

/// The gradient of a tile: row-major, float or bfloat16 for float kernels, double for double ones.
struct TileGradient {
  const void* data;
  int64_t stride;
  bool is_bfloat16;

  template <class W>
  HFH_HOST_DEVICE typename W::Vector load_at(int64_t i) const {
    if constexpr (W::kLanes > 1) {
      if (is_bfloat16) {
        return load_as<typename W::Vector>(static_cast<const BFloat16*>(data) + i);
      }
    }
    return load_as<typename W::Vector>(static_cast<const typename W::Scalar*>(data) + i);
  }
  template <class W>
  HFH_HOST_DEVICE typename W::Scalar element(int64_t i) const {
    if (W::kLanes > 1 && is_bfloat16) return to_float(static_cast<const BFloat16*>(data)[i]);
    return static_cast<const typename W::Scalar*>(data)[i];
  }
};

/// Adds the tile's gradient to that of g's parameters (`grad_theta`, double) and of the pool.
template <class W>
HFH_HOST_DEVICE void tile_backward(const VirtualWeight& weight, const Tile& tile,
                                   const TileGradient& gradient, double* grad_theta,
                                   Contributions<typename W::Scalar>& out) {
  using Vector = typename W::Vector;
  using Uint = typename W::Uint;
  const typename W::Shape shape(weight);
  const LocalTheta<W> theta(shape, weight);
  const auto* pool = static_cast<const typename W::Pool*>(weight.pool);
  // Sums of at most kRowsPerFlush rows stay in float; the rest of the sum is in double.
  constexpr int kRowsPerFlush = 8;
  Vector sums[kMaxTheta];
  const int size = theta_size_of(shape);
  for (int i = 0; i < size; ++i) sums[i] = Vector{};
  out.count = 0;

  // Columns outside the tile (ragged ends) count as zero, whatever the pool holds there.
  const auto masked = [&](Vector x, int64_t col) {
    typename W::Scalar lanes[W::kLanes];
    store(lanes, x);
    for (int i = 0; i < W::kLanes; ++i) {
      if (col + i < 0 || col + i >= tile.cols) lanes[i] = 0;
    }
    return load<Vector>(lanes);
  };
  const auto vector_backward = [&](int64_t row, int64_t col, Vector* a, Vector* grad_a) {
    const int64_t first = row * gradient.stride + col;
    Vector grad;
    if (is_inside<W>(col, tile.cols)) {
      grad = gradient.template load_at<W>(first);
    } else {
      typename W::Scalar lanes[W::kLanes] = {};
      for (int i = 0; i < W::kLanes; ++i) {
        if (col + i >= 0 && col + i < tile.cols) lanes[i] = gradient.template element<W>(first + i);
      }
      grad = load<Vector>(lanes);
      for (int u = 0; u < shape.num_hashes(); ++u) a[u] = masked(a[u], col);
    }
    reconstruct_backward(shape, theta.values, a, grad, sums, grad_a);
  };
  const auto row_done = [&](int64_t row) {
    if ((row + 1) % kRowsPerFlush != 0 && row + 1 != tile.rows) return;
    for (int i = 0; i < size; ++i) {
      grad_theta[i] += horizontal_sum(sums[i]);
      sums[i] = Vector{};
    }
  };

  if constexpr (W::kByElement) {
    const auto visit = [&](int64_t row, int64_t col, ElementDraws<W>& draws) {
      Vector grad_a[W::kHashesBound];
      vector_backward(row, col, draws.a, grad_a);
      for (int u = 0; u < shape.num_hashes(); ++u) {
        const Vector grad = flip_sign(grad_a[u], draws.sign[u]);
        if (out.sum != nullptr) {
          uint32_t offset[W::kLanes];
          typename W::Scalar lanes[W::kLanes];
          store(offset, draws.offset[u]);
          store(lanes, grad);
          for (int i = 0; i < W::kLanes; ++i) out.sum[offset[i]] += lanes[i];
          continue;
        }
        store(out.offset + out.count, draws.offset[u]);
        store(out.values + out.count, grad);
        out.count += W::kLanes;
      }
    };
    walk_elements<W>(weight, shape, tile, visit, row_done);
  } else {
    using Draws = BlockDraws<W>;
    const auto visit = [&](int64_t row, int64_t col, const Draws& draws, const Draws& next,
                           int lane, uint32_t phase, uint32_t stop) {
      for (; phase < stop; phase += W::kLanes, col += W::kLanes) {
        Vector a[W::kHashesBound], grad_a[W::kHashesBound];
        for (int u = 0; u < shape.num_hashes(); ++u) {
          __builtin_prefetch(pool + next.offset[u][lane] + phase);
          if (out.sum != nullptr) __builtin_prefetch(out.sum + next.offset[u][lane] + phase, 1);
          a[u] = flip_sign(load_as<Vector>(pool + draws.offset[u][lane] + phase),
                           splat_uint<Uint>(draws.sign[u][lane]));
        }
        vector_backward(row, col, a, grad_a);
        for (int u = 0; u < shape.num_hashes(); ++u) {
          const uint32_t offset = draws.offset[u][lane] + phase;
          const Vector grad = flip_sign(grad_a[u], splat_uint<Uint>(draws.sign[u][lane]));
          if (out.sum != nullptr) {
            store(out.sum + offset, load<Vector>(out.sum + offset) + grad);
            continue;
          }
          out.offset[out.count] = offset;
          store(out.values + out.count * W::kLanes, grad);
          ++out.count;
        }
      }
    };
    walk_blocks<W, Draws>(weight, shape, tile, [](Draws&) {}, visit, row_done);
  }
}

HFH_NAMESPACE_END
