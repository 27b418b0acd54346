#pragma once

#include <type_traits>

#include "cuda/slot_operands.h"

// Sums of the slot products that rows draw. A lane takes a row and a column block at a time; m =
// lane / 4 is its row in a tile of eight, and the lanes of a row take four column blocks. What one
// draws is added up in the lane; then the tensor cores add up the lanes' sums, in float32.

namespace hfh::cuda::slots {

inline constexpr int kRowTile = 8;                    // rows that a warp takes at once
inline constexpr int kPassRows = kWarps * kRowTile;   // and a thread block
inline constexpr int kPasses = 4;                     // that fill the sums' operand
inline constexpr int kMaxRows = kPasses * kPassRows;  // of a thread block
inline constexpr int kBlockGroup = 4;                 // column blocks that a warp takes at once

/// hash_lane and the mixing weight.
struct HashFunction {
  uint32_t lane;
  float mix;
};

/// The products of all slots with a chunk's words, in planes of kPlaneWords words. Neighbouring
/// slots of a plane fill all banks of shared memory: four of them, or two in float32.
template <class Number>
struct ProductTable {
  static constexpr uint32_t kSlotBytes = kPlaneWords * kProductBytes<Number>;

  char* products;  // [planes][slots][kPlaneWords]
  uint32_t plane_bytes;

  __device__ __forceinline__ char* plane(int i) const { return products + i * plane_bytes; }
};

HFH_HOST_DEVICE uint32_t padded_slots(uint32_t slots) {
  return (slots + kTile - 1) / kTile * kTile;
}

/// Words that lie beside each other; of eight, those of one half of 32 bytes first.
template <int kCount>
__device__ __forceinline__ void load_words(const char* from, uint32_t offset,
                                           uint32_t (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = *reinterpret_cast<const uint32_t*>(from + offset);
  } else if constexpr (kCount == 2) {
    const uint2 loaded = *reinterpret_cast<const uint2*>(from + offset);
    to[0] = loaded.x;
    to[1] = loaded.y;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(from + (offset ^ i * sizeof(uint32_t)));
      to[i] = loaded.x;
      to[i + 1] = loaded.y;
      to[i + 2] = loaded.z;
      to[i + 3] = loaded.w;
    }
  }
}

/// A row's sums of what one column block draws, for kBatch samples. Those of bfloat16 stay
/// bfloat16, and are rounded with each addition.
template <class Number, int kBatch>
struct DrawnSums {
  static constexpr int kPairs = kBatch == 1 ? 1 : kBatch / 2;
  static constexpr int kTerms = 1;

  uint32_t pairs[kPairs] = {};

  /// What factors are made of.
  __device__ __forceinline__ static float mix(float x) {
    return __uint_as_float(pack<BFloat16>(0.0f, x));
  }
  /// Adds `factor` times the products at an offset.
  __device__ __forceinline__ void add(float factor, const char* products, uint32_t offset) {
    uint32_t loaded[kPairs];
    if constexpr (kBatch == 1) {
      loaded[0] = *reinterpret_cast<const uint16_t*>(products + offset);
    } else {
      load_words(products, offset, loaded);
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pairs[i] = multiply_add_bfloat16(__float_as_uint(factor), loaded[i], pairs[i]);
    }
  }
  /// Pair i is the sum of kTerms pairs of bfloat16, of which this is the next.
  template <bool kCareful>
  __device__ __forceinline__ uint32_t take(int i) const {
    return pairs[i];
  }
};

/// Those of float16 are float32, and passed on in two pieces.
template <int kBatch>
struct DrawnSums<Float16, kBatch> {
  static constexpr int kTerms = 2;

  float sums[kBatch == 1 ? 2 : kBatch] = {};

  __device__ __forceinline__ static float mix(float x) { return x; }
  __device__ __forceinline__ void add(float factor, const char* products, uint32_t offset) {
    uint32_t loaded[kBatch];
    load_words(products, offset, loaded);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      sums[i] = fmaf(factor, __uint_as_float(loaded[i]), sums[i]);
    }
  }
  /// What is left may be NaN where the sum is not finite, unless kCareful.
  template <bool kCareful>
  __device__ __forceinline__ uint32_t take(int i) {
    const uint32_t pair = pack<BFloat16>(sums[2 * i], sums[2 * i + 1]);
    float first[2];
    unpack<BFloat16>(pair, first[0], first[1]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float& sum = sums[2 * i + j];
      sum -= first[j];
      if (kCareful && sum != sum) sum = 0.0f;
    }
    return pair;
  }
};

