#pragma once

#include "cuda/network.h"
#include "cuda/ptx.h"
#include "cuda/weight.h"

// Tiles of a virtual weight, made by a warp on the tensor cores in the layout of their operands.
//
// A tile is 16 rows by a segment of 64 columns. With m = lane / 4 and q = lane % 4, a lane owns
// rows m and m + 8, and of each the chunks of 8 columns q and q + 4. It gathers the elements of its
// own weights, 16 bytes at a time, and supplies them to the product of g's first layer as four
// consecutive k: the other lanes of a row are other groups of k, and g's weights stand in a block
// of their own for each group. A tensor instruction makes one layer of 64 weights, and the sums
// come out in the lane that owns the weight, ready to be the next product's operand.

namespace hfh::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kSegment = 64;
inline constexpr int kChunk = 8;
/// The smallest block whose columns are gathered by chunks.
inline constexpr uint32_t kSharedBlock = 32;

/// Where a tile's elements are gathered from.
enum class Source {
  kGlobal,      // the pool
  kShared,      // what a row can draw from, and then its negative, in shared memory
  kSharedOnce,  // what a row can draw from, in shared memory
};

/// Hash keys of the two rows of a tile that a lane owns.
struct RowKeys {
  uint32_t key[2];

  /// Of the tile whose logical rows begin at `first`.
  __device__ __forceinline__ RowKeys(uint32_t first, uint32_t seed) {
    const uint32_t row = first + threadIdx.x % kWarpSize / 4;
    key[0] = row_key(row, seed);
    key[1] = row_key(row + 8, seed);
  }
};

/// Makes tiles of the rows of one window.
template <class Number, class Shape, Source kSource, bool kElements>
class TileMaker {
 public:
  static constexpr int kHashes = Shape::kHashesBound;

