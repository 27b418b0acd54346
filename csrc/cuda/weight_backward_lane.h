#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/block_sum.h"
#include "cuda/scalar.h"
#include "cuda/weight_backward.h"

// What one lane does for the gradients of pool and g. It takes neighbouring columns of one row and
// one hash block, four at a time: it loads the elements again, goes back through g, keeps theta's
// gradient in registers for all that it does, and adds four numbers at once to the pool's. In a
// block of less than four columns it takes one column.

namespace hfh::cuda::weight_backward_lane {

constexpr int kQuad = 4;

/// Where the pool's gradient is added up: in shared memory first, or in one of PoolGradient's two.
enum class Sums { kShared, kGlobal, kUnits };

struct Arguments {
  DeviceWeight weight;
  WeightGradient gradient;
  PoolGradient sums;
  BackwardPlan plan;
};

/// Lanes that take a block of at least four columns together: each four quads, if there are as
/// many.
HFH_HOST_DEVICE constexpr int log2_lanes(int log2_block) {
  return log2_block <= 4 ? 0 : log2_block - 4;
}
static_assert(1 << log2_lanes(8) <= kWarpSize && 1 << 8 == kMaxBlock);

/// Whether lanes take quads of blocks, or a column each.
HFH_HOST_DEVICE constexpr bool takes_quads(int log2_block) { return log2_block >= 2; }

/// Any dtype, which the kernel branches on.
struct AnyNumber {};

/// Calls f(number) with a number of the dtype; `Known` is that of the number where it is not any.
template <class Known, class F>
__device__ __forceinline__ void with_number(DType dtype, const F& f) {
  if constexpr (!std::is_same_v<Known, AnyNumber>) {
    f(Known{});
  } else if (dtype == DType::kBFloat16) {
    f(BFloat16{});
  } else if (dtype == DType::kFloat16) {
    f(Float16{});
  } else {
    f(0.0f);
  }
}

/// Four numbers, aligned to their size together.
template <class Number>
__device__ __forceinline__ void load_quad(const void* data, int64_t index, float (&x)[kQuad]) {
  const auto* numbers = static_cast<const Number*>(data) + index;
  if constexpr (sizeof(Number) == 2) {
    const uint2 packed = __ldg(reinterpret_cast<const uint2*>(numbers));
    unpack<Number>(packed.x, x[0], x[1]);
    unpack<Number>(packed.y, x[2], x[3]);
  } else {
    const float4 values = __ldg(reinterpret_cast<const float4*>(numbers));
    x[0] = values.x;
    x[1] = values.y;
    x[2] = values.z;
    x[3] = values.w;
  }
}

template <class Number>
__device__ __forceinline__ float load_one(const void* data, int64_t index) {
  const auto* number = static_cast<const Number*>(data) + index;
  if constexpr (sizeof(Number) == 2) {
    float low, high;
    unpack<Number>(__ldg(reinterpret_cast<const uint16_t*>(number)), low, high);
    return low;
  } else {
    return __ldg(number);
  }
}

__device__ __forceinline__ float signed_by(float x, uint32_t sign) {
  return __uint_as_float(__float_as_uint(x) ^ sign);
}

/// 1 or -1.
__device__ __forceinline__ float factor_of(uint32_t sign) {
  return __uint_as_float(sign | 0x3f800000u);
}

/// Where the elements of a weight, or of a block's first, are.
template <int kHashes>
struct Places {
  uint32_t pool[kHashes];    // offsets
  uint32_t sign[kHashes];    // bit 31 set: enters negated
  uint32_t window[kHashes];  // with Sums::kShared: offsets in the window
};

/// One lane's work. `Number` is the dtype of both the weight's gradient and the pool, or AnyNumber.
template <class Shape, Sums kSums, class Number>
class Lane {
 public:
  __device__ __forceinline__ Lane(const Arguments& args, float* window)
      : args_(args),
        hash_(args.weight.hash),
        shape_(args.weight),
        window_(window),
        units_(kSums == Sums::kUnits ? *args.sums.units : 1.0f),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        lanes_(1 << log2_lanes(hash_.log2_block)),
        in_block_(lane_ & (lanes_ - 1)),
        own_hash_(hash_lane(in_block_ % kHashes)) {
#pragma unroll
    for (int i = 0; i < kTheta; ++i) {
      theta_[i] = theta_value(args.weight, i);
      grad_theta_[i] = 0.0f;
    }
    const WeightGradient& gradient = args.gradient;
    const bool aligned = (args.weight.col_offset | gradient.row_stride) % kQuad == 0 &&
                         reinterpret_cast<uintptr_t>(gradient.data) % 16 == 0;
    const int cols = static_cast<int>(gradient.cols);
    quads_end_ = aligned ? static_cast<unsigned>(max(cols - kQuad + 1, 0)) : 0;
  }