/// The sums of a warp's rows, as "d" of tensor core operations: with m = lane / 4 and q = lane % 4,
/// element 2 h + e of tile j is of sample 4 j + m % 4 and, in pass 2 h + m / 4, of the warp's row
/// 2 q + e. (See also Lane::first_sample.)
template <int kBatch>
struct RowSums {
  static constexpr int kTiles = kBatch <= 4 ? 1 : kBatch / 4;
  /// Samples of an operation.
  static constexpr int kSamples = kBatch <= 4 ? kBatch : 4;

  float d[kTiles][4] = {};

  /// Sums over k to add, of each tile: pairs of samples, or of column blocks where there is one
  /// sample.
  struct Terms {
    uint32_t b[kTiles][2];
  };

  /// Operand "a" that leads sums of a pass to their place in "d".
  struct Route {
    uint32_t a[4];
  };
  __device__ __forceinline__ static Route route(unsigned m, int pass) {
    const bool here = m / 4 == static_cast<unsigned>(pass) % 2, upper = pass < 2;
    const uint32_t first = here ? ones(m % 4, 0) : 0, second = here ? ones(m % 4, 1) : 0;
    return {{upper ? first : 0, upper ? 0 : first, upper ? second : 0, upper ? 0 : second}};
  }

  /// A number that is not finite makes the sums of other samples and passes NaN as well.
  __device__ __forceinline__ void add(const Terms& terms, const Route& route) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_add_k16<BFloat16>(d[tile], route.a, terms.b[tile]);
    }
  }

  /// The same where it reaches its own sum alone.
  __device__ __forceinline__ void add_carefully(const Terms& terms, unsigned m, int pass) {
    // A loop of its own for bench/compiled_cuda.py, which leaves it out.
#pragma unroll 1
    for (unsigned sample = opaque(0); sample < kSamples; ++sample) {
      const bool here = m == static_cast<unsigned>(pass) % 2 * 4 + sample;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        constexpr uint32_t kOnes = 0x3f803f80;
        const uint32_t only[2] = {ones(sample, 0) != 0 ? terms.b[tile][0] & mask(sample) : 0,
                                  ones(sample, 1) != 0 ? terms.b[tile][1] & mask(sample) : 0};
        float sums[4] = {};
        multiply_add_k16<BFloat16>(sums, {kOnes, kOnes, kOnes, kOnes}, only);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (here && i / 2 == pass / 2) d[tile][i] += sums[i];
        }
      }
    }
  }

  __device__ __forceinline__ bool all_finite() const {
    float zero = 0.0f;
#pragma unroll
    for (const float (&tile)[4] : d) {
#pragma unroll
      for (const float sum : tile) zero += sum - sum;
    }
    return zero == 0.0f;
  }

 private:
  /// The halves of a word of "b" that are of a sample.
  __device__ __forceinline__ static uint32_t mask(unsigned sample) {
    return kBatch == 1 ? 0xffffffff : sample % 2 == 0 ? 0x0000ffff : 0xffff0000;
  }
  /// Ones where word `word` of "b" holds a sample.
  __device__ __forceinline__ static uint32_t ones(unsigned sample, unsigned word) {
    const bool holds = sample < kSamples && (kBatch <= 2 || sample / 2 == word);
    return holds ? 0x3f803f80 & mask(sample) : 0;
  }
};

/// What a lane takes of a chunk.
template <class Number, int kBatch>
struct Lane {
  static constexpr int kWords = words_of_chunk(kProductBytes<Number>, kBatch);
  static constexpr int kBlocks = kWords / kBatch;
  static constexpr int kGroups = kBlocks / kBlockGroup;
  /// Groups whose sums fill operand "b".
  static constexpr int kStepGroups = kBatch >= 4 ? 1 : 4 / kBatch;

  unsigned thread;

  __device__ __forceinline__ unsigned row_in_tile() const { return thread % kWarpSize / 4; }
  /// The first of the warp's rows.
  __device__ __forceinline__ int warp_row(int pass) const {
    return pass * kPassRows + static_cast<int>(thread) / kWarpSize * kRowTile;
  }
  /// Of one or two samples, every other row begins in the other half of a plane's slot, so that the
  /// warp reads from all banks.
  __device__ __forceinline__ unsigned block(unsigned group) const {
    const unsigned m = row_in_tile(), q = thread % 4;
    if constexpr (kBatch == 1) {
      return group / 4 * 16 + (group / 2 % 2 ^ m % 2) * 8 + 2 * q + group % 2;
    } else if constexpr (kBatch == 2) {
      return group / 2 * 8 + (group % 2 ^ m % 2) * 4 + q;
    } else {
      return group * kBlockGroup + q;
    }
  }
  /// Of products of 32 bytes, every other row begins with the second half, so that eight lanes read
  /// from all banks.
  __device__ __forceinline__ static unsigned first_sample(unsigned row) {
    return kBatch * kProductBytes<Number> == 32 && row % 2 == 1 ? kBatch / 2 : 0;
  }
  __device__ __forceinline__ uint32_t product_offset(const ProductTable<Number>& table,
                                                     unsigned group) const {
    const unsigned word = block(group) * kBatch;
    return word / kPlaneWords * table.plane_bytes +
           (word % kPlaneWords + first_sample(row_in_tile())) * kProductBytes<Number>;
  }
};

