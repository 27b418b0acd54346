#pragma once

#include "cuda/result.h"
#include "cuda/slot_operands.h"
#include "cuda/slot_products.h"
#include "cuda/slot_products_sums.h"

// A thread block takes a group of rows of one window. The window's slots stay in its registers, as
// operand "a" of the tensor cores. Columns come in chunks of words, each a column block of one
// input: all warps multiply their slots by the chunk and write the products to shared memory, then
// lanes take (row, column block) pairs, hash, and add up the products that these draw. Two thread
// blocks share a multiprocessor, so that one multiplies while the other adds.

namespace hfh::cuda::slots {

/// Column blocks of the virtual weight, of each of which the layer has columns begin to end - 1.
struct ColumnBlocks {
  uint32_t first;
  int count, begin, end;
};

struct Arguments {
  DeviceWeight weight;
  SlotProductsLinear linear;
  SlotProductsPlan plan;
  ColumnBlocks blocks[3];  // whole ones, and parts of one at either end
  float* parts;
  bool aligned;  // whole blocks of each input to 16 bytes
};

/// What is the same for all threads and seldom asked for, and so not worth registers.
struct State {
  int rows;
  int end;       // of the column blocks to take now
  bool careful;  // see RowSums
};

template <class Number>
struct SharedMemory {
  ProductTable<Number> table;
  char* inputs;          // two buffers
  uint32_t* row_keys;    // [kMaxRows]
  HashFunction* hashes;  // [kMaxHashes]
  State* state;