  __device__ __forceinline__ void select_row(int row) {
    const uint32_t logical =
        args_.weight.row_offset + static_cast<uint32_t>(args_.gradient.row + row);
    key_ = row_key(logical, hash_.seed);
    base_ = window_base(logical, hash_);
    const int64_t size = args_.gradient.dtype == DType::kFloat32 ? 4 : 2;
    row_ = static_cast<const char*>(args_.gradient.data) + row * args_.gradient.row_stride * size;
  }

  /// Neighbouring hash blocks of the row, as many as the warp's lanes take.
  __device__ __forceinline__ void take_blocks(int strip) {
    const uint32_t first_block = args_.weight.col_offset >> hash_.log2_block;
    const int lead = static_cast<int>(args_.weight.col_offset & (hash_.block() - 1));
    const int block = (strip * kWarpSize + lane_) >> log2_lanes(hash_.log2_block);
    const Places<kHashes> places = places_of_block(first_block + static_cast<uint32_t>(block));

    const int col = (block << hash_.log2_block) - lead;
    // Lanes of different blocks begin with different columns, which are in different banks.
#pragma unroll 1
    for (int quad = lane_; quad < lane_ + static_cast<int>(hash_.block()) / kQuad; quad += lanes_) {
      const uint32_t inner = (kQuad * static_cast<uint32_t>(quad)) & (hash_.block() - 1);
      take_quad(places, inner, col + static_cast<int>(inner));
    }
  }

  /// A column for each lane.
  __device__ __forceinline__ void take_columns(int strip) {
    const int col = strip * kWarpSize + lane_;
    if (col >= args_.gradient.cols) return;
    const uint32_t logical = args_.weight.col_offset + static_cast<uint32_t>(col);
    const uint32_t key = weight_key(key_, logical >> hash_.log2_block);
    Places<kHashes> places;
#pragma unroll
    for (int u = 0; u < kHashes; ++u) draw_place(key, hash_lane(u), places, u);
    take_column(places, logical & (hash_.block() - 1), col);
  }

  /// Writes the block's part of theta's gradient.
  __device__ __forceinline__ void finish_theta() const {
    sum_over_block(grad_theta_, args_.sums.theta + int64_t{blockIdx.x} * kTheta);
  }

 private:
  static constexpr int kHashes = Shape::num_hashes();
  static constexpr int kTheta = theta_size(kHashes, Shape::depth(), Shape::width());

  __device__ __forceinline__ void draw_place(uint32_t key, uint32_t hash_lane,
                                             Places<kHashes>& places, int u) const {
    const Draw<uint32_t> drawn = draw(key, hash_lane, base_, hash_);
    places.pool[u] = drawn.slot << hash_.log2_block;
    places.sign[u] = drawn.sign;
    if constexpr (kSums == Sums::kShared) {
      const uint32_t slot = drawn.slot - base_;
      places.window[u] = min(slot, slot + hash_.num_slots) << hash_.log2_block;
    }
  }

  /// Where a block has the lanes for it, each draws for one hash function.
  __device__ __forceinline__ Places<kHashes> places_of_block(uint32_t block) const {
    Places<kHashes> places;
    const uint32_t key = weight_key(key_, block);
    if (lanes_ < kHashes) {
#pragma unroll
      for (int u = 0; u < kHashes; ++u) draw_place(key, hash_lane(u), places, u);
      return places;
    }
    Places<kHashes> drawn;
    draw_place(key, own_hash_, drawn, 0);
    // A pool has less than 2^31 elements.
    constexpr uint32_t kSign = 0x80000000u;
    const uint32_t packed = drawn.pool[0] | drawn.sign[0];
#pragma unroll
    for (int u = 0; u < kHashes; ++u) {
      const int from = lane_ - in_block_ + u;
      const uint32_t received = __shfl_sync(kFullWarp, packed, from);
      places.pool[u] = received & ~kSign;
      places.sign[u] = received & kSign;
      if constexpr (kSums == Sums::kShared) {
        places.window[u] = __shfl_sync(kFullWarp, drawn.window[0], from);
      }
    }
    return places;
  }

