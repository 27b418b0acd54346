#pragma once

#include "cuda/fragments.h"
#include "cuda/result.h"
#include "cuda/segments.h"
#include "cuda/sum_parts.h"

// Products of tiles of weights with a small batch of inputs, on the tensor cores: what the kernels
// of linear.cu and linear_elements.cu share. A batch tile is eight inputs.

namespace hfh::cuda {

inline constexpr int kBatchTile = 8;

/// [batch, in_features].
template <class Number>
struct Inputs {
  const Number* data;
  int64_t batch, in_features;

  /// Operand "b" of a batch tile and half of the segment at `col`, in the order of a tile's chunks;
  /// zeros where there is no input.
  __device__ __forceinline__ uint4 load(uint32_t col, int batch_tile, int half) const {
    const int lane = threadIdx.x % kWarpSize, m = lane / 4, q = lane % 4;
    const int64_t entry = kBatchTile * batch_tile + m;
    if (entry >= batch) return make_uint4(0, 0, 0, 0);
    const Number* from = data + entry * in_features + col + kChunk * (q + 4 * half);
    return __ldg(reinterpret_cast<const uint4*>(from));
  }
};

/// The inputs of a segment, for all tiles of rows that a warp multiplies. Where there are not
/// registers enough to keep them, each tile loads them again, out of the cache.
template <class Number, int kBatchTiles, bool kKeep>
class SegmentInputs {
 public:
  __device__ __forceinline__ SegmentInputs(const Inputs<Number>& inputs, uint32_t col)
      : inputs_(inputs), col_(col) {
    if constexpr (kKeep) {
#pragma unroll
      for (int i = 0; i < 2 * kBatchTiles; ++i)
        kept_[i / 2][i % 2] = inputs.load(col, i / 2, i % 2);
    }
  }

  __device__ __forceinline__ uint4 operator()(int batch_tile, int half) const {
    return kKeep ? kept_[kKeep ? batch_tile : 0][half] : inputs_.load(col_, batch_tile, half);
  }

 private:
  const Inputs<Number>& inputs_;
  uint32_t col_;
  uint4 kept_[kKeep ? kBatchTiles : 1][2];
};

/// Of a tile's 16 rows and the batch, as tensor instructions leave them.
template <int kBatchTiles>
struct Sums {
  float of[kBatchTiles][4];
};

/// Adds the product of `value`, laid out as TileMaker's weights are, with kCount batch tiles from
/// `first` on.
template <class Number, int kBatchTiles, bool kKeep, int kCount>
__device__ __forceinline__ void multiply_tile(
    const uint32_t (&value)[2][2][4], const SegmentInputs<Number, kBatchTiles, kKeep>& inputs,
    int first, Sums<kCount>& to) {
  const int m = threadIdx.x % kWarpSize / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Rows of odd m made the halves the other way round.
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = i % 2, word = i / 2;
      a[i / 4][i % 4] = m % 2 == half ? value[row][0][word] : value[row][1][word];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint4 x = inputs(first + i, half);
      multiply_add_k16<Number>(to.of[i], a[0], {x.x, x.y});
      multiply_add_k16<Number>(to.of[i], a[1], {x.z, x.w});
    }
  }
}

/// Shared memory that a warp's sums take at the end.
constexpr size_t sums_bytes(int batch_tiles) {
  return static_cast<size_t>(batch_tiles) * kBatchTile * kGroupRows * sizeof(float);
}

/// Adds up the warps' sums of a group of rows, in shared memory, and writes those of its first
/// `rows`, which begin at `first_row` of the layer. By all threads of the block, after what else
/// they read there.
template <class Number, int kBatchTiles>
__device__ __forceinline__ void add_up_warps(const Sums<kBatchTiles> (&sums)[kTiles],
                                             int64_t first_row, int rows, int part,
                                             const Result<Number>& result) {
  constexpr int kEntries = kBatchTile * kBatchTiles;
  const int lane = threadIdx.x % kWarpSize, m = lane / 4, q = lane % 4;
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4 * kBatchTiles; ++i) {
      const int row = t * kTileRows + m + i % 4 / 2 * 8;
      const int entry = kBatchTile * (i / 4) + 2 * q + i % 2;
      shared[(warp * kEntries + entry) * kGroupRows + row] = sums[t].of[i / 4][i % 4];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kEntries * kGroupRows; i += blockDim.x) {
    const int entry = i / kGroupRows, row = i % kGroupRows;
    if (entry >= result.batch || row >= rows) continue;
    float sum = 0.0f;
    for (int w = 0; w < num_warps; ++w) sum += shared[w * kEntries * kGroupRows + i];
    result.write(part, entry, first_row + row, sum);
  }
}

/// Calls f<batch tiles>() with those of the kernel that takes a batch.
template <class Shape, class F>
void with_batch_tiles(int64_t batch, const F& f) {
  if (batch <= kBatchTile) {
    f.template operator()<1>();
  } else if (batch <= 2 * kBatchTile) {
    f.template operator()<2>();
  } else if constexpr (Shape::kHashesBound <= 4 && Shape::kWidthBound <= 4) {
    f.template operator()<4>();
  }
}

/// Launches a kernel of a small product, and what adds up its parts.
template <class Number>
void launch_small(const char* name,
                  void (*kernel)(DeviceWeight, RowGroups, Segments, const Number*, Result<Number>),
                  const DeviceWeight& weight, const LinearSmall& linear, const TilePlan& plan,
                  float* workspace, cudaStream_t stream) {
  const int num_parts = plan.segments.num_parts;
  const Result<Number> result{
      static_cast<const Number*>(linear.bias), static_cast<Number*>(linear.output),
      num_parts == 1 ? nullptr : workspace, linear.batch, linear.size.out_features};
  launch(name, kernel, plan.grid, stream, weight, plan.groups, plan.segments,
         static_cast<const Number*>(linear.input), result);
  if (num_parts > 1) {
    sum_parts(workspace, num_parts, linear.batch, linear.size.out_features, linear.bias,
              weight.pool_dtype, linear.output, stream);
  }
}

}  // namespace hfh::cuda
