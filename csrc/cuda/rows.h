#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>

#include "cuda/columns.h"
#include "cuda/launch.h"
#include "cuda/lookup.h"
#include "cuda/numbers.h"
#include "cuda/scalar.h"

// Rows of a table, a few columns a lane. Included by the kernels of look-ups alone.

namespace hfh::cuda {

/// How rows are dealt out: a team of neighbouring lanes makes a stretch of a row.
struct Layout {
  int log2_lanes;     // of a team
  int lead;           // columns by which the first lane begins before the row
  int stretches;      // of a row
  bool shares_draws;  // neighbours hash together: see RowMaker
  bool aligned;       // of rows, see Rows
};

template <class Number, int kColumns, int kSharing>
Layout make_layout(const Lookup& lookup, std::initializer_list<const void*> matrices) {
  const auto lanes_for = [&](unsigned lead) {
    return (static_cast<unsigned>(lookup.cols) + lead + kColumns - 1) / kColumns;
  };
  constexpr unsigned kShared = kSharing * kColumns;
  Layout layout{};
  unsigned lead = lookup.weight.col_offset % kShared;
  layout.shares_draws =
      kSharing > 1 && lookup.weight.hash.block() >= kShared && lanes_for(lead) > kSharing / 2;
  if (!layout.shares_draws) lead = lookup.weight.col_offset % kColumns;
  layout.lead = static_cast<int>(lead);
  const unsigned lanes = std::min<unsigned>(std::bit_ceil(lanes_for(lead)), kWarpSize);
  layout.log2_lanes = std::bit_width(lanes) - 1;
  layout.stretches = static_cast<int>((lanes_for(lead) + lanes - 1) / lanes);
  layout.aligned = lookup.cols % kColumns == 0 && lead % kColumns == 0;
  for (const void* matrix : matrices) {
    layout.aligned &= reinterpret_cast<uintptr_t>(matrix) % (kColumns * sizeof(Number)) == 0;
  }
  return layout;
}

/// Which of the grid's workers, warps or blocks, a thread is in.
struct Worker {
  unsigned index, count;

  __device__ __forceinline__ static Worker warp() {
    const unsigned warps = blockDim.x / kWarpSize;
    return {blockIdx.x * warps + threadIdx.x / kWarpSize, gridDim.x * warps};
  }
  __device__ __forceinline__ static Worker block() { return {blockIdx.x, gridDim.x}; }
};

/// Takes a worker through the stretches of `count` rows, as many rows at a time as a warp has
/// teams.
class Walk {
 public:
  __device__ __forceinline__ Walk(const Layout& layout, int64_t count, Worker worker)
      : layout_(layout), count_(count) {
    const unsigned stretches = static_cast<unsigned>(layout.stretches);
    rows_a_step_ = static_cast<int64_t>(worker.count / stretches) * teams();
    stretches_a_step_ = worker.count % stretches;
    first_row_ = static_cast<int64_t>(worker.index / stretches) * teams();
    stretch_ = worker.index % stretches;
  }

  /// The same for all lanes of the worker.
  __device__ __forceinline__ bool goes_on() const { return first_row_ < count_; }
  __device__ __forceinline__ void step() {
    first_row_ += rows_a_step_;
    stretch_ += stretches_a_step_;
    if (stretch_ >= static_cast<unsigned>(layout_.stretches)) {
      // Rows of several stretches have all of a warp.
      stretch_ -= layout_.stretches;
      ++first_row_;
    }
  }

  /// Of the lane; the last may be `count` or more.
  __device__ __forceinline__ int64_t row() const {
    return first_row_ + (threadIdx.x % kWarpSize >> layout_.log2_lanes);
  }
  template <int kColumns>
  __device__ __forceinline__ int col() const {
    const unsigned lane = threadIdx.x & ((1u << layout_.log2_lanes) - 1);
    return static_cast<int>(((stretch_ << layout_.log2_lanes) + lane) * kColumns) - layout_.lead;
  }

 private:
  __device__ __forceinline__ int teams() const { return kWarpSize >> layout_.log2_lanes; }

  const Layout& layout_;
  int64_t count_, first_row_, rows_a_step_;
  unsigned stretch_, stretches_a_step_;
};

/// What an entry stands for.
struct Rank {
  int64_t row;  // of the table
  bool exists;  // it is no padding
};

__device__ __forceinline__ Rank look_up(const Lookup& lookup, int64_t index, bool inside) {
  const auto in_table = [&](int64_t i) {
    return static_cast<uint64_t>(i) < static_cast<uint64_t>(lookup.num_embeddings);
  };
  device_assert(!inside || in_table(index), "indices must be in [0, num_embeddings)");
  Rank rank{index, inside && index != lookup.padding_idx};
  if (lookup.permutation != nullptr && rank.exists) {
    rank.row = __ldg(lookup.permutation + index);
    device_assert(in_table(rank.row), "permutation must be in [0, num_embeddings)");
  }
  return rank;
}

/// Makes rows of the virtual weight; g's parameters stay in registers.
template <class Number, int kColumns, class Shape>
struct RowMaker {
  static constexpr int kHashes = Shape::kHashesBound;
  static constexpr int kThetaSize = theta_size(Shape::num_hashes(), Shape::depth(), Shape::width());
  /// Lanes that share draws; each makes one of them.
  static constexpr int kSharing = static_cast<int>(std::bit_ceil(static_cast<unsigned>(kHashes)));

  using Elements = Columns<Number, kColumns>;

  const DeviceWeight& weight;
  Shape shape;
  bool shares_draws;
  uint32_t own_lane;
  float theta[kThetaSize];

