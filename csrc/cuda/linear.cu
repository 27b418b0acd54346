#include "cuda/linear.h"
#include "cuda/segments.h"

namespace hfh::cuda {

namespace {

constexpr int kBatchTile = 8;

template <class Shape, int kBatchTiles>
constexpr int threads_of() {
  return tile_threads<Shape>(kBatchTiles > (Shape::depth() == 1 ? 2 : 1));
}

/// Of the sums of a warp.
constexpr size_t sums_bytes(int batch_tiles) {
  return static_cast<size_t>(batch_tiles) * kBatchTile * kGroupRows * sizeof(float);
}

/// A block of threads takes a group of rows and a part of the columns; its warps take the part's
/// segments in turn and add up their sums at the end.
template <class Number, class Shape, Source kSource, int kBatchTiles>
__global__ void __launch_bounds__(threads_of<Shape, kBatchTiles>(), 1)
    linear_small_kernel(DeviceWeight weight, RowGroups groups, Segments segments,
                        const Number* __restrict__ input, int64_t batch, int64_t out_features,
                        float* __restrict__ parts) {
  const int part = static_cast<int>(blockIdx.x % segments.num_parts);
  uint64_t first, last;
  groups.rows(blockIdx.x / segments.num_parts, first, last);
  const int rows = static_cast<int>(last - first);
  const uint32_t base = window_base(static_cast<uint32_t>(first), weight.hash);
  const char* elements = prepare_elements<Number, kSource>(weight, base);
  constexpr bool kIsLinear = Network<Number, Shape>::kIsLinear;
  const Network<Number, Shape> g(weight);
  float mixing[Shape::kHashesBound];
  if constexpr (kIsLinear) {
#pragma unroll
    for (int u = 0; u < Shape::kHashesBound; ++u) mixing[u] = theta_value(weight, u);
  }
  const TileMaker<Number, Shape, kSource, false> tiles(weight, base, elements);
  RowKeys keys[kTiles] = {{static_cast<uint32_t>(first), weight.hash.seed},
                          {static_cast<uint32_t>(first) + kTileRows, weight.hash.seed}};

  const int lane = threadIdx.x % kWarpSize, m = lane / 4, q = lane % 4;
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  struct Sums {
    float of[kBatchTiles][4];
  };
  Sums sums[kTiles] = {};
  for (int segment = segments.part_begin(part) + warp; segment < segments.part_begin(part + 1);
       segment += num_warps) {
    const uint32_t col = static_cast<uint32_t>(segment) * kSegment;
    const auto load = [&](int i, int half) {
      const int64_t entry = kBatchTile * i + m;
      if (entry >= batch) return make_uint4(0, 0, 0, 0);
      const Number* from = input + entry * segments.in_features() + col + kChunk * (q + 4 * half);
      return __ldg(reinterpret_cast<const uint4*>(from));
    };
    // With a nonlinear g and a larger batch each tile of rows loads the input again, out of the
    // cache: there are not registers enough to keep it.
    constexpr bool kKeep = kIsLinear || kBatchTiles <= 2;
    uint4 kept[kKeep ? kBatchTiles : 1][2];
    if constexpr (kKeep) {
#pragma unroll
      for (int i = 0; i < 2 * kBatchTiles; ++i) kept[i / 2][i % 2] = load(i / 2, i % 2);
    }
    // There may be no registers for two tiles at once. What belongs to the tile at work comes
    // first.
    constexpr int kTilesAtOnce = kIsLinear && Shape::kHashesBound <= 4 && kBatchTiles == 1 ? 2 : 1;
#pragma unroll kTilesAtOnce
    for (int t = 0; t < kTiles; ++t) {
      if (t * kTileRows < rows) {
        // Adds the product of `value`, laid out as a tile's weights are, with the input.
        const auto multiply = [&](const uint32_t (&value)[2][2][4], float (&to)[kBatchTiles][4]) {
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
            for (int i = 0; i < kBatchTiles; ++i) {
              const uint4 x = kKeep ? kept[kKeep ? i : 0][half] : load(i, half);
              multiply_add_k16<Number>(to[i], a[0], {x.x, x.y}, to[i]);
              multiply_add_k16<Number>(to[i], a[1], {x.z, x.w}, to[i]);
            }
          }
        };
        if constexpr (kIsLinear) {
          tiles.each_element(keys[0], segments.col_offset + col,
                             [&](int u, const uint32_t (&value)[2][2][4]) {
                               float products[kBatchTiles][4] = {};
                               multiply(value, products);
#pragma unroll
                               for (int i = 0; i < 4 * kBatchTiles; ++i) {
                                 sums[0].of[i / 4][i % 4] += mixing[u] * products[i / 4][i % 4];
                               }
                             });
        } else {
          uint32_t value[2][2][4];
          tiles.make(g, keys[0], segments.col_offset + col, value);
          multiply(value, sums[0].of);
        }
      }
      rotate(sums);
      rotate(keys);
    }
  }