  __device__ __forceinline__ SharedMemory(uint32_t slots, int words, int block) {
    table = {shared_memory(), padded_slots(slots) * ProductTable<Number>::kSlotBytes};
    inputs = table.plane(words / kPlaneWords);
    row_keys = reinterpret_cast<uint32_t*>(inputs + 2 * input_bytes(words, block));
    hashes = reinterpret_cast<HashFunction*>(row_keys + kMaxRows);
    state = reinterpret_cast<State*>(hashes + kMaxHashes);
  }
};

inline size_t shared_bytes(uint32_t slots, int product_bytes, int words, int block) {
  return padded_slots(slots) * words * product_bytes + 2 * input_bytes(words, block) +
         kMaxRows * sizeof(uint32_t) + kMaxHashes * sizeof(HashFunction) + sizeof(State);
}

/// Starts to copy a chunk's inputs; zeros where there are none. All that is copied is in the layer
/// and aligned to 16 bytes.
template <int kBlock, int kBatch, int kWords>
__device__ __forceinline__ void stage_aligned(const Arguments& args, const ColumnBlocks& blocks,
                                              int first, char* buffer) {
  constexpr int kUnits = kBlock / kUnit, kAll = kWords * kUnits;
  const SlotProductsLinear& linear = args.linear;
  const int64_t column = (int64_t{blocks.first} + first) * kBlock - int64_t{args.weight.col_offset};
  const auto* input = static_cast<const uint16_t*>(linear.input) + column;
  const unsigned thread = opaque(threadIdx.x);
#pragma unroll
  for (unsigned begin = 0; begin < kAll; begin += kThreads) {
    const unsigned i = begin + thread;
    if (kAll < kThreads && i >= kAll) break;
    const unsigned word = i / kUnits, unit = i % kUnits;
    const unsigned sample = word % kBatch, block = word / kBatch;
    char* to = buffer + input_offset<kBlock>(word, unit);
    if (first + static_cast<int>(block) < blocks.count && sample < linear.batch) {
      copy_async16(to, input + sample * linear.in_features + (block * kBlock + unit * kUnit));
    } else {
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
  }
}

/// The same without asking for anything, number by number.
template <int kBlock, int kBatch, int kWords>
__device__ __forceinline__ void stage_any(const Arguments& args, const ColumnBlocks& blocks,
                                          int first, char* buffer) {
  const SlotProductsLinear& linear = args.linear;
#pragma unroll 1
  for (unsigned i = opaque(threadIdx.x); i < kWords * kBlock; i += kThreads) {
    const unsigned word = i / kBlock, in_block = i % kBlock, sample = word % kBatch;
    const int block = first + static_cast<int>(word / kBatch);
    const int64_t column =
        (int64_t{blocks.first} + block) * kBlock + in_block - int64_t{args.weight.col_offset};
    const bool inside =
        block < blocks.count && sample < linear.batch && column >= 0 && column < linear.in_features;
    const auto* input = static_cast<const uint16_t*>(linear.input);
    auto* unit = reinterpret_cast<uint16_t*>(buffer + input_offset<kBlock>(word, in_block / kUnit));
    unit[in_block % kUnit] = inside ? input[sample * linear.in_features + column] : uint16_t{0};
  }
}

/// The products of a chunk and all slots.
template <class Number, int kBlock, int kBatch>
__device__ __forceinline__ void multiply_slots(const SlotOperands<kBlock>& slots,
                                               uint32_t num_slots, const char* inputs,
                                               const ProductTable<Number>& table) {
  using Operands = SlotOperands<kBlock>;
  constexpr int kSteps = Operands::kSteps;
  constexpr int kStepsAtOnce = kSteps > 4 ? 2 : kSteps;
  // Registers are few where the sums take many.
  constexpr int kTilesAtOnce = Operands::kTiles > 1 && kBatch < 16 ? 2 : 1;
  constexpr uint32_t kSlotBytes = ProductTable<Number>::kSlotBytes;
  const unsigned thread = opaque(threadIdx.x), lane = thread % kWarpSize, m = lane / 4,
                 q = lane % 4;
#pragma unroll 1
  for (int plane = 0; plane < Lane<Number, kBatch>::kWords / kPlaneWords; ++plane) {
    char* products = table.plane(plane) + m * kSlotBytes + q * (kSlotBytes / 4);
    float d[Operands::kTiles][2][4] = {};
#pragma unroll
    for (int first = 0; first < kSteps; first += kStepsAtOnce) {
      uint32_t b[2][kStepsAtOnce][2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_operands<kBlock>(inputs, 2 * plane + j, first, lane, b[j]);
      }
#pragma unroll
      for (int i = 0; i < Operands::kTiles; i += kTilesAtOnce) {
        if (static_cast<uint32_t>(Operands::tile(thread, i) * kTile) >= num_slots) break;
#pragma unroll
        for (int step = 0; step < kStepsAtOnce; ++step) {
#pragma unroll
          for (int k = i; k < i + kTilesAtOnce; ++k) {
            multiply_add_k16<Number>(d[k][0], slots.words[k][first + step], b[0][step]);
            multiply_add_k16<Number>(d[k][1], slots.words[k][first + step], b[1][step]);
          }
        }
        if (first + kStepsAtOnce < kSteps) continue;
#pragma unroll
        for (int k = i; k < i + kTilesAtOnce; ++k) {
          if (static_cast<uint32_t>(Operands::tile(thread, k) * kTile) >= num_slots) break;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float* x = d[k][0] + 2 * half;
            const float* y = d[k][1] + 2 * half;
            char* to = products + (Operands::tile(thread, k) * kTile + half * 8) * kSlotBytes;
            if constexpr (kProductBytes<Number> == 2) {
              *reinterpret_cast<uint2*>(to) =
                  make_uint2(pack<BFloat16>(x[0], x[1]), pack<BFloat16>(y[0], y[1]));
            } else {
              *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], y[0], y[1]);
            }
          }
        }
      }
    }
  }
}

/// Products that are of no column block of the layer become zeros.
template <class Number, int kBatch>
__device__ __forceinline__ void clear_products(const ProductTable<Number>& table, int blocks) {
  constexpr uint32_t kSlotBytes = ProductTable<Number>::kSlotBytes;
  constexpr unsigned kWords = Lane<Number, kBatch>::kWords;
  using Product = std::conditional_t<kProductBytes<Number> == 2, uint16_t, uint32_t>;
#pragma unroll 1
  for (unsigned i = opaque(threadIdx.x); i < table.plane_bytes / kSlotBytes * kWords;
       i += kThreads) {
    const unsigned word = i % kWords, slot = i / kWords;
    if (static_cast<int>(word / kBatch) < blocks) continue;
    char* products = table.plane(word / kPlaneWords) + slot * kSlotBytes;
    reinterpret_cast<Product*>(products)[word % kPlaneWords] = 0;
  }
  __syncthreads();
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

template <class Number, int kBatch>
__device__ __forceinline__ void write_sums(const Arguments& args, const Task& task,
                                           const RowSums<kBatch>& sums) {
  const SlotProductsLinear& linear = args.linear;
  const Result<Number> result{static_cast<const Number*>(linear.bias),
                              static_cast<Number*>(linear.output), args.parts, linear.batch,
                              linear.out_features};
  const Lane<Number, kBatch> lane{static_cast<unsigned>(threadIdx.x)};
  const int m = static_cast<int>(lane.row_in_tile()), q = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile < RowSums<kBatch>::kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int in_tile = 2 * q + i % 2, pass = i / 2 * 2 + m / 4;
      const int in_group = lane.warp_row(pass) + in_tile;
      const int64_t sample = (4 * tile + m % 4) ^ lane.first_sample(in_tile);
      if (sample >= linear.batch || in_group >= task.rows) continue;
      result.write(task.part, sample, task.first_row + in_group, sums.d[tile][i]);
    }
  }
}

