#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/ptx.h"

// Neighbouring columns of a row as a lane holds them.

namespace hfh::cuda {

/// How many numbers are 16 bytes.
template <class Number>
inline constexpr int kVectorColumns = 16 / static_cast<int>(sizeof(Number));

/// Numbers as they lie in memory: 16 bytes of them, or one.
template <class Number, int kColumns>
struct Columns {
  static_assert(kColumns == 1 || kColumns == kVectorColumns<Number>);
  static constexpr int kWords = kColumns == 1 ? 1 : 4;
  static constexpr int kPerWord = kColumns == 1 ? 1 : 4 / static_cast<int>(sizeof(Number));

  uint32_t words[kWords];

  __device__ __forceinline__ void unpack_to(float (&x)[kColumns]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(Number) == 4) {
        x[w] = __uint_as_float(words[w]);
      } else {
        float low, high;
        unpack<Number>(words[w], low, high);
        x[w * kPerWord] = low;
        if constexpr (kPerWord == 2) x[w * kPerWord + 1] = high;
      }
    }
  }

  __device__ __forceinline__ static Columns pack_from(const float (&x)[kColumns]) {
    Columns columns;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(Number) == 4) {
        columns.words[w] = __float_as_uint(x[w]);
      } else {
        columns.words[w] = pack<Number>(x[w * kPerWord], kPerWord == 2 ? x[w * 2 + 1] : 0.0f);
      }
    }
    return columns;
  }

  /// Negates all of them where bit 31 of `sign` is set; its other bits are clear.
  __device__ __forceinline__ void flip(uint32_t sign) {
    const uint32_t mask = sizeof(Number) == 4 ? sign : sign | sign >> 16;
#pragma unroll
    for (uint32_t& word : words) word ^= mask;
  }
};

enum class Reuse { kLater, kNever };

/// Reads `from`, which is aligned to what it reads.
template <class Number, int kColumns, Reuse kReuse>
__device__ __forceinline__ Columns<Number, kColumns> load(const Number* from) {
  Columns<Number, kColumns> columns;
  if constexpr (kColumns > 1) {
    const auto* vector = reinterpret_cast<const uint4*>(from);
    const uint4 v = kReuse == Reuse::kNever ? load_streaming(vector) : __ldg(vector);
    columns.words[0] = v.x;
    columns.words[1] = v.y;
    columns.words[2] = v.z;
    columns.words[3] = v.w;
  } else if constexpr (sizeof(Number) == 4) {
    columns.words[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
  } else {
    columns.words[0] = __ldg(reinterpret_cast<const uint16_t*>(from));
  }
  return columns;
}

/// A matrix whose rows lanes read or write a few columns at a time, from whichever column on.
template <class Element>
struct Rows {
  using Number = std::remove_const_t<Element>;

  Element* data;
  int cols;
  bool aligned;  // all lanes' columns to 16 bytes, and none reach beyond a row

  /// Zeros for columns that there are not.
  template <int kColumns, Reuse kReuse>
  __device__ __forceinline__ Columns<Number, kColumns> read(int64_t row, int col) const {
    const Number* from = data + row * cols + col;
    Columns<Number, kColumns> columns{};
    if (kColumns == 1 || aligned) {
      if (has(col)) columns = load<Number, kColumns, kReuse>(from);
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (!has(col + j)) continue;
        const uint32_t word = load<Number, 1, kReuse>(from + j).words[0];
        constexpr int kPerWord = Columns<Number, kColumns>::kPerWord;
        columns.words[j / kPerWord] |= word << (32 / kPerWord * (j % kPerWord));
      }
    }
    return columns;
  }

  /// Leaves out columns that there are not.
  template <int kColumns>
  __device__ __forceinline__ void write(int64_t row, int col,
                                        const Columns<Number, kColumns>& columns) const {
    Element* to = data + row * cols + col;
    if constexpr (kColumns == 1) {
      if (has(col)) write_word(to, columns.words[0]);
    } else if (aligned) {
      const uint32_t* v = columns.words;
      if (has(col))
        store_streaming(reinterpret_cast<uint4*>(to), make_uint4(v[0], v[1], v[2], v[3]));
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        constexpr int kPerWord = Columns<Number, kColumns>::kPerWord;
        const uint32_t word = columns.words[j / kPerWord] >> (32 / kPerWord * (j % kPerWord));
        if (has(col + j)) write_word(to + j, word);
      }
    }
  }

  __device__ __forceinline__ bool has(int col) const {
    return static_cast<unsigned>(col) < static_cast<unsigned>(cols);
  }

 private:
  __device__ __forceinline__ static void write_word(Number* to, uint32_t word) {
    if constexpr (sizeof(Number) == 4) {
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(word);
    }
  }
};

}  // namespace hfh::cuda