  // The elements are read; their memory takes the sums [warps, entries, rows].
  constexpr int kEntries = kBatchTile * kBatchTiles;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    for (int i = 0; i < kBatchTiles; ++i) {
      for (int k = 0; k < 4; ++k) {
        const int row = t * kTileRows + m + k / 2 * 8, entry = kBatchTile * i + 2 * q + k % 2;
        shared[(warp * kEntries + entry) * kGroupRows + row] = sums[t].of[i][k];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kEntries * kGroupRows; i += blockDim.x) {
    const int entry = i / kGroupRows, row = i % kGroupRows;
    if (entry >= batch || row >= rows) continue;
    float sum = 0.0f;
    for (int w = 0; w < num_warps; ++w) sum += shared[w * kEntries * kGroupRows + i];
    parts[(part * batch + entry) * out_features + (first - groups.begin) + row] = sum;
  }
}

}  // namespace

std::string why_not_linear_small(const DeviceWeight& weight, const LayerSize& size, int64_t batch) {
  const std::string reason = why_not_tiles(weight, size.in_features);
  const int64_t most = max_small_batch(weight.hash);
  if (reason.empty() && batch > most) {
    return "the batch must be at most " + std::to_string(most) + " with num_hashes " +
           std::to_string(weight.hash.num_hashes) + ", received " + std::to_string(batch);
  }
  if (!reason.empty() || weight.hash.block() >= kSharedBlock) return reason;
  return "block must be at least " + std::to_string(kSharedBlock) + ", received " +
         std::to_string(weight.hash.block());
}

int num_parts_of_linear(const DeviceWeight& weight, const LayerSize& size, const Device& device) {
  return plan_tiles(weight, 0, size.out_features, size.in_features, kWarpSize, 0, device)
      .segments.num_parts;
}

void linear_small(const DeviceWeight& weight, const LayerSize& size, const void* input,
                  int64_t batch, float* parts, const Device& device, cudaStream_t stream) {
  with_types(weight, [&]<class Number, class Shape>(Number, Shape) {
    const auto run = [&]<int kBatchTiles>() {
      const TilePlan plan =
          plan_tiles(weight, 0, size.out_features, size.in_features,
                     threads_of<Shape, kBatchTiles>(), sums_bytes(kBatchTiles), device);
      launch("linear_small",
             plan.shared ? linear_small_kernel<Number, Shape, Source::kShared, kBatchTiles>
                         : linear_small_kernel<Number, Shape, Source::kGlobal, kBatchTiles>,
             plan.grid, stream, weight, plan.groups, plan.segments,
             static_cast<const Number*>(input), batch, size.out_features, parts);
    };
    if (batch <= kBatchTile) {
      run.template operator()<1>();
    } else if (batch <= 2 * kBatchTile) {
      run.template operator()<2>();
    } else if constexpr (Shape::kHashesBound <= 4) {
      run.template operator()<4>();
    }
  });
}

}  // namespace hfh::cuda
