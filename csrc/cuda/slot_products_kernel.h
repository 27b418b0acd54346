#pragma once

#include "cuda/numbers.h"
#include "cuda/slot_operands.h"
#include "cuda/slot_products.h"

// A thread block takes a group of rows of one window. The window's slots stay in its registers, as
// operand "a" of the tensor cores. Columns come in chunks of kWords words, each a column block of
// one input: all warps multiply their slots by the chunk and write the products to shared memory,
// then lanes take (row, column block) pairs, hash, and add up the products that these draw. Two
// thread blocks share a multiprocessor, so that one multiplies while the other adds.

namespace hfh::cuda::slots {

inline constexpr int kSums = 16;                 // that a lane keeps
inline constexpr int kMaxRows = kSums * kWarps;  // of a thread block

/// Column blocks of the virtual weight, of each of which the layer has columns begin to end - 1.
struct ColumnBlocks {
  int64_t first;
  int count, begin, end;
};

struct Arguments {
  DeviceWeight weight;
  SlotProductsLinear linear;
  SlotProductsPlan plan;
  ColumnBlocks whole, partial[2];
  float* parts;
};

/// hash_lane and the mixing weight.
struct HashFunction {
  uint32_t lane;
  float mix;
};

struct SharedMemory {
  float* products;       // [2][slots][kHalfWords]
  char* inputs;          // two buffers
  uint32_t* row_keys;    // [kMaxRows]
  HashFunction* hashes;  // [kMaxHashes]
};

HFH_HOST_DEVICE uint32_t padded_slots(uint32_t slots) {
  return (slots + kTile - 1) / kTile * kTile;
}

inline size_t shared_bytes(uint32_t slots, int block) {
  return padded_slots(slots) * kWords * sizeof(float) + 2 * input_bytes(block) +
         kMaxRows * sizeof(uint32_t) + kMaxHashes * sizeof(HashFunction);
}

__device__ __forceinline__ SharedMemory carve_shared(uint32_t slots, int block) {
  SharedMemory shared;
  shared.products = reinterpret_cast<float*>(shared_memory());
  shared.inputs = shared_memory() + padded_slots(slots) * kWords * sizeof(float);
  shared.row_keys = reinterpret_cast<uint32_t*>(shared.inputs + 2 * input_bytes(block));
  shared.hashes = reinterpret_cast<HashFunction*>(shared.row_keys + kMaxRows);
  return shared;
}

/// The products of a chunk's words `half` * kHalfWords and on: rows of kHalfWords words, so that
/// eight lanes write two neighbouring rows of all 32 banks at once.
__device__ __forceinline__ float* products_of(const SharedMemory& shared, uint32_t slots,
                                              int half) {
  return shared.products + half * padded_slots(slots) * kHalfWords;
}

/// Starts to copy a chunk's inputs; zeros where there are none.
template <int kBlock, int kBatch>
__device__ __forceinline__ void stage_inputs(const Arguments& args, const ColumnBlocks& blocks,
                                             int first, char* buffer) {
  constexpr int kUnits = kBlock / kUnit;
  const SlotProductsLinear& linear = args.linear;
#pragma unroll 1
  for (unsigned begin = 0; begin < kWords * kUnits; begin += kThreads) {
    const unsigned i = begin + threadIdx.x;
    if (kWords * kUnits < kThreads && i >= kWords * kUnits) break;
    const unsigned word = i / kUnits, unit = i % kUnits, sample = word % kBatch;
    const int block = first + static_cast<int>(word / kBatch);
    char* to = buffer + input_offset<kBlock>(word, unit);
    const int64_t column =
        (blocks.first + block) * kBlock + unit * kUnit - int64_t{args.weight.col_offset};
    const bool wanted = block < blocks.count && sample < linear.batch;
    const auto* from =
        static_cast<const uint16_t*>(linear.input) + sample * linear.in_features + column;
    if (wanted && column >= 0 && column + kUnit <= linear.in_features &&
        reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      copy_async16(to, from);
      continue;
    }
    auto* numbers = reinterpret_cast<uint16_t*>(to);
#pragma unroll 1
    for (int j = 0; j < kUnit; ++j) {
      const bool inside = wanted && column + j >= 0 && column + j < linear.in_features;
      numbers[j] = inside ? from[j] : uint16_t{0};
    }
  }
  copy_async_commit();
}

/// The products of a chunk and all slots.
template <class Number, int kBlock>
__device__ __forceinline__ void multiply_slots(const SlotOperands<kBlock>& slots,
                                               uint32_t num_slots, const char* inputs,
                                               const SharedMemory& shared) {
  using Operands = SlotOperands<kBlock>;
  constexpr int kSteps = Operands::kSteps, kStepsAtOnce = kSteps > 4 ? 2 : kSteps;
  const int lane = threadIdx.x % kWarpSize, m = lane / 4, q = lane % 4;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    float* products = products_of(shared, num_slots, half) + m * kHalfWords + 4 * q;
    float d[Operands::kTiles][2][4] = {};
#pragma unroll
    for (int first = 0; first < kSteps; first += kStepsAtOnce) {
      uint32_t b[2][kStepsAtOnce][2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_operands<kBlock>(inputs, 2 * half + j, first, lane, b[j]);
      }
#pragma unroll
      for (int i = 0; i < Operands::kTiles; ++i) {
        const int tile = Operands::tile(i);
        if (static_cast<uint32_t>(tile * kTile) >= num_slots) break;
#pragma unroll
        for (int step = 0; step < kStepsAtOnce; ++step) {
          multiply_add_k16<Number>(d[i][0], slots.words[i][first + step], b[0][step]);
          multiply_add_k16<Number>(d[i][1], slots.words[i][first + step], b[1][step]);
        }
        if (first + kStepsAtOnce < kSteps) continue;
        float* to = products + tile * kTile * kHalfWords;
        *reinterpret_cast<float4*>(to) =
            make_float4(d[i][0][0], d[i][0][1], d[i][1][0], d[i][1][1]);
        *reinterpret_cast<float4*>(to + 8 * kHalfWords) =
            make_float4(d[i][0][2], d[i][0][3], d[i][1][2], d[i][1][3]);
      }
    }
  }
}