  __device__ __forceinline__ RowMaker(const DeviceWeight& of, const Layout& layout)
      : weight(of),
        shape(of),
        shares_draws(layout.shares_draws),
        own_lane(hash_lane(static_cast<int>(threadIdx.x % kSharing))) {
#pragma unroll
    for (int i = 0; i < kThetaSize; ++i) theta[i] = theta_value(of, i);
  }

  /// Of each hash function, the slot, and in bit 31 the sign. By all lanes of a warp together.
  __device__ __forceinline__ void draw_all(uint32_t row, int col,
                                           uint32_t (&draws)[kHashes]) const {
    const HashParams& hash = weight.hash;
    const uint32_t virtual_row = weight.row_offset + row;
    const uint32_t block = (weight.col_offset + static_cast<uint32_t>(col)) >> hash.log2_block;
    const uint32_t key = weight_key(row_key(virtual_row, hash.seed), block);
    const uint32_t base = window_base(virtual_row, hash);
    const auto packed = [&](uint32_t lane) {
      const Draw<uint32_t> drawn = draw(key, lane, base, hash);
      return drawn.slot | drawn.sign;
    };
    if (shares_draws) {
      const uint32_t own = packed(own_lane);
#pragma unroll
      for (int u = 0; u < kHashes; ++u) draws[u] = __shfl_sync(kFullWarp, own, u, kSharing);
    } else {
#pragma unroll
      for (int u = 0; u < kHashes; ++u) draws[u] = packed(hash_lane(u));
    }
  }

  /// The pool's element that the lane's first column draws.
  __device__ __forceinline__ uint32_t offset(uint32_t drawn, int col) const {
    const uint32_t within =
        (weight.col_offset + static_cast<uint32_t>(col)) & (weight.hash.block() - 1);
    return ((drawn & 0x7fffffffu) << weight.hash.log2_block) + within;
  }

  __device__ __forceinline__ static uint32_t sign(uint32_t drawn) { return drawn & 0x80000000u; }

  __device__ __forceinline__ void gather(const uint32_t (&draws)[kHashes], int col,
                                         Elements (&elements)[kHashes]) const {
    const auto* pool = static_cast<const Number*>(weight.pool);
#pragma unroll
    for (int u = 0; u < kHashes; ++u) {
      elements[u] = load<Number, kColumns, Reuse::kLater>(pool + offset(draws[u], col));
    }
  }

  __device__ __forceinline__ void make(const uint32_t (&draws)[kHashes], int col,
                                       float (&row)[kColumns]) const {
    Elements elements[kHashes];
    gather(draws, col, elements);
    // g's first layer is signed where it is smaller than the elements.
    constexpr bool kSignTheta = Shape::depth() == 1;
    float a[kHashes][kColumns], signed_mix[kHashes];
#pragma unroll
    for (int u = 0; u < kHashes; ++u) {
      if constexpr (kSignTheta) {
        signed_mix[u] = __uint_as_float(__float_as_uint(theta[u]) ^ sign(draws[u]));
      } else {
        elements[u].flip(sign(draws[u]));
      }
      elements[u].unpack_to(a[u]);
    }
    const auto first = [&](int i) {
      if constexpr (kSignTheta) return signed_mix[i];
      return theta[i];
    };
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float x[kHashes];
#pragma unroll
      for (int u = 0; u < kHashes; ++u) x[u] = a[u][j];
      row[j] = reconstruct(shape, first, theta, x);
    }
  }
};

/// Columns from `col` on of a row of the table, zeros where it does not exist. By all lanes of a
/// warp together.
template <class Maker, class Number, int kColumns>
__device__ __forceinline__ void make_row(const Maker& maker, const Rows<const Number>& dense,
                                         int64_t num_dense, const Rank& rank, int col,
                                         float (&row)[kColumns]) {
  uint32_t draws[Maker::kHashes];
  maker.draw_all(static_cast<uint32_t>(rank.row), col, draws);
#pragma unroll
  for (float& x : row) x = 0.0f;
  if (!rank.exists) return;
  if (rank.row < num_dense) {
    dense.template read<kColumns, Reuse::kLater>(rank.row, col).unpack_to(row);
  } else {
    maker.make(draws, col, row);
  }
}

inline constexpr int kLookupThreads = 128;
inline constexpr int kLookupWarps = kLookupThreads / kWarpSize;

/// Steps of a Walk through `rows` together.
inline int64_t num_steps(const Layout& layout, int64_t rows) {
  const int64_t teams = kWarpSize >> layout.log2_lanes;
  return (rows + teams - 1) / teams * layout.stretches;
}

/// As many blocks as have a warp each for the stretches of `rows`, but no more than several times
/// what runs at once: g's parameters are then loaded for many rows.
inline unsigned lookup_blocks(const Layout& layout, int64_t rows, int blocks_a_processor) {
  const int64_t most = int64_t{blocks_a_processor} * current_device().processors;
  const int64_t blocks = (num_steps(layout, rows) + kLookupWarps - 1) / kLookupWarps;
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, most));
}

template <class Number>
Rows<const Number> dense_rows(const Lookup& lookup, const Layout& layout) {
  return {static_cast<const Number*>(lookup.dense), lookup.cols, layout.aligned};
}

/// Calls f(number, columns, shape) with the pool's type, the columns a lane makes and g's shape as
/// constants.
template <class F>
void with_kernel(const VirtualWeight& weight, const F& f) {
  with_number(weight.pool_dtype, [&]<class Number>(Number number) {
    with_shape(weight, [&](auto shape) {
      if (weight.hash.block() >= kVectorColumns<Number>) {
        f(number, std::integral_constant<int, kVectorColumns<Number>>{}, shape);
      } else {
        f(number, std::integral_constant<int, 1>{}, shape);
      }
    });
  });
}

}  // namespace hfh::cuda