/// What fills the operands "b" that add up what the lanes of a row drew.
template <bool kCareful, class Number, int kBatch>
__device__ __forceinline__ typename RowSums<kBatch>::Terms take_terms(
    DrawnSums<Number, kBatch> (&drawn)[Lane<Number, kBatch>::kStepGroups]) {
  typename RowSums<kBatch>::Terms terms;
#pragma unroll
  for (int tile = 0; tile < RowSums<kBatch>::kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kBatch == 1) {
        terms.b[tile][i] = __byte_perm(drawn[2 * i].template take<kCareful>(0),
                                       drawn[2 * i + 1].template take<kCareful>(0), 0x5410);
      } else if constexpr (kBatch == 2) {
        terms.b[tile][i] = drawn[i].template take<kCareful>(0);
      } else {
        terms.b[tile][i] = drawn[0].template take<kCareful>(2 * tile + i);
      }
    }
  }
  return terms;
}

/// What a chunk's products are added up for.
struct ChunkOfRows {
  const uint32_t* row_keys;
  const HashFunction* hashes;
  int rows;
  uint32_t first_block;  // of the virtual weight
  bool careful;          // see RowSums
};

/// sums += the products that rows and column blocks draw. kHashes is 0 for any number.
template <int kHashes, class Number, int kBatch>
__device__ __forceinline__ void add_products(const HashParams& hash,
                                             const ProductTable<Number>& table,
                                             const ChunkOfRows& chunk, RowSums<kBatch>& sums) {
  using L = Lane<Number, kBatch>;
  using Drawn = DrawnSums<Number, kBatch>;
  // Nothing that follows from it stays in registers over other work.
  const L lane{opaque(threadIdx.x)};
  const auto add = [&](uint32_t key, HashFunction function, uint32_t first, Drawn& to) {
    const Draw<uint32_t> draw = draw_in_window(key, function.lane, hash);
    const float factor = __uint_as_float(__float_as_uint(function.mix) ^ draw.sign);
    to.add(factor, table.products,
           multiply_add(draw.slot, ProductTable<Number>::kSlotBytes, first));
  };
  float mix[kHashes > 0 ? kHashes : 1];
#pragma unroll
  for (int u = 0; u < kHashes; ++u) mix[u] = chunk.hashes[u].mix;
#pragma unroll 1
  for (int pass = 0; lane.warp_row(pass) < chunk.rows; ++pass) {
    const uint32_t row_key = chunk.row_keys[lane.warp_row(pass) + lane.row_in_tile()];
    const typename RowSums<kBatch>::Route route = RowSums<kBatch>::route(lane.row_in_tile(), pass);
#pragma unroll
    for (unsigned step = 0; step < L::kGroups; step += L::kStepGroups) {
      Drawn drawn[L::kStepGroups];
#pragma unroll
      for (unsigned i = 0; i < L::kStepGroups; ++i) {
        const uint32_t key = weight_key(row_key, chunk.first_block + lane.block(step + i));
        const uint32_t first = lane.product_offset(table, step + i);
        if constexpr (kHashes > 0) {
#pragma unroll
          for (int u = 0; u < kHashes; ++u) add(key, {hash_lane(u), mix[u]}, first, drawn[i]);
        } else {
#pragma unroll 1
          for (int u = 0; u < hash.num_hashes; ++u) {
            add(key, chunk.hashes[u], first, drawn[i]);
          }
        }
      }
#pragma unroll
      for (int term = 0; term < Drawn::kTerms; ++term) {
        if (chunk.careful) {
          sums.add_carefully(take_terms<true, Number, kBatch>(drawn), lane.row_in_tile(), pass);
        } else {
          sums.add(take_terms<false, Number, kBatch>(drawn), route);
        }
      }
    }
  }
}

template <class Number, int kBatch>
__device__ __forceinline__ void add_drawn_products(const HashParams& hash,
                                                   const ProductTable<Number>& table,
                                                   const ChunkOfRows& chunk,
                                                   RowSums<kBatch>& sums) {
  switch (hash.num_hashes) {
    case 1:
      return add_products<1, Number>(hash, table, chunk, sums);
    case 2:
      return add_products<2, Number>(hash, table, chunk, sums);
    case 4:
      return add_products<4, Number>(hash, table, chunk, sums);
    default:
      return add_products<0, Number>(hash, table, chunk, sums);
  }
}

}  // namespace hfh::cuda::slots