/// The sums of a thread block's rows over its part of the columns.
template <class Number, int kBlock, int kBatch>
__device__ __forceinline__ void sum_columns(const Arguments& args,
                                            const SharedMemory<Number>& shared,
                                            RowSums<kBatch>& sums) {
  using L = Lane<Number, kBatch>;
  const HashParams& hash = args.weight.hash;
  sums = {};
  SlotOperands<kBlock> slots;
#pragma unroll 1
  for (int piece = 0; piece < 3; ++piece) {
    const Task task = task_of(args, opaque(blockIdx.x));
    const bool last_part = task.part == args.plan.num_parts - 1;
    if (piece > 0 && !last_part) break;
    const ColumnBlocks& blocks = args.blocks[piece];
    const int per_part = args.plan.chunks_per_part * L::kBlocks;
    const int begin = piece == 0 ? task.part * per_part : 0;
    const int end = piece == 0 && !last_part ? begin + per_part : blocks.count;
    if (begin >= end) continue;
    const auto buffer_of = [&](int first) {
      const unsigned chunk = static_cast<unsigned>(first) / L::kBlocks;
      return shared.inputs + chunk % 2 * input_bytes(L::kWords, kBlock);
    };
    const auto stage = [&](int first) {
      if (piece == 0 && args.aligned) {
        stage_aligned<kBlock, kBatch, L::kWords>(args, blocks, first, buffer_of(first));
      } else {
        stage_any<kBlock, kBatch, L::kWords>(args, blocks, first, buffer_of(first));
      }
      copy_async_commit();
    };
    if (threadIdx.x == 0) shared.state->end = end;
    stage(begin);
    slots.load(args.weight, window_base(task.logical_row(args), hash), blocks.begin, blocks.end);
#pragma unroll 1
    for (int first = begin;; first += L::kBlocks) {
      copy_async_wait<0>();
      __syncthreads();
      const bool is_last = first + L::kBlocks >= shared.state->end;
      if (!is_last) stage(first + L::kBlocks);
      multiply_slots<Number, kBlock, kBatch>(slots, hash.draw_slots, buffer_of(first),
                                             shared.table);
      __syncthreads();
      const ChunkOfRows chunk{shared.row_keys, shared.hashes, shared.state->rows,
                              blocks.first + first, shared.state->careful};
      // They may be NaN.
      if (chunk.careful) clear_products<Number, kBatch>(shared.table, blocks.count - first);
      add_drawn_products<Number>(hash, shared.table, chunk, sums);
      if (is_last) break;
    }
  }
}

template <class Number, int kBlock, int kBatch>
__global__ void __launch_bounds__(kThreads, 2) slot_products_kernel(const Arguments args) {
  const HashParams& hash = args.weight.hash;
  const Task task = task_of(args, blockIdx.x);
  if (task.rows == 0) return;
  const SharedMemory<Number> shared(hash.draw_slots, Lane<Number, kBatch>::kWords, kBlock);
  static_assert(kMaxRows == kThreads);
  shared.row_keys[threadIdx.x] = row_key(task.logical_row(args) + threadIdx.x, hash.seed);
  if (threadIdx.x < static_cast<unsigned>(hash.num_hashes)) {
    const int u = threadIdx.x;
    shared.hashes[u] = {hash_lane(u), DrawnSums<Number, kBatch>::mix(theta_value(args.weight, u))};
  }
  if (threadIdx.x == 0) *shared.state = {task.rows, 0, false};
  RowSums<kBatch> sums;
#pragma unroll 1
  while (true) {
    sum_columns<Number, kBlock>(args, shared, sums);
    __syncthreads();
    const bool was_careful = shared.state->careful;
    __syncthreads();
    if (was_careful) break;
    if (!sums.all_finite()) shared.state->careful = true;
    __syncthreads();
    if (!shared.state->careful) break;
  }
  write_sums<Number, kBatch>(args, task_of(args, opaque(blockIdx.x)), sums);
}

}  // namespace hfh::cuda::slots
