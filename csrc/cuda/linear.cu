#include "cuda/linear.h"
#include "cuda/linear_elements.h"
#include "cuda/segments.h"
#include "cuda/small_batch.h"

namespace hfh::cuda {

namespace {

template <class Shape>
constexpr TileKernel tile_kernel(int batch_tiles) {
  TileKernel kernel{tile_threads<Shape>(batch_tiles > 1)};
  kernel.warp_bytes = sums_bytes(batch_tiles);
  return kernel;
}

/// A block of threads takes a group of rows and a part of the columns; its warps take the part's
/// segments in turn and add up their sums at the end.
template <class Number, class Shape, Source kSource, int kBatchTiles>
__global__ void __launch_bounds__(tile_kernel<Shape>(kBatchTiles).threads, 1)
    linear_small_kernel(DeviceWeight weight, RowGroups groups, Segments segments,
                        const Number* __restrict__ input, Result<Number> result) {
  const int part = static_cast<int>(blockIdx.x % segments.num_parts);
  const RowGroup group = groups.group(blockIdx.x / segments.num_parts);
  const uint32_t base = window_base(group.first, weight.hash);
  const char* elements = prepare_elements<Number, kSource>(weight, base);
  const Network<Number, Shape> g(weight);
  const TileMaker<Number, Shape, kSource, false> tiles(weight, base, elements);
  RowKeys keys[kTiles] = {{group.first, weight.hash.seed},
                          {group.first + kTileRows, weight.hash.seed}};

  const Inputs<Number> inputs{input, result.batch, segments.in_features()};
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  Sums<kBatchTiles> sums[kTiles] = {};
  for (int segment = segments.part_begin(part) + warp; segment < segments.part_begin(part + 1);
       segment += num_warps) {
    const uint32_t col = static_cast<uint32_t>(segment) * kSegment;
    const SegmentInputs<Number, kBatchTiles, kBatchTiles <= 2> x(inputs, col);
    // There are no registers for two tiles at once. What belongs to the tile at work comes first.
#pragma unroll 1
    for (int t = 0; t < kTiles; ++t) {
      if (t * kTileRows < group.rows) {
        uint32_t value[2][2][4];
        tiles.make(g, keys[0], segments.col_offset + col, value);
        multiply_tile(value, x, 0, sums[0]);
      }
      rotate(sums);
      rotate(keys);
    }
  }
  add_up_warps(sums, groups.out_row(group), group.rows, part, result);
}

/// Calls f<Number, Shape, batch tiles>() with those of the kernel.
template <class F>
void with_kernel(const DeviceWeight& weight, int64_t batch, const F& f) {
  with_types(weight, [&]<class Number, class Shape>(Number, Shape) {
    if constexpr (Shape::depth() > 1) {
      with_batch_tiles<Shape>(
          batch, [&]<int kBatchTiles>() { f.template operator()<Number, Shape, kBatchTiles>(); });
    }
  });
}

}  // namespace

std::string why_not_linear_small(const DeviceWeight& weight, const LayerSize& size, int64_t batch) {
  const std::string reason = why_not_tiles(weight, size.in_features);
  const int64_t most = max_small_batch(weight);
  if (reason.empty() && batch > most) {
    return "the batch must be at most " + std::to_string(most) + " with num_hashes " +
           std::to_string(weight.hash.num_hashes) + " and width " +
           std::to_string(weight.reconstruct.width) + ", received " + std::to_string(batch);
  }
  if (!reason.empty() || weight.hash.block() >= kSharedBlock) return reason;
  return "block must be at least " + std::to_string(kSharedBlock) + ", received " +
         std::to_string(weight.hash.block());
}

int64_t linear_small_workspace(const DeviceWeight& weight, const LinearSmall& linear,
                               const Device& device) {
  int num_parts = 0;
  if (weight.reconstruct.depth == 1) {
    num_parts = num_parts_of_elements(weight, linear, device);
  } else {
    with_kernel(weight, linear.batch, [&]<class Number, class Shape, int kBatchTiles>() {
      num_parts = plan_tiles(weight, 0, linear.size, tile_kernel<Shape>(kBatchTiles), device)
                      .segments.num_parts;
    });
  }
  return num_parts == 1 ? 0 : num_parts * linear.batch * linear.size.out_features;
}

void linear_small(const DeviceWeight& weight, const LinearSmall& linear, float* workspace,
                  const Device& device, cudaStream_t stream) {
  if (weight.reconstruct.depth == 1) {
    linear_elements(weight, linear, workspace, device, stream);
    return;
  }
  with_kernel(weight, linear.batch, [&]<class Number, class Shape, int kBatchTiles>() {
    const TilePlan plan =
        plan_tiles(weight, 0, linear.size, tile_kernel<Shape>(kBatchTiles), device);
    launch_small<Number>("linear_small",
                         plan.shared
                             ? linear_small_kernel<Number, Shape, Source::kShared, kBatchTiles>
                             : linear_small_kernel<Number, Shape, Source::kGlobal, kBatchTiles>,
                         weight, linear, plan, workspace, stream);
  });
}

}  // namespace hfh::cuda