/// Neighbouring products; of eight, those of one half of 32 bytes first.
template <int kCount>
__device__ __forceinline__ void load_products(const char* products, uint32_t offset,
                                              float (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = *reinterpret_cast<const float*>(products + offset);
  } else if constexpr (kCount == 2) {
    const float2 loaded = *reinterpret_cast<const float2*>(products + offset);
    to[0] = loaded.x;
    to[1] = loaded.y;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 loaded =
          *reinterpret_cast<const float4*>(products + (offset ^ i * sizeof(float)));
      to[i] = loaded.x;
      to[i + 1] = loaded.y;
      to[i + 2] = loaded.z;
      to[i + 3] = loaded.w;
    }
  }
}

/// Lanes of a warp: kWords / kBatch column blocks side by side, of kBatch rows.
template <int kBatch>
struct Lanes {
  static constexpr int kBlocks = kWords / kBatch;
  static constexpr int kPasses = kSums / kBatch;
  __device__ __forceinline__ static int block() { return threadIdx.x % kBlocks; }
  __device__ __forceinline__ static int row(int pass) {
    return pass * kWarps * kBatch + threadIdx.x / kBlocks;
  }
  /// Whether the lane reads its eight products from the middle: every other row's lanes, so that
  /// eight lanes read from all banks.
  __device__ __forceinline__ static bool swaps() {
    return kBatch == 8 && threadIdx.x / kBlocks % 2 == 1;
  }
  /// The first of the warp's rows: the same for its lanes.
  __device__ __forceinline__ static int warp_row(int pass) {
    return (pass * kWarps + threadIdx.x / kWarpSize) * kBatch;
  }
};