  /// `elements` is what kSource says; `base` the window's, of no meaning where it is copied.
  __device__ __forceinline__ TileMaker(const DeviceWeight& weight, uint32_t base,
                                       const char* elements)
      : hash_(weight.hash),
        base_(base),
        elements_(elements),
        lane_(opaque(threadIdx.x % kWarpSize)),
        m_(opaque(lane_ / 4)),
        q_(opaque(lane_ % 4)) {
    // Opaque: kept in a register instead of computed again for every tile.
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      own_hash_[i] = opaque(hash_lane(kHashes < 4 ? q_ % kHashes : q_ + 4 * i));
    }
  }

  /// From here on; as in the constructor.
  __device__ __forceinline__ void draw_from(uint32_t base, const char* elements) {
    base_ = base;
    elements_ = elements;
  }

  /// The chunk of the segment that a lane's values of `turn` 0 or 1 belong to. Lanes of even rows
  /// begin with the first half of the segment, those of odd rows with the second: eight lanes that
  /// read together then read from all banks of the shared memory.
  __device__ __forceinline__ int chunk(int turn) const {
    return static_cast<int>(q_ + 4 * (turn ^ (m_ & 1)));
  }

  /// Weights of the segment that begins at logical column `col`: value[i][turn] holds the chunk of
  /// row m + 8 i, a pair of columns a word.
  __device__ __forceinline__ void make(const Network<Number, Shape>& g, const RowKeys& keys,
                                       uint32_t col, uint32_t (&value)[2][2][4]) const {
    if constexpr (kElements) {
      make_by_columns(g, keys, col, value);
    } else {
      make_by_chunks(g, keys, col, value);
    }
  }

  /// Calls f(u, value, sign) with element u of the same weights, laid out as they are, but without
  /// their signs: bit 31 of sign[i] is that of row m + 8 i. A product with a linear g needs no
  /// weights: it is the mixture of the products with their elements. `kHalves` where blocks are
  /// half a segment; kAtOnce elements are gathered at a time, as many as there are registers for.
  template <bool kHalves, int kAtOnce, class F>
  __device__ __forceinline__ void each_element(const RowKeys& keys, uint32_t col,
                                               const F& f) const {
    static_assert(!kElements && kSource != Source::kShared);
    const uint32_t chunks[2] = {col + kChunk * chunk(0), col + kChunk * chunk(1)};
    const char* from[2] = {column(chunks[0]), column(chunks[1])};
    uint32_t draws[2][2][kHashes];
    draw_chunk(keys, chunks[0], draws[0]);
    if constexpr (kHalves) draw_chunk(keys, chunks[1], draws[1]);
#pragma unroll
    for (int u = 0; u < kHashes; ++u) {
      // As in make_by_chunks.
      if (u % kAtOnce == 0) __syncwarp();
      uint32_t value[2][2][4], sign[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        sign[row] = draws[0][row][u] & kSign;
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {
          load_chunk(from[turn], draws[kHalves ? turn : 0][row][u], value[row][turn]);
        }
        if constexpr (kHalves) flip(draws[0][row][u] ^ draws[1][row][u], value[row][1]);
      }
      f(u, value, sign);
    }
  }

 private:
  static constexpr int kSteps = Network<Number, Shape>::kSteps;
  static constexpr uint32_t kSign = 0x80000000u;

  __device__ __forceinline__ void make_by_chunks(const Network<Number, Shape>& g,
                                                 const RowKeys& keys, uint32_t col,
                                                 uint32_t (&value)[2][2][4]) const {
    uint32_t draws[2][kHashes];
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      const uint32_t from = col + kChunk * chunk(turn);
      if (turn == 0 || hash_.log2_block < 6) draw_chunk(keys, from, draws);
      float d[4][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        // Keeps the compiler from gathering more at a time than there are registers for.
        __syncwarp();
        uint32_t a[2][4][4];
        gather(step, from, draws, a);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          uint32_t of_word[2][4];
#pragma unroll
          for (int i = 0; i < 8; ++i) of_word[i / 4][i % 4] = a[i / 4][i % 4][word];
          add_pair(g, step, of_word, d[word]);
        }
      }
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        value[0][turn][word] = pack<Number>(d[word][0], d[word][1]);
        value[1][turn][word] = pack<Number>(d[word][2], d[word][3]);
      }
    }
  }

  /// The same where blocks are smaller than kSharedBlock: every column draws for itself. A pair of
  /// columns at a time, for that is much work: unrolled, it takes more registers than there are.
  __device__ __forceinline__ void make_by_columns(const Network<Number, Shape>& g,
                                                  const RowKeys& keys, uint32_t col,
                                                  uint32_t (&value)[2][2][4]) const {
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      uint32_t words[2][4] = {};
#pragma unroll 1
      for (int word = 0; word < 4; ++word) {
        float d[4];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t a[2][4];
          gather_pair(step, keys, col + kChunk * chunk(turn) + 2 * word, a);
          add_pair(g, step, a, d);
        }
        // A loop cannot index registers: what comes moves the others on.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int w = 0; w < 3; ++w) words[i][w] = words[i][w + 1];
          words[i][3] = pack<Number>(d[2 * i], d[2 * i + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i / 4][turn][i % 4] = words[i / 4][i % 4];
    }
  }

  /// Adds what elements 4 step to 4 step + 3 contribute to a pair of columns: a[i][k] is element
  /// 4 step + k of both, of row m + 8 i. In step 0, d begins with g's bias.
  __device__ __forceinline__ void add_pair(const Network<Number, Shape>& g, int step,
                                           const uint32_t (&a)[2][4], float (&d)[4]) const {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      // In the order of an operand: rows m and m + 8 of elements 0 and 1, then of 2 and 3.
      uint32_t operand[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int u = i / 2 * 2;
        operand[i] = __byte_perm(a[i % 2][u], a[i % 2][u + 1], parity == 0 ? 0x5410 : 0x7632);
      }
      g.add(step, parity, operand, step + parity == 0 ? g.bias() : d, d);
    }
  }

  /// Where a slot's elements begin, in bytes, those of its negative where the sign is; where there
  /// is no negative in elements, and the sign is left as bit 31.
  __device__ __forceinline__ uint32_t place(uint32_t key, uint32_t lane_constant) const {
    if constexpr (kSource == Source::kShared) {
      const Draw<uint32_t> one = draw_in_window(key, lane_constant, hash_);
      return (one.slot + (one.sign != 0 ? hash_.draw_slots : 0)) * slot_bytes();
    }
    const Draw<uint32_t> one = kSource == Source::kGlobal
                                   ? draw(key, lane_constant, base_, hash_)
                                   : draw_in_window(key, lane_constant, hash_);
    return one.slot << hash_.log2_block | one.sign;
  }

  __device__ __forceinline__ uint32_t slot_bytes() const {
    return static_cast<uint32_t>(sizeof(Number)) << hash_.log2_block;
  }

  /// The element of slot 0 that belongs to a column.
  __device__ __forceinline__ const char* column(uint32_t col) const {
    return elements_ + (col & (hash_.block() - 1)) * sizeof(Number);
  }

  /// That of the slot at `place`.
  __device__ __forceinline__ const char* element(const char* column, uint32_t place) const {
    static_assert(sizeof(Number) == 2);
    if constexpr (kSource == Source::kGlobal) {
      return reinterpret_cast<const char*>(reinterpret_cast<const Number*>(column) +
                                           (place & ~kSign));
    }
    return column + (kSource == Source::kShared ? place : place << 1);
  }

  /// The draws of the block of the chunk at `col`, for both rows. The four lanes of a row are in
  /// one block of at least kSharedBlock columns: each draws some and tells the others.
  __device__ __forceinline__ void draw_chunk(const RowKeys& keys, uint32_t col,
                                             uint32_t (&draws)[2][kHashes]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t key = weight_key(keys.key[i], col >> hash_.log2_block);
      uint32_t own[kSteps];
#pragma unroll
      for (int j = 0; j < kSteps; ++j) own[j] = place(key, own_hash_[j]);
#pragma unroll
      for (int u = 0; u < kHashes; ++u) {
        draws[i][u] = __shfl_sync(kFullWarp, own[u / 4], (lane_ & ~3) | (u % 4));
      }
    }
  }

  /// Negates numbers in pairs where bit 31 of `sign` is set.
  __device__ __forceinline__ static void flip(uint32_t sign, uint32_t (&words)[4]) {
    const uint32_t signs = (sign & kSign) | (sign & kSign) >> 16;
#pragma unroll
    for (uint32_t& word : words) word ^= signs;
  }

  /// A chunk of what is at `place`, as it lies there, a pair of columns a word.
  __device__ __forceinline__ void load_chunk(const char* column, uint32_t place,
                                             uint32_t (&words)[4]) const {
    const uint4 chunk = *reinterpret_cast<const uint4*>(element(column, place));
    words[0] = chunk.x;
    words[1] = chunk.y;
    words[2] = chunk.z;
    words[3] = chunk.w;
  }

  /// a[i][k]: element 4 step + k of the chunk of row m + 8 i, a pair of columns a word; those that
  /// there are not are 0.
  __device__ __forceinline__ void gather(int step, uint32_t col,
                                         const uint32_t (&draws)[2][kHashes],
                                         uint32_t (&a)[2][4][4]) const {
    const char* from = column(col);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int u = 4 * step + i % 4;
      if (u < kHashes) {
        const uint32_t one = draws[i / 4][u % kHashes];
        load_chunk(from, one, a[i / 4][i % 4]);
        if constexpr (kSource == Source::kGlobal) flip(one, a[i / 4][i % 4]);
      } else {
        for (uint32_t& word : a[i / 4][i % 4]) word = 0;
      }
    }
  }

  /// A word of each, of the pair of columns at `col`, which draw for themselves.
  __device__ __forceinline__ void gather_pair(int step, const RowKeys& keys, uint32_t col,
                                              uint32_t (&a)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t at = col + e, key = weight_key(keys.key[i], at >> hash_.log2_block);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          uint32_t bits = 0;
          if (4 * step + k < kHashes) {
            const uint32_t one = place(key, hash_lane(4 * step + k));
            bits = *reinterpret_cast<const uint16_t*>(element(column(at), one));
            if constexpr (kSource == Source::kGlobal) bits ^= (one & kSign) >> 16;
          }
          a[i][k] = e == 0 ? bits : a[i][k] | bits << 16;
        }
      }
    }
  }

  HashParams hash_;
  uint32_t base_;
  const char* elements_;
  uint32_t lane_, m_, q_;
  uint32_t own_hash_[kSteps];
};

}  // namespace hfh::cuda
