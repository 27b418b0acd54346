#pragma once

#include "cpu/walk.h"

HFH_NAMESPACE_BEGIN

/// Draws, and the first layer of g with the signs of each block folded into its columns: the sign
/// then costs nothing where the weights are computed.
template <class W>
struct SignedDraws : BlockDraws<W> {
  alignas(64) typename W::Scalar first[W::kFirstBound][W::kLanes];

  __attribute__((noinline)) void fold_signs(const typename W::Shape& shape,
                                  const typename W::Scalar* theta) {
    using Vector = typename W::Vector;
    const int rows = first_layer_size(shape) / shape.num_hashes();
    for (int j = 0; j < rows; ++j) {
      for (int u = 0; u < shape.num_hashes(); ++u) {
        const int i = j * shape.num_hashes() + u;
        store(first[i], flip_sign(splat<Vector>(theta[i]),
                                  load<typename W::Uint>(this->sign[u])));
      }
    }
  }
};

/// Reconstructs the tile and hands it to `sink` a vector at a time: `sink.vector(row, col, value)`,
/// then `sink.row_done(row)`. `col` is relative to the tile; vectors at its ends may reach outside.
template <class W, class Sink>
HFH_HOST_DEVICE void reconstruct_tile(const VirtualWeight& weight, const Tile& tile, Sink& sink) {
  using Vector = typename W::Vector;
  const typename W::Shape shape(weight);
  const LocalTheta<W> theta(shape, weight);
  const auto row_done = [&](int64_t row) { sink.row_done(row); };
  if constexpr (W::kByElement) {
    const auto visit = [&](int64_t row, int64_t col, const ElementDraws<W>& draws) {
      const auto first = [&](int i) { return theta.values[i]; };
      sink.vector(row, col, reconstruct<Vector>(shape, first, theta.values, draws.a));
    };
    walk_elements<W>(weight, shape, tile, visit, row_done);
  } else {
    using Draws = SignedDraws<W>;
    const auto* pool = static_cast<const typename W::Pool*>(weight.pool);
    const auto prepare = [&](Draws& draws) { draws.fold_signs(shape, theta.values); };
    const auto visit = [&](int64_t row, int64_t col, const Draws& draws, const Draws& next,
                           int lane, uint32_t phase, uint32_t stop) {
      const auto first = [&](int i) { return draws.first[i][lane]; };
      for (; phase < stop; phase += W::kLanes, col += W::kLanes) {
        Vector a[W::kHashesBound];
        for (int u = 0; u < shape.num_hashes(); ++u) {
          __builtin_prefetch(pool + next.offset[u][lane] + phase);
          a[u] = load_as<Vector>(pool + draws.offset[u][lane] + phase);
        }
        sink.vector(row, col, reconstruct<Vector>(shape, first, theta.values, a));
      }
    };
    walk_blocks<W, Draws>(weight, shape, tile, prepare, visit, row_done);
  }
}

/// Writes the tile to memory, and nothing outside it.
template <class W>
struct StoreSink {
  typename W::Scalar* out;
  int64_t stride, cols;

  HFH_HOST_DEVICE void vector(int64_t row, int64_t col, typename W::Vector value) {
    typename W::Scalar* target = out + row * stride + col;
    if (is_inside<W>(col, cols)) {
      store(target, value);
    } else {
      typename W::Scalar lanes[W::kLanes];
      store(lanes, value);
      for (int i = 0; i < W::kLanes; ++i) {
        if (col + i >= 0 && col + i < cols) target[i] = lanes[i];
      }
    }
  }
  HFH_HOST_DEVICE void row_done(int64_t) {}
};

/// Multiplies each row with one input vector as it is reconstructed: batch 1.
template <class W>
struct DotSink {
  const float* input;
  float* out;  // one sum a row
  int64_t cols;
  typename W::Vector sum = {};

  HFH_HOST_DEVICE void vector(int64_t, int64_t col, typename W::Vector value) {
    using Vector = typename W::Vector;
    if (is_inside<W>(col, cols)) {
      sum += value * load<Vector>(input + col);
    } else {
      // Lanes outside the tile hold whatever the block holds there, NaN perhaps: leave them out.
      typename W::Scalar lanes[W::kLanes];
      store(lanes, value);
      for (int i = 0; i < W::kLanes; ++i) {
        lanes[i] = col + i >= 0 && col + i < cols ? lanes[i] * input[col + i] : 0;
      }
      sum += load<Vector>(lanes);
    }
  }
  HFH_HOST_DEVICE void row_done(int64_t row) {
    out[row] = horizontal_sum(sum);
    sum = typename W::Vector{};
  }
};

HFH_NAMESPACE_END