/// sums[pass][sample] += the products that a lane's row and column block draw; of lanes with
/// Lane::swaps(), samples 4 and on come first. kHashes is 0 for any number.
template <int kHashes, int kBatch>
__device__ __forceinline__ void add_products(const HashParams& hash, const SharedMemory& shared,
                                             int rows, uint32_t block,
                                             float (&sums)[Lanes<kBatch>::kPasses][kBatch]) {
  using Lane = Lanes<kBatch>;
  const int word = Lane::block() * kBatch + (Lane::swaps() ? 4 : 0);
  const auto first_product =
      static_cast<uint32_t>(products_of(shared, hash.draw_slots, word / kHalfWords) +
                            word % kHalfWords - shared.products);
  const auto* products = reinterpret_cast<const char*>(shared.products);
  const auto add = [&](uint32_t key, uint32_t lane, float mix, float (&sum)[kBatch]) {
    const Draw<uint32_t> drawn = draw_in_window(key, lane, hash);
    const float factor = __uint_as_float(__float_as_uint(mix) ^ drawn.sign);
    const uint32_t offset =
        multiply_add(drawn.slot, kHalfWords * sizeof(float), first_product * sizeof(float));
    float product[kBatch];
    load_products(products, offset, product);
#pragma unroll
    for (int sample = 0; sample < kBatch; ++sample) {
      sum[sample] = fmaf(factor, product[sample], sum[sample]);
    }
  };
  float mix[kHashes > 0 ? kHashes : 1];
#pragma unroll
  for (int u = 0; u < kHashes; ++u) mix[u] = shared.hashes[u].mix;
#pragma unroll
  for (int pass = 0; pass < Lane::kPasses; ++pass) {
    if (Lane::warp_row(pass) >= rows) break;
    const uint32_t key = weight_key(shared.row_keys[Lane::row(pass)], block);
    if constexpr (kHashes > 0) {
#pragma unroll
      for (int u = 0; u < kHashes; ++u) add(key, hash_lane(u), mix[u], sums[pass]);
    } else {
#pragma unroll 1
      for (int u = 0; u < hash.num_hashes; ++u) {
        const HashFunction function = shared.hashes[u];
        add(key, function.lane, function.mix, sums[pass]);
      }
    }
  }
}

template <int kBatch>
__device__ __forceinline__ void add_drawn_products(const HashParams& hash,
                                                   const SharedMemory& shared, int rows,
                                                   uint32_t block,
                                                   float (&sums)[Lanes<kBatch>::kPasses][kBatch]) {
  // Eight samples leave too few registers to unroll, and hide the loop.
  if constexpr (kBatch < 8) {
    switch (hash.num_hashes) {
      case 1:
        return add_products<1, kBatch>(hash, shared, rows, block, sums);
      case 2:
        return add_products<2, kBatch>(hash, shared, rows, block, sums);
      case 4:
        return add_products<4, kBatch>(hash, shared, rows, block, sums);
    }
  }
  add_products<0, kBatch>(hash, shared, rows, block, sums);
}

/// What a thread block computes.
struct Task {
  int part;
  int64_t first_row;  // counted from the layer's first
  int rows;

  __device__ __forceinline__ uint32_t logical_row(const Arguments& args) const {
    return args.weight.row_offset + static_cast<uint32_t>(first_row);
  }
};

/// Cheap enough to ask again instead of keeping it in registers: of opaque(blockIdx.x).
__device__ __forceinline__ Task task_of(const Arguments& args, uint32_t thread_block) {
  const int64_t window_rows = args.weight.hash.rows_per_window;
  const uint32_t unit = thread_block / args.plan.num_parts;
  const int64_t window = unit / args.plan.groups_per_window;
  const int64_t group = unit % args.plan.groups_per_window;
  int64_t begin = 0, end = args.linear.out_features;
  if (window_rows > 0) {
    begin = (args.weight.row_offset / window_rows + window) * window_rows - args.weight.row_offset;
    end = min(end, begin + window_rows);
    begin = max(begin, int64_t{0});
  }
  begin += group * args.plan.rows_per_group;
  end = min(end, begin + args.plan.rows_per_group);
  return {static_cast<int>(thread_block % args.plan.num_parts), begin,
          static_cast<int>(max(end - begin, int64_t{0}))};
}

