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

  /// A vector of neighbouring elements.
  template <class Vector>
  HFH_HOST_DEVICE void add_vector(uint32_t first, Vector value) {
    if (sum != nullptr) {
      store(sum + first, load<Vector>(sum + first) + value);
    } else {
      constexpr int kLanes = sizeof(Vector) / sizeof(Scalar);
      store(values + count * kLanes, value);
      offset[count++] = first;
    }
  }
  /// An element for each lane.
  template <class Uint, class Vector>
  HFH_HOST_DEVICE void add_elements(Uint offsets, Vector value) {
    constexpr int kLanes = sizeof(Vector) / sizeof(Scalar);
    if (sum != nullptr) {
      uint32_t target[kLanes];
      Scalar lanes[kLanes];
      store(target, offsets);
      store(lanes, value);
      for (int i = 0; i < kLanes; ++i) sum[target[i]] += lanes[i];
    } else {
      store(offset + count, offsets);
      store(values + count, value);
      count += kLanes;
    }
  }
};

template <class Scalar>
HFH_HOST_DEVICE Contributions<Scalar> contributions_to(const cpu::PoolContributions& out) {
  return {static_cast<Scalar*>(out.sum), out.offset, static_cast<Scalar*>(out.values), out.count};
}

/// The gradient of a tile, float or bfloat16 for float kernels, double for double ones: row i
/// begins at element `place[i]` of `data`.
struct TileGradient {
  const void* data;
  const int64_t* place;
  bool is_bfloat16;

  template <class W>
  HFH_HOST_DEVICE typename W::Vector load_at(int64_t row, int64_t col) const {
    const int64_t i = place[row] + col;
    if constexpr (W::kLanes > 1) {
      if (is_bfloat16) {
        return load_as<typename W::Vector>(static_cast<const BFloat16*>(data) + i);
      }
    }
    return load_as<typename W::Vector>(static_cast<const typename W::Scalar*>(data) + i);
  }
  template <class W>
  HFH_HOST_DEVICE typename W::Scalar element(int64_t row, int64_t col) const {
    const int64_t i = place[row] + col;
    if (W::kLanes > 1 && is_bfloat16) return to_float(static_cast<const BFloat16*>(data)[i]);
    return static_cast<const typename W::Scalar*>(data)[i];
  }
};

/// Adds the tile's gradient to that of g's parameters (`grad_theta`, double) and of the pool. Row i
/// of the tile is `rows[i]` of the weight.
template <class W>
HFH_HOST_DEVICE void tile_backward(const VirtualWeight& weight, ListedRows rows, const Tile& tile,
                                   const TileGradient& gradient, double* grad_theta,
                                   Contributions<typename W::Scalar>& out) {
  using Vector = typename W::Vector;
  using Uint = typename W::Uint;
  const typename W::Shape shape(weight);
  const LocalTheta<W> theta(shape, weight);
  const auto* pool = static_cast<const typename W::Pool*>(weight.pool);
  // Sums of a few rows stay in float; the rest of the sum is in double.
  constexpr int64_t kColsPerFlush = 4096;
  const int64_t rows_per_flush = (kColsPerFlush + tile.cols - 1) / tile.cols;
  Vector sums[kMaxTheta];
  const int size = theta_size_of(shape);
  for (int i = 0; i < size; ++i) sums[i] = Vector{};

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
    Vector grad;
    if (is_inside<W>(col, tile.cols)) {
      grad = gradient.template load_at<W>(row, col);
    } else {
      typename W::Scalar lanes[W::kLanes] = {};
      for (int i = 0; i < W::kLanes; ++i) {
        if (col + i >= 0 && col + i < tile.cols)
          lanes[i] = gradient.template element<W>(row, col + i);
      }
      grad = load<Vector>(lanes);
      for (int u = 0; u < shape.num_hashes(); ++u) a[u] = masked(a[u], col);
    }
    reconstruct_backward(shape, theta.values, a, grad, sums, grad_a);
  };
  int64_t rows_to_flush = rows_per_flush;
  const auto row_done = [&](int64_t row) {
    if (--rows_to_flush > 0 && row + 1 != tile.rows) return;
    rows_to_flush = rows_per_flush;
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
        out.add_elements(draws.offset[u], flip_sign(grad_a[u], draws.sign[u]));
      }
    };
    walk_elements<W>(weight, shape, rows, tile, visit, row_done);
  } else {
    using Draws = BlockDraws<W, ListedRows::kVectorsAtOnce>;
    const auto visit = [&](int64_t row, const auto& part, const Draws& draws, int lane, int ahead) {
      int64_t col = part.col;
      for (uint32_t phase = part.phase; phase < part.stop; phase += W::kLanes, col += W::kLanes) {
        Vector a[W::kHashesBound], grad_a[W::kHashesBound];
        for (int u = 0; u < shape.num_hashes(); ++u) {
          const uint32_t ahead_offset = draws.offset[u][ahead] + phase;
          __builtin_prefetch(pool + ahead_offset);
          if (out.sum != nullptr) __builtin_prefetch(out.sum + ahead_offset, 1);
          a[u] = flip_sign(load_as<Vector>(pool + draws.offset[u][lane] + phase),
                           splat_uint<Uint>(draws.sign[u][lane]));
        }
        vector_backward(row, col, a, grad_a);
        for (int u = 0; u < shape.num_hashes(); ++u) {
          out.add_vector(draws.offset[u][lane] + phase,
                         flip_sign(grad_a[u], splat_uint<Uint>(draws.sign[u][lane])));
        }
      }
    };
    walk_blocks<W, Draws>(weight, shape, rows, tile, [](Draws&, int) {}, visit, row_done);
  }
}

HFH_NAMESPACE_END
