#include "cuda/linear_elements.h"
#include "cuda/segments.h"
#include "cuda/small_batch.h"

namespace hfh::cuda {

namespace {

/// Of rows that a block of threads takes, so that their tiles share the input that a warp has
/// loaded. Each has a window of its own.
constexpr int kGroups = 2;

template <class Shape>
constexpr TileKernel element_kernel(int batch_tiles) {
  TileKernel kernel{batch_tiles > 2 || Shape::kHashesBound * batch_tiles > 4 ? 256 : 384};
  kernel.warp_bytes = sums_bytes(batch_tiles);
  kernel.groups = kGroups;
  // Shared memory reads 128 bytes a clock.
  kernel.weight_clocks = Shape::kHashesBound / 64.0;
  kernel.byte_clocks = 1.0 / 64;
  return kernel;
}

template <class Shape>
TileKernel element_kernel(const HashParams& hash, int batch_tiles) {
  TileKernel kernel = element_kernel<Shape>(batch_tiles);
  // Without windows the groups share what they draw from.
  kernel.copies = hash.rows_per_window == 0 ? 1 : kGroups;
  return kernel;
}

/// Where the groups' elements are.
template <class Number, Source kSource>
struct Windows {
  uint32_t base[kGroups];
  const char* elements[kGroups];

  __device__ __forceinline__ Windows(const DeviceWeight& weight,
                                     const RowGroup (&groups)[kGroups]) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) base[i] = window_base(groups[i].first, weight.hash);
    if constexpr (kSource == Source::kGlobal) {
      for (const char*& from : elements) from = static_cast<const char*>(weight.pool);
    } else {
      static_assert(kGroups == 2);
      auto* barriers = reinterpret_cast<CopyBarrier*>(shared_memory());
      char* first = shared_memory() + kBarrierBytes;
      const bool same = base[0] == base[1] || groups[1].rows == 0;
      char* second = first + (same ? 0 : drawn_bytes(weight.hash, sizeof(Number)));
      elements[0] = first;
      elements[1] = second;
      const WindowCopy<Number> copy(weight, base[0], barriers, first);
      if (!same) WindowCopy<Number>(weight, base[1], barriers + 1, second).wait();
      copy.wait();
    }
  }
};

/// A block of threads takes two groups of rows and a part of the columns; its warps take the part's
/// segments in turn and add up their sums at the end. `kHalves` as in TileMaker.
template <class Number, class Shape, Source kSource, bool kHalves, int kBatchTiles>
__global__ void __launch_bounds__(element_kernel<Shape>(kBatchTiles).threads, 1)
    linear_elements_kernel(DeviceWeight weight, RowGroups row_groups, Segments segments,
                           const Number* __restrict__ input, Result<Number> result) {
  const int part = static_cast<int>(blockIdx.x % segments.num_parts);
  const uint64_t first = uint64_t{blockIdx.x / segments.num_parts} * kGroups;
  const RowGroup groups[kGroups] = {row_groups.group(first), row_groups.group(first + 1)};
  const Windows<Number, kSource> windows(weight, groups);
  float mixing[Shape::kHashesBound];
#pragma unroll
  for (int u = 0; u < Shape::kHashesBound; ++u) mixing[u] = theta_value(weight, u);
  TileMaker<Number, Shape, kSource, false> tiles(weight, windows.base[0], windows.elements[0]);
  const uint32_t seed = weight.hash.seed;
  // Hashed again for each tile where there are no registers to keep the keys.
  const auto keys_of = [&](int group, int t) {
    const uint32_t first = groups[group].first + t * kTileRows;
    return RowKeys(kBatchTiles > 2 ? opaque(first) : first, seed);
  };

  constexpr bool kFew = Shape::kHashesBound <= 4 && kBatchTiles <= 2;
  constexpr int kAtOnce = kFew && kSource == Source::kSharedOnce ? 2 : 1;
  const Inputs<Number> inputs{input, result.batch, segments.in_features()};
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  Sums<kBatchTiles> sums[kGroups][kTiles] = {};
  for (int segment = segments.part_begin(part) + warp; segment < segments.part_begin(part + 1);
       segment += num_warps) {
    const uint32_t col = static_cast<uint32_t>(segment) * kSegment;
    const SegmentInputs<Number, kBatchTiles, true> x(inputs, col);
#pragma unroll
    for (int i = 0; i < kGroups * kTiles; ++i) {
      const int group = i / kTiles, t = i % kTiles;
      if (t * kTileRows >= groups[group].rows) continue;
      tiles.draw_from(windows.base[group], windows.elements[group]);
      tiles.template each_element<kHalves, kAtOnce>(
          keys_of(group, t), segments.col_offset + col,
          [&](int u, const uint32_t (&value)[2][2][4], const uint32_t (&sign)[2]) {
            // No more products at a time than there are registers for.
            constexpr int kCount = kBatchTiles < 2 ? kBatchTiles : 2;
            Sums<kBatchTiles>& to = sums[group][t];
#pragma unroll
            for (int first = 0; first < kBatchTiles; first += kCount) {
              Sums<kCount> products = {};
              multiply_tile(value, x, first, products);
#pragma unroll
              for (int j = 0; j < 4 * kCount; ++j) {
                const uint32_t factor = __float_as_uint(mixing[u]) ^ sign[j % 4 / 2];
                to.of[first + j / 4][j % 4] += __uint_as_float(factor) * products.of[j / 4][j % 4];
              }
            }
          });
    }
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    add_up_warps(sums[i], row_groups.out_row(groups[i]), groups[i].rows, part, result);
  }
}

/// Calls f<Number, Shape, batch tiles>() with those of the kernel.
template <class F>
void with_kernel(const DeviceWeight& weight, int64_t batch, const F& f) {
  with_types(weight, [&]<class Number, class Shape>(Number, Shape) {
    if constexpr (Shape::depth() == 1) {
      with_batch_tiles<Shape>(
          batch, [&]<int kBatchTiles>() { f.template operator()<Number, Shape, kBatchTiles>(); });
    }
  });
}

}  // namespace

int num_parts_of_elements(const DeviceWeight& weight, const LinearSmall& linear,
                          const Device& device) {
  int num_parts = 0;
  with_kernel(weight, linear.batch, [&]<class Number, class Shape, int kBatchTiles>() {
    const TileKernel kernel = element_kernel<Shape>(weight.hash, kBatchTiles);
    num_parts = plan_tiles(weight, 0, linear.size, kernel, device).segments.num_parts;
  });
  return num_parts;
}

void linear_elements(const DeviceWeight& weight, const LinearSmall& linear, float* workspace,
                     const Device& device, cudaStream_t stream) {
  with_kernel(weight, linear.batch, [&]<class Number, class Shape, int kBatchTiles>() {
    const TilePlan plan =
        plan_tiles(weight, 0, linear.size, element_kernel<Shape>(weight.hash, kBatchTiles), device);
    const bool halves = weight.hash.block() < kSegment;
    // From the pool, gathers bind: one kernel draws for each half.
    auto* kernel = linear_elements_kernel<Number, Shape, Source::kGlobal, true, kBatchTiles>;
    if (plan.shared) {
      kernel = halves
                   ? linear_elements_kernel<Number, Shape, Source::kSharedOnce, true, kBatchTiles>
                   : linear_elements_kernel<Number, Shape, Source::kSharedOnce, false, kBatchTiles>;
    }
    launch_small<Number>("linear_elements", kernel, weight, linear, plan, workspace, stream);
  });
}

}  // namespace hfh::cuda