/// Adds up the sums of the lanes that share rows, and writes them.
template <class Number, int kBatch>
__device__ __forceinline__ void write_sums(const Arguments& args, const Task& task,
                                           float (&sums)[Lanes<kBatch>::kPasses][kBatch]) {
  using Lane = Lanes<kBatch>;
  const SlotProductsLinear& linear = args.linear;
#pragma unroll
  for (int pass = 0; pass < Lane::kPasses; ++pass) {
    if (Lane::warp_row(pass) >= task.rows) break;
#pragma unroll
    for (int sample = 0; sample < kBatch; ++sample) {
      float sum = sums[pass][sample];
#pragma unroll
      for (int distance = Lane::kBlocks / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, distance);
      }
      const int64_t input = sample ^ (Lane::swaps() ? 4 : 0);
      if (Lane::block() != 0 || Lane::row(pass) >= task.rows || input >= linear.batch) continue;
      const int64_t row = task.first_row + Lane::row(pass);
      const int64_t to = input * linear.out_features + row;
      if (args.parts != nullptr) {
        args.parts[task.part * linear.batch * linear.out_features + to] = sum;
      } else {
        if (linear.bias != nullptr) sum += to_float(static_cast<const Number*>(linear.bias)[row]);
        static_cast<Number*>(linear.output)[to] = from_float<Number>(sum);
      }
    }
  }
}

template <class Number, int kBlock, int kBatch>
__global__ void __launch_bounds__(kThreads, 2) slot_products_kernel(const Arguments args) {
  using Lane = Lanes<kBatch>;
  const HashParams& hash = args.weight.hash;
  const Task task = task_of(args, blockIdx.x);
  if (task.rows == 0) return;
  const SharedMemory shared = carve_shared(hash.draw_slots, kBlock);
  if (threadIdx.x < kMaxRows) {
    shared.row_keys[threadIdx.x] = row_key(task.logical_row(args) + threadIdx.x, hash.seed);
  }
  if (threadIdx.x < static_cast<unsigned>(hash.num_hashes)) {
    const int u = threadIdx.x;
    shared.hashes[u] = {hash_lane(u), theta_value(args.weight, u)};
  }
  SlotOperands<kBlock> slots;
  float sums[Lane::kPasses][kBatch] = {};
  const bool last_part = task.part == args.plan.num_parts - 1;
#pragma unroll 1
  for (int piece = 0; piece < (last_part ? 3 : 1); ++piece) {
    const Task piece_task = task_of(args, opaque(blockIdx.x));
    const ColumnBlocks blocks = piece == 0 ? args.whole : args.partial[piece - 1];
    const int per_part = args.plan.chunks_per_part * Lane::kBlocks;
    const int begin = piece == 0 ? piece_task.part * per_part : 0;
    const int end = piece == 0 && !last_part ? begin + per_part : blocks.count;
    if (begin >= end) continue;
    const auto buffer_of = [&](int chunk) {
      return shared.inputs + chunk / Lane::kBlocks % 2 * input_bytes(kBlock);
    };
    stage_inputs<kBlock, kBatch>(args, blocks, begin, buffer_of(begin));
    slots.load(args.weight, window_base(piece_task.logical_row(args), hash), blocks.begin,
               blocks.end);
#pragma unroll 1
    for (int first = begin; first < end; first += Lane::kBlocks) {
      const int next = first + Lane::kBlocks;
      copy_async_wait<0>();
      __syncthreads();
      if (next < end) stage_inputs<kBlock, kBatch>(args, blocks, next, buffer_of(next));
      multiply_slots<Number, kBlock>(slots, hash.draw_slots, buffer_of(first), shared);
      __syncthreads();
      const int block = first + Lane::block();
      // The products of blocks that are not the layer's may be NaN.
      if (block >= blocks.count) continue;
      const auto logical_block = static_cast<uint32_t>(blocks.first + block);
      add_drawn_products<kBatch>(hash, shared, task.rows, logical_block, sums);
    }
  }
  write_sums<Number, kBatch>(args, task_of(args, opaque(blockIdx.x)), sums);
}

}  // namespace hfh::cuda::slots
