#include "cuda/linear.h"
#include "cuda/segments.h"

namespace hfh::cuda {

namespace {

template <class Number, class Shape, Source kSource, bool kElements>
__global__ void __launch_bounds__(tile_threads<Shape>(false), 1)
    write_panel_kernel(DeviceWeight weight, RowGroups groups, Segments segments,
                       Number* __restrict__ panel) {
  const int part = static_cast<int>(blockIdx.x % segments.num_parts);
  const RowGroup group = groups.group(blockIdx.x / segments.num_parts);
  const uint32_t base = window_base(group.first, weight.hash);
  const char* elements = prepare_elements<Number, kSource>(weight, base);
  const Network<Number, Shape> g(weight);
  const TileMaker<Number, Shape, kSource, kElements> tiles(weight, base, elements);
  RowKeys keys[kTiles] = {{group.first, weight.hash.seed},
                          {group.first + kTileRows, weight.hash.seed}};

  const int m = threadIdx.x % kWarpSize / 4;
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  for (int segment = segments.part_begin(part) + warp; segment < segments.part_begin(part + 1);
       segment += num_warps) {
    const uint32_t col = static_cast<uint32_t>(segment) * kSegment;
#pragma unroll 1
    for (int t = 0; t < kTiles; ++t) {
      uint32_t value[2][2][4];
      tiles.make(g, keys[0], segments.col_offset + col, value);
      rotate(keys);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = t * kTileRows + m + 8 * i;
        if (row >= group.rows) continue;
        Number* to = panel + (groups.out_row(group) + row) * segments.in_features() + col;
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {
          const uint32_t (&words)[4] = value[i][turn];
          *reinterpret_cast<uint4*>(to + kChunk * tiles.chunk(turn)) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }
}

}  // namespace

std::string why_not_panel(const DeviceWeight& weight, const LayerSize& size) {
  return why_not_tiles(weight, size.in_features);
}

void write_panel(const DeviceWeight& weight, const LayerSize& size, int64_t row_begin, int64_t rows,
                 void* panel, const Device& device, cudaStream_t stream) {
  with_types(weight, [&]<class Number, class Shape>(Number, Shape) {
    const auto run = [&]<bool kElements>() {
      const TilePlan plan = plan_tiles(weight, row_begin, {rows, size.in_features},
                                       TileKernel{tile_threads<Shape>(false)}, device);
      launch("write_panel",
             plan.shared ? write_panel_kernel<Number, Shape, Source::kShared, kElements>
                         : write_panel_kernel<Number, Shape, Source::kGlobal, kElements>,
             plan.grid, stream, weight, plan.groups, plan.segments, static_cast<Number*>(panel));
    };
    weight.hash.block() < kSharedBlock ? run.template operator()<true>()
                                       : run.template operator()<false>();
  });
}

}  // namespace hfh::cuda
