#include <algorithm>
#include <type_traits>

#include "cuda/numbers.h"
#include "cuda/slot_products.h"
#include "cuda/sum_parts.h"

// A thread block takes a group of rows of one window. The window's slots stay in its registers, as
// operand "a" of the tensor cores. Columns come in chunks of kWords words, each a column block of
// one input: all warps multiply their slots by the chunk and write the products to shared memory,
// then lanes take (row, column block) pairs, hash, and add up the products that these draw. Two
// thread blocks share a multiprocessor, so that one multiplies while the other adds.

namespace hfh::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTile = 16;               // slots of one tensor core operation
constexpr int kWords = 32;              // products of a slot in a chunk
constexpr int kHalfWords = kWords / 2;  // see products_of
constexpr int kSums = 16;               // that a lane keeps
constexpr int kMaxBatch = 8;
constexpr int64_t kMaxParts = 64;
constexpr int kMaxRows = kSums * kWarps;  // of a thread block
constexpr int kMinBlock = 16;
constexpr int kUnit = 8;  // numbers of a 16-byte access

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

HFH_HOST_DEVICE constexpr int tiles_of_warp(int block) { return block <= 64 ? 4 : 256 / block; }
constexpr int max_slots(int block) { return tiles_of_warp(block) * kWarps * kTile; }

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

HFH_HOST_DEVICE constexpr size_t input_bytes(int block) {
  return kWords * block * sizeof(uint16_t);
}

HFH_HOST_DEVICE uint32_t padded_slots(uint32_t slots) {
  return (slots + kTile - 1) / kTile * kTile;
}

size_t shared_bytes(uint32_t slots, int block) {
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

  __device__ __forceinline__ static int tile(int i) {
    return static_cast<int>(threadIdx.x) / kWarpSize + i * kWarps;
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
        const uint32_t draw = tile(i) * kTile + half * 8 + m;
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
/// lanes take operand "b". Words 4n + 2j and 4n + 2j + 1 of a half are columns 2n and 2n + 1 of its
/// tile j: a lane then gets four products of a slot that lie beside each other.
template <int kBlock>
__device__ __forceinline__ unsigned input_offset(unsigned word, unsigned unit) {
  const unsigned half = word / kHalfWords, in_half = word % kHalfWords;
  const unsigned tile = 2 * half + in_half / 2 % 2, column = in_half / 4 * 2 + in_half % 2;
  if constexpr (kBlock == 16) {
    return (tile * kWarpSize + column * 4) * 8 + unit * 16;
  } else {
    return ((tile * (kBlock / 32) + unit / 4) * kWarpSize + column * 4 + unit % 4) * 16;
  }
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
  }
  begin += group * args.plan.rows_per_group;
  end = min(end, begin + args.plan.rows_per_group);
  begin = max(begin, int64_t{0});
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
    __syncthreads();
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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The power of two of samples that the kernels are made for.
int padded_batch(int64_t batch) { return batch > 4 ? 8 : batch > 2 ? 4 : static_cast<int>(batch); }

/// The layer's column blocks: whole ones, and the parts of one at either end.
struct Columns {
  ColumnBlocks whole, partial[2];

  Columns(const DeviceWeight& weight, int64_t in_features) : whole{}, partial{} {
    const int64_t block = weight.hash.block(), begin = weight.col_offset;
    const int64_t end = begin + in_features, first = begin / block, last = end / block;
    const int before = static_cast<int>(begin % block), after = static_cast<int>(end % block);
    if (in_features == 0) return;
    const int64_t first_whole = first + (before > 0);
    whole = {first_whole, static_cast<int>(std::max(last - first_whole, int64_t{0})), 0,
             static_cast<int>(block)};
    if (before > 0) {
      partial[0] = {first, 1, before, first == last ? after : static_cast<int>(block)};
    }
    if (after > 0 && (before == 0 || first != last)) partial[1] = {last, 1, 0, after};
  }
};

template <class F>
void with_block(uint32_t block, const F& f) {
  switch (block) {
    case 16:
      return f(std::integral_constant<int, 16>());
    case 32:
      return f(std::integral_constant<int, 32>());
    case 64:
      return f(std::integral_constant<int, 64>());
    case 128:
      return f(std::integral_constant<int, 128>());
    default:
      return f(std::integral_constant<int, 256>());
  }
}

template <class F>
void with_batch(int64_t batch, const F& f) {
  switch (padded_batch(batch)) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 4:
      return f(std::integral_constant<int, 4>());
    default:
      return f(std::integral_constant<int, 8>());
  }
}

}  // namespace

