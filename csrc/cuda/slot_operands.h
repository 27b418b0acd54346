#pragma once

#include "cuda/ptx.h"
#include "cuda/weight.h"

// What the tensor cores multiply for slot products: a window's slots, and column blocks of inputs.

namespace hfh::cuda::slots {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarps * kWarpSize;
inline constexpr int kTile = 16;        // slots of one tensor core operation
inline constexpr int kPlaneWords = 16;  // that a warp multiplies its slots by at once
inline constexpr int kUnit = 8;         // numbers of a 16-byte access

/// Of a product in shared memory: bfloat16 for bfloat16. The rounding averages out, and is 2^-8 at
/// most, too much for float16, whose range is too small in turn: these keep float32.
HFH_HOST_DEVICE constexpr int product_bytes(bool bfloat16) { return bfloat16 ? 2 : 4; }
template <class Number>
inline constexpr int kProductBytes = product_bytes(Number::kExponentBits == 8);

/// Column blocks of samples that a chunk multiplies slots by. Few samples take small chunks, of
/// which there are more to share out.
HFH_HOST_DEVICE constexpr int words_of_chunk(int product_bytes, int batch) {
  return product_bytes == 2 && batch > 4 ? 64 : 32;
}

HFH_HOST_DEVICE constexpr int tiles_of_warp(int block) { return block <= 64 ? 4 : 256 / block; }
constexpr int max_slots(int block) { return tiles_of_warp(block) * kWarps * kTile; }

HFH_HOST_DEVICE constexpr size_t input_bytes(int words, int block) {
  return words * block * sizeof(uint16_t);
}

/// 16 bits for each of two neighbouring columns of a block: ones inside [begin, end).
__device__ __forceinline__ uint32_t pair_mask(int column, int begin, int end) {
  const uint32_t low = column >= begin && column < end ? 0x0000ffffu : 0u;
  const uint32_t high = column + 1 >= begin && column + 1 < end ? 0xffff0000u : 0u;
  return low | high;
}

/// A warp's slots as operands "a". The order of the columns inside a block is free, as long as
/// "a" and "b" agree: lane / 4 = m and lane % 4 = q hold what lies in 16 bytes (of blocks of 16: 8)
/// beside each other.
template <int kBlock>
struct SlotOperands {
  static constexpr int kTiles = tiles_of_warp(kBlock);
  static constexpr int kSteps = kBlock / 16;
  uint32_t words[kTiles][kSteps][4];

  /// Tile i of a thread's warp.
  __device__ __forceinline__ static int tile(unsigned thread, int i) {
    return static_cast<int>(thread / kWarpSize) + i * kWarps;
  }

  /// Columns that the layer has not are zero, whatever the pool holds there. (Slots past the last
  /// that is drawn hold anything.)
  __device__ __forceinline__ void load(const DeviceWeight& weight, uint32_t base, int begin,
                                       int end) {
    const HashParams& hash = weight.hash;
    const int m = threadIdx.x % kWarpSize / 4, q = threadIdx.x % 4;
    const auto* pool = static_cast<const char*>(weight.pool);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t draw = tile(threadIdx.x, i) * kTile + half * 8 + m;
        const uint32_t slot = base + (draw < hash.draw_slots ? draw : 0);
        // Bytes: fewer than 2^32, as the pool has fewer than 2^31 numbers.
        const uint32_t row =
            (slot >= hash.num_slots ? slot - hash.num_slots : slot) * (2 * kBlock) +
            (kBlock == 16 ? 8 : 16) * q;
        if constexpr (kBlock == 16) {
          const uint2 loaded = *reinterpret_cast<const uint2*>(pool + row);
          words[i][0][half] = loaded.x;
          words[i][0][half + 2] = loaded.y;
        } else {
#pragma unroll
          for (int step = 0; step < kSteps; step += 2) {
            const uint4 loaded = *reinterpret_cast<const uint4*>(pool + row + 32 * step);
            words[i][step][half] = loaded.x;
            words[i][step][half + 2] = loaded.y;
            words[i][step + 1][half] = loaded.z;
            words[i][step + 1][half + 2] = loaded.w;
          }
        }
      }
    }
    // Also of whole blocks: the loads' registers are not in the operands' order, and the compiler
    // would move them for each use.
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int column =
            kBlock == 16 ? 4 * q + 2 * pair : step / 2 * 32 + 8 * q + step % 2 * 4 + 2 * pair;
        const uint32_t mask = pair_mask(column, begin, end);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          words[i][step][2 * pair] &= mask;
          words[i][step][2 * pair + 1] &= mask;
        }
      }
    }
  }
};

/// Where 16 bytes of a word's block lie in the inputs' buffer, which is in the order in which
/// lanes take operand "b". Words 4n + 2j and 4n + 2j + 1 of a plane are columns 2n and 2n + 1 of
/// its tile j: a lane then gets four products of a slot that lie beside each other.
template <int kBlock>
__device__ __forceinline__ unsigned input_offset(unsigned word, unsigned unit) {
  const unsigned plane = word / kPlaneWords, in_plane = word % kPlaneWords;
  const unsigned tile = 2 * plane + in_plane / 2 % 2, column = in_plane / 4 * 2 + in_plane % 2;
  if constexpr (kBlock == 16) {
    return (tile * kWarpSize + column * 4) * 8 + unit * 16;
  } else {
    return ((tile * (kBlock / 32) + unit / 4) * kWarpSize + column * 4 + unit % 4) * 16;
  }
}

/// Operand "b" of a tile of eight words, for some steps of 16 columns.
template <int kBlock, int kCount>
__device__ __forceinline__ void load_operands(const char* inputs, int tile, int first, int lane,
                                              uint32_t (&b)[kCount][2]) {
  if constexpr (kBlock == 16) {
    const uint2 loaded =
        *reinterpret_cast<const uint2*>(inputs + (tile * kWarpSize + lane) * sizeof(uint2));
    b[0][0] = loaded.x;
    b[0][1] = loaded.y;
  } else {
#pragma unroll
    for (int step = 0; step < kCount; step += 2) {
      const int row = tile * (kBlock / 32) + (first + step) / 2;
      const uint4 loaded =
          *reinterpret_cast<const uint4*>(inputs + (row * kWarpSize + lane) * sizeof(uint4));
      b[step][0] = loaded.x;
      b[step][1] = loaded.y;
      b[step + 1][0] = loaded.z;
      b[step + 1][1] = loaded.w;
    }
  }
}

}  // namespace hfh::cuda::slots
