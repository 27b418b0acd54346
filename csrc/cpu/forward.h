#pragma once

#include "cpu/walk.h"

HFH_NAMESPACE_BEGIN

/// Draws, and the first layer of g with the signs of each block folded into its columns: the sign
/// then costs nothing where the weights are computed.
template <class W, int kVectorsAtOnce>
struct SignedDraws : BlockDraws<W, kVectorsAtOnce> {
  using Base = BlockDraws<W, kVectorsAtOnce>;
  alignas(64) typename W::Scalar first[W::kFirstBound][Base::kCount];

  /// Of a vector of blocks. Not inlined, like `compute`.
  __attribute__((noinline)) void fold_signs(const typename W::Shape& shape,
                                            const typename W::Scalar* theta, int lane) {
    using Vector = typename W::Vector;
    const int rows = first_layer_size(shape) / shape.num_hashes();
    for (int j = 0; j < rows; ++j) {
      for (int u = 0; u < shape.num_hashes(); ++u) {
        const int i = j * shape.num_hashes() + u;
        const auto sign = load<typename W::Uint>(this->sign[u] + lane);
        store(first[i] + lane, flip_sign(splat<Vector>(theta[i]), sign));
      }
    }
  }
};

/// Reconstructs the tile and hands it to `sink` a vector at a time: `sink.vector(row, col, value)`,
/// or `sink.edge` where the vector may reach outside the tile, then `sink.row_done(row)`. `col` is
/// relative to the tile; row i of the tile is `rows[i]` of the weight. `sink.begin_block()` comes
/// before each draw.
template <class W, class Rows, class Sink>
HFH_HOST_DEVICE void reconstruct_tile(const VirtualWeight& weight, Rows rows, const Tile& tile,
                                      Sink& sink) {
  using Vector = typename W::Vector;
  const typename W::Shape shape(weight);
  const LocalTheta<W> theta(shape, weight);
  const auto row_done = [&](int64_t row) { sink.row_done(row); };
  if constexpr (W::kByElement) {
    const auto visit = [&](int64_t row, int64_t col, const ElementDraws<W>& draws) {
      sink.begin_block();
      const auto first = [&](int i) { return theta.values[i]; };
      const Vector value = reconstruct<Vector>(shape, first, theta.values, draws.a);
      if (is_inside<W>(col, tile.cols)) {
        sink.vector(row, col, value);
      } else {
        sink.edge(row, col, value);
      }
    };
    walk_elements<W>(weight, shape, rows, tile, visit, row_done);
  } else {
    using Draws = SignedDraws<W, Rows::kVectorsAtOnce>;
    const auto* pool = static_cast<const typename W::Pool*>(weight.pool);
    const auto prepare = [&](Draws& draws, int lane) {
      draws.fold_signs(shape, theta.values, lane);
    };
    const auto visit = [&]<class Part>(int64_t row, const Part& part, const Draws& draws, int lane,
                                       int ahead) __attribute__((always_inline)) {
      sink.begin_block();
      constexpr bool kInRegisters = W::kFirstBound <= 16;
      Vector signed_first[kInRegisters ? W::kFirstBound : 1];
      if constexpr (kInRegisters) {
        for (int i = 0; i < first_layer_size(shape); ++i) {
          signed_first[i] = opaque(splat<Vector>(draws.first[i][lane]));
        }
      }
      const auto first = [&](int i) {
        if constexpr (kInRegisters)
          return signed_first[i];
        else
          return draws.first[i][lane];
      };
      const auto* begin = pool + part.phase;
      const auto count = static_cast<ptrdiff_t>(part.stop - part.phase);
      const typename W::Pool *source[W::kHashesBound], *ahead_source[W::kHashesBound];
      for (int u = 0; u < shape.num_hashes(); ++u) {
        source[u] = begin + draws.offset[u][lane];
        ahead_source[u] = begin + draws.offset[u][ahead];
      }
      const auto element = [&](int u, ptrdiff_t i) {
        __builtin_prefetch(ahead_source[u] + i);
        return load_as<Vector>(source[u] + i);
      };
      const auto value_at = [&](ptrdiff_t i) {
        Vector a[W::kHashesBound];
        for (int u = 0; u < shape.num_hashes(); ++u) a[u] = element(u, i);
        return reconstruct<Vector>(shape, first, theta.values, a);
      };
      const int64_t col = part.col;
      ptrdiff_t i = 0;
      if constexpr (Part::kWhole) {
        for (; i + 2 * W::kLanes <= count; i += 2 * W::kLanes) {
          VectorPair<Vector> a[W::kHashesBound];
          for (int u = 0; u < shape.num_hashes(); ++u) {
            a[u] = {element(u, i), element(u, i + W::kLanes)};
          }
          const auto values = reconstruct<VectorPair<Vector>>(shape, first, theta.values, a);
          sink.vector(row, col + i, values.first);
          sink.vector(row, col + i + W::kLanes, values.second);
        }
      }
      if (Part::kWhole || (col >= 0 && col + round_up_to_lanes<W>(count) <= tile.cols)) {
        for (; i < count; i += W::kLanes) sink.vector(row, col + i, value_at(i));
      } else {
        for (; i < count; i += W::kLanes) sink.edge(row, col + i, value_at(i));
      }
    };
    walk_blocks<W, Draws>(weight, shape, rows, tile, prepare, visit, row_done);
  }
}

/// Multiplies each row with one input vector as it is reconstructed: batch 1.
template <class W>
struct DotSink {
  using Vector = typename W::Vector;
  const float* input;
  float* out;  // one sum a row
  int64_t cols;
  Vector sum = {};

  HFH_HOST_DEVICE void begin_block() {}
  HFH_HOST_DEVICE void vector(int64_t, int64_t col, Vector value) {
    sum += value * load<Vector>(input + col);
  }
  __attribute__((noinline)) void edge(int64_t, int64_t col, Vector value) {
    // Lanes outside the tile hold whatever the block holds there, NaN perhaps: leave them out.
    typename W::Scalar lanes[W::kLanes];
    store(lanes, value);
    for (int i = 0; i < W::kLanes; ++i) {
      lanes[i] = col + i >= 0 && col + i < cols ? lanes[i] * input[col + i] : 0;
    }
    sum += load<Vector>(lanes);
  }
  HFH_HOST_DEVICE void row_done(int64_t row) {
    out[row] = horizontal_sum(sum);
    sum = Vector{};
  }
};

HFH_NAMESPACE_END