std::string why_not_slot_products(const DeviceWeight& weight, const SlotProductsLinear& linear) {
  const HashParams& hash = weight.hash;
  const int block = static_cast<int>(hash.block());
  const auto number = [](auto value) { return std::to_string(value); };
  if (linear.dtype == DType::kFloat32 || weight.pool_dtype != linear.dtype) {
    return "slot products need a pool and an input of one type, bfloat16 or float16";
  }
  if (weight.reconstruct.depth != 1) {
    return "slot products need a linear network, not depth " + number(weight.reconstruct.depth);
  }
  if (block < kMinBlock) {
    return "slot products need blocks of " + number(kMinBlock) + " and more, not " + number(block);
  }
  if (hash.draw_slots > static_cast<uint32_t>(max_slots(block))) {
    return "slot products need windows of at most " + number(max_slots(block)) + " blocks of " +
           number(block) + ", not " + number(hash.draw_slots);
  }
  if (linear.batch > kMaxBatch) {
    return "slot products need a batch of at most " + number(kMaxBatch) + ", not " +
           number(linear.batch);
  }
  if (reinterpret_cast<uintptr_t>(weight.pool) % 16 != 0) {
    return "slot products need a pool aligned to 16 bytes";
  }
  return "";
}

SlotProductsPlan plan_slot_products(const DeviceWeight& weight, const SlotProductsLinear& linear,
                                    const Device& device) {
  const HashParams& hash = weight.hash;
  SlotProductsPlan plan{};
  const int batch = padded_batch(std::max(linear.batch, int64_t{1}));
  int64_t window_rows = linear.out_features;
  plan.num_windows = 1;
  if (hash.rows_per_window > 0 && linear.out_features > 0) {
    const int64_t rows = hash.rows_per_window, end = weight.row_offset + linear.out_features;
    plan.num_windows = ceil_div(end, rows) - weight.row_offset / rows;
    window_rows = std::min(window_rows, rows);
    if (plan.num_windows > 1) window_rows = rows;
  }
  plan.groups_per_window = static_cast<int>(std::max(ceil_div(window_rows, kMaxRows), int64_t{1}));
  const int64_t rows_at_once = kWarps * batch;
  plan.rows_per_group = static_cast<int>(
      ceil_div(ceil_div(window_rows, plan.groups_per_window), rows_at_once) * rows_at_once);
  // In units of a chunk: what a thread block takes to load its slots, and to launch another kernel.
  constexpr int64_t kLoad = 4, kAnotherKernel = 4;
  const int64_t chunks = std::max(
      ceil_div(Columns(weight, linear.in_features).whole.count, kWords / batch), int64_t{1});
  const int64_t groups = plan.num_windows * plan.groups_per_window;
  const int64_t resident = 2 * device.processors;
  int64_t least = 0;
  for (int64_t parts = 1; parts <= std::min(chunks, kMaxParts); ++parts) {
    const int64_t chunks_per_part = ceil_div(chunks, parts);
    if (ceil_div(chunks, chunks_per_part) != parts) continue;
    const int64_t cost = ceil_div(groups * parts, resident) * (chunks_per_part + kLoad) +
                         (parts > 1 ? kAnotherKernel : 0);
    if (parts == 1 || cost < least) {
      least = cost;
      plan.num_parts = static_cast<int>(parts);
      plan.chunks_per_part = static_cast<int>(chunks_per_part);
    }
  }
  return plan;
}

void slot_products(const DeviceWeight& weight, const SlotProductsLinear& linear,
                   const SlotProductsPlan& plan, float* workspace, cudaStream_t stream) {
  if (linear.batch == 0 || linear.out_features == 0) return;
  const Columns columns(weight, linear.in_features);
  const Arguments args{weight,
                       linear,
                       plan,
                       columns.whole,
                       {columns.partial[0], columns.partial[1]},
                       plan.num_parts == 1 ? nullptr : workspace};
  const uint32_t block = weight.hash.block();
  const int64_t blocks = plan.num_windows * plan.groups_per_window * plan.num_parts;
  const Grid grid{static_cast<unsigned>(blocks), kThreads,
                  shared_bytes(weight.hash.draw_slots, static_cast<int>(block))};
  const auto launch_for = [&](auto number, auto block_size, auto batch) {
    launch(
        "slot_products",
        slot_products_kernel<decltype(number), decltype(block_size)::value, decltype(batch)::value>,
        grid, stream, args);
  };
  with_block(block, [&](auto block_size) {
    with_batch(linear.batch, [&](auto batch) {
      if (linear.dtype == DType::kBFloat16) {
        launch_for(BFloat16{}, block_size, batch);
      } else {
        launch_for(Float16{}, block_size, batch);
      }
    });
  });
  if (plan.num_parts > 1) {
    sum_parts(workspace, plan.num_parts, linear.batch, linear.out_features, linear.bias,
              linear.dtype, linear.output, stream);
  }
}

}  // namespace hfh::cuda
