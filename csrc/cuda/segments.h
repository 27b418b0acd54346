#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/fragments.h"
#include "cuda/launch.h"
#include "cuda/linear.h"
#include "cuda/row_groups.h"

// How blocks of threads share a layer: a group of rows and a part of the columns each, whose
// segments their warps take in turn.

namespace hfh::cuda {

/// Of a group of rows.
inline constexpr int kTiles = kGroupRows / kTileRows;
static_assert(kTiles == 2);

/// Exchanges what belongs to the two tiles of a group. A loop over tiles that is not unrolled
/// cannot index registers: it works on the first and rotates.
template <class T>
__device__ __forceinline__ void rotate(T (&of_tiles)[kTiles]) {
  const T first = of_tiles[0];
  of_tiles[0] = of_tiles[1];
  of_tiles[1] = first;
}

/// Threads of a processor: as many as leave each the registers it needs, to which the launch bounds
/// of kernels over tiles hold the compiler. `other` says that the kernel keeps much beside the
/// weights.
template <class Shape>
constexpr int tile_threads(bool other) {
  return other || Shape::kHashesBound > 4 || Shape::kWidthBound > 4 ? 256 : 384;
}

/// The columns of the layer, which begin at a multiple of kSegment of the weight, in segments.
struct Segments {
  uint32_t col_offset;
  int32_t count;
  int32_t num_parts;

  HFH_HOST_DEVICE int64_t in_features() const { return int64_t{count} * kSegment; }
  HFH_HOST_DEVICE int32_t part_begin(int part) const {
    return static_cast<int32_t>(int64_t{count} * part / num_parts);
  }
};

/// Beside the elements in shared memory.
inline constexpr size_t kBarrierBytes = 128;

/// What the block's rows draw from, where kSource says.
template <class Number, Source kSource>
__device__ __forceinline__ const char* prepare_elements(const DeviceWeight& weight, uint32_t base) {
  if constexpr (kSource == Source::kGlobal) {
    return static_cast<const char*>(weight.pool);
  } else {
    char* elements = shared_memory() + kBarrierBytes;
    const WindowCopy<Number> copy(weight, base, reinterpret_cast<CopyBarrier*>(shared_memory()),
                                  elements);
    copy.wait();
    copy.add_negative();
    return elements;
  }
}

/// Why there are no tiles of a weight with so many columns; empty where there are.
inline std::string why_not_tiles(const DeviceWeight& weight, int64_t in_features) {
  if (weight.pool_dtype != DType::kBFloat16 && weight.pool_dtype != DType::kFloat16) {
    return "pool must be bfloat16 or float16";
  }
  if (in_features % kSegment != 0 || weight.col_offset % kSegment != 0) {
    return "in_features and col_offset must be multiples of " + std::to_string(kSegment) +
           ", received " + std::to_string(in_features) + " and " +
           std::to_string(weight.col_offset);
  }
  return why_not_shape(weight);
}

/// How a launch is cut.
struct TilePlan {
  RowGroups groups;
  Segments segments;
  bool shared;  // elements in shared memory
  Grid grid;
};

/// What a kernel over tiles asks of a processor, and what it takes there: counted for an H200.
struct TileKernel {
  int threads;            // that a processor runs
  size_t warp_bytes = 0;  // of shared memory for each warp at the end
  int groups = 1;         // of rows that a block of threads takes
  int copies = 2;         // of what a row can draw from
  double weight_clocks = 0.1;
  double byte_clocks = 0.05;  // to copy a byte of that; to negate and write it, at depth 2
};

/// How many parts of the columns make the fewest clocks: more parts fill a device whose processors
/// outnumber the blocks of rows, but every block of threads copies its elements again, and its
/// warps take whole segments.
inline int32_t best_num_parts(const TileKernel& kernel, int64_t row_blocks, int32_t segments,
                              int warps, int64_t blocks_at_once, size_t copied_bytes) {
  constexpr int32_t kMostParts = 64, kFewestSegments = 6;
  const double segment_weights = static_cast<double>(kernel.groups) * kGroupRows * kSegment;
  double fewest = 0.0;
  int32_t best = 1;
  for (int32_t parts = 1; parts <= kMostParts && parts * kFewestSegments <= segments; ++parts) {
    const int32_t of_part = (segments + parts - 1) / parts;
    const int32_t at_work = (of_part + warps - 1) / warps * warps;
    const int64_t waves = (row_blocks * parts + blocks_at_once - 1) / blocks_at_once;
    const double clocks =
        static_cast<double>(waves) * (at_work * segment_weights * kernel.weight_clocks +
                                      static_cast<double>(copied_bytes) * kernel.byte_clocks);
    if (parts == 1 || clocks < fewest) {
      fewest = clocks;
      best = parts;
    }
  }
  return best;
}

/// For rows [row_begin, row_begin + size.out_features) and all columns of a layer.
inline TilePlan plan_tiles(const DeviceWeight& weight, int64_t row_begin, const LayerSize& size,
                           const TileKernel& kernel, const Device& device) {
  const RowGroups groups(weight.hash, weight.row_offset + static_cast<uint64_t>(row_begin),
                         static_cast<uint64_t>(size.out_features));
  Segments segments{weight.col_offset, static_cast<int32_t>(size.in_features / kSegment), 1};
  constexpr size_t kElementBytes = 2;
  const size_t bytes = kernel.copies * drawn_bytes(weight.hash, kElementBytes);
  // Copied and read once: without reuse, shared memory gains nothing.
  const double gathered = static_cast<double>(kernel.groups) * kGroupRows *
                          static_cast<double>(size.in_features) * weight.hash.num_hashes *
                          kElementBytes;
  const bool shared =
      bytes + kBarrierBytes <= device.shared_bytes && static_cast<double>(bytes) <= gathered;
  const size_t room = shared ? kBarrierBytes + bytes : 0;
  // Two blocks a processor where both fit.
  const int at_once = 2 * room <= device.shared_bytes ? 2 : 1;
  const int threads = kernel.threads / at_once, warps = threads / kWarpSize;
  const int64_t row_blocks = (groups.count() + kernel.groups - 1) / kernel.groups;
  segments.num_parts = best_num_parts(kernel, row_blocks, segments.count, warps,
                                      int64_t{at_once} * device.processors, shared ? bytes : 0);
  return {groups,
          segments,
          shared,
          {row_blocks * segments.num_parts, threads, std::max(room, kernel.warp_bytes * warps)}};
}

/// Calls f(number, shape) with the types of a weight; false where there is no kernel for it.
template <class F>
bool with_types(const DeviceWeight& weight, const F& f) {
  return with_shape(weight, [&](auto shape) {
    if (weight.pool_dtype == DType::kBFloat16) {
      f(BFloat16{}, shape);
    } else {
      f(Float16{}, shape);
    }
  });
}

}  // namespace hfh::cuda