  /// Four columns; where they cannot be loaded at once, those that are part of the gradient.
  __device__ __forceinline__ void take_quad(const Places<kHashes>& places, uint32_t inner,
                                            int col) {
    const WeightGradient& given = args_.gradient;
    if (static_cast<unsigned>(col) >= quads_end_) {
#pragma unroll 1
      for (int c = 0; c < kQuad; ++c) {
        if (col + c >= 0 && col + c < given.cols) take_column(places, inner + c, col + c);
      }
      return;
    }
    float gradient[kQuad], elements[kHashes][kQuad], grad_elements[kQuad][kHashes];
    with_number<Number>(given.dtype,
                        [&](auto number) { load_quad<decltype(number)>(row_, col, gradient); });
    with_number<Number>(args_.weight.pool_dtype, [&](auto number) {
#pragma unroll
      for (int u = 0; u < kHashes; ++u) {
        load_quad<decltype(number)>(args_.weight.pool, places.pool[u] + inner, elements[u]);
      }
    });
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      float column[kHashes];
#pragma unroll
      for (int u = 0; u < kHashes; ++u) column[u] = signed_by(elements[u][c], places.sign[u]);
      reconstruct_backward(shape_, theta_, column, gradient[c], grad_theta_, grad_elements[c]);
    }
    if constexpr (kSums == Sums::kShared) {
      add_to_window(places, inner, grad_elements);
    } else {
#pragma unroll
      for (int u = 0; u < kHashes; ++u) {
        const uint32_t sign = places.sign[u], first = places.pool[u] + inner;
        if constexpr (kSums == Sums::kGlobal) {
          add_vector(args_.sums.pool + first,
                     {signed_by(grad_elements[0][u], sign), signed_by(grad_elements[1][u], sign),
                      signed_by(grad_elements[2][u], sign), signed_by(grad_elements[3][u], sign)});
        } else {
#pragma unroll
          for (int c = 0; c < kQuad; ++c) {
            add_global(first + c, signed_by(grad_elements[c][u], sign));
          }
        }
      }
    }
  }

  /// Others may add to the same elements, so may this lane for two hashes: then it tries again.
  __device__ __forceinline__ void add_to_window(const Places<kHashes>& places, uint32_t inner,
                                                const float (&values)[kQuad][kHashes]) {
    bool added[kHashes], all_added = true;
#pragma unroll
    for (int u = 0; u < kHashes; ++u) {
      added[u] = try_add(places, inner, values, u);
      all_added = all_added && added[u];
    }
    if (all_added) return;
#pragma unroll
    for (int u = 0; u < kHashes; ++u) {
      while (!added[u]) added[u] = try_add(places, inner, values, u);
    }
  }

  __device__ __forceinline__ bool try_add(const Places<kHashes>& places, uint32_t inner,
                                          const float (&values)[kQuad][kHashes], int u) {
    return try_add_shared_vector(window_ + places.window[u] + inner,
                                 {values[0][u], values[1][u], values[2][u], values[3][u]},
                                 factor_of(places.sign[u]));
  }

  /// One column, number `inner` of its block.
  __device__ __forceinline__ void take_column(const Places<kHashes>& places, uint32_t inner,
                                              int col) {
    float elements[kHashes], gradient, grad_elements[kHashes];
    with_number<Number>(args_.weight.pool_dtype, [&](auto number) {
#pragma unroll
      for (int u = 0; u < kHashes; ++u) {
        elements[u] = signed_by(
            load_one<decltype(number)>(args_.weight.pool, places.pool[u] + inner), places.sign[u]);
      }
    });
    with_number<Number>(args_.gradient.dtype,
                        [&](auto number) { gradient = load_one<decltype(number)>(row_, col); });
    reconstruct_backward(shape_, theta_, elements, gradient, grad_theta_, grad_elements);
#pragma unroll
    for (int u = 0; u < kHashes; ++u) {
      const float value = signed_by(grad_elements[u], places.sign[u]);
      if constexpr (kSums == Sums::kShared) {
        atomicAdd(window_ + places.window[u] + inner, value);
      } else {
        add_global(places.pool[u] + inner, value);
      }
    }
  }

  __device__ __forceinline__ void add_global(uint32_t offset, float value) {
    if constexpr (kSums == Sums::kUnits) {
      atomicAdd(args_.sums.pool_units + offset,
                static_cast<unsigned long long>(__float2ll_rn(value * units_)));
    } else {
      atomicAdd(args_.sums.pool + offset, value);
    }
  }

  const Arguments& args_;
  const HashParams& hash_;
  const Shape shape_;
  float* const window_;
  const float units_;
  const int lane_, lanes_, in_block_;
  const uint32_t own_hash_;
  float theta_[kTheta], grad_theta_[kTheta];
  unsigned quads_end_;  // columns from here on begin no whole quad
  uint32_t key_, base_;
  const char* row_;
};

}  // namespace hfh::cuda::weight_backward_lane
