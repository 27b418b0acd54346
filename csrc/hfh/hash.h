#pragma once

#include <cstdint>

#include "hfh/config.h"
#include "hfh/params.h"

// Hash version 1: the one C++ text of DESIGN section 2. `U` is uint32_t or a vector of them, so the
// scalar code, the SIMD lanes and the GPU run the same lines.

HFH_NAMESPACE_BEGIN

inline constexpr uint32_t kGold = 0x9e3779b9u;

template <class U>
HFH_HOST_DEVICE constexpr U mix(U x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

/// The odd constant that makes hash function `hash` (counted from 0) differ from the others.
HFH_HOST_DEVICE constexpr uint32_t hash_lane(int hash) {
  return mix((static_cast<uint32_t>(hash) + 1u) * kGold) | 1u;
}

template <class U>
HFH_HOST_DEVICE constexpr U row_key(U row, uint32_t seed) {
  return mix(mix(row) ^ seed);
}

/// First slot of the window that `row` draws from; 0 without a window.
HFH_HOST_DEVICE constexpr uint32_t window_base(uint32_t row, const HashParams& params) {
  if (params.rows_per_window == 0) return 0;
  const uint32_t key = mix(params.seed ^ 0xc2b2ae35u) + (row / params.rows_per_window) * kGold;
  return static_cast<uint32_t>((uint64_t{key} * params.num_slots) >> 32);
}

template <class U>
HFH_HOST_DEVICE constexpr U weight_key(U row_key, U block_index) {
  return mix(row_key + block_index * kGold);
}

template <class U>
struct Product {
  U high;
  U low;
};

/// The 64-bit products a * b; vector types bring their own specialisation.
template <class U>
constexpr Product<U> wide_multiply(U a, uint32_t b);

template <>
HFH_HOST_DEVICE constexpr Product<uint32_t> wide_multiply(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  // One instruction. Of the 64-bit product nvcc adds up the halves where `b` is loop-invariant.
  return {__umulhi(a, b), a * b};
#else
  const uint64_t product = uint64_t{a} * b;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
#endif
}

template <class U>
struct Draw {
  U slot;
  U sign;  // bit 31 set: the element enters negated; all other bits clear
};

/// Slot and sign of one hash function, the slot counted from the window's first.
template <class U>
HFH_HOST_DEVICE constexpr Draw<U> draw_in_window(U key, uint32_t lane, const HashParams& params) {
  U hash = key * lane;
  hash ^= hash >> 15;
  hash *= 0x2c1b3c6du;
  const Product<U> product = wide_multiply(hash, params.draw_slots);
  return {product.high, product.low & 0x80000000u};
}

/// Slot and sign of one hash function. `base` is `window_base` of the row, or of each lane's row.
template <class U, class Base>
HFH_HOST_DEVICE constexpr Draw<U> draw(U key, uint32_t lane, Base base, const HashParams& params) {
  const Draw<U> drawn = draw_in_window(key, lane, params);
  // base and the draw are both below num_slots < 2^31: the sum cannot wrap.
  const U slot = drawn.slot + base;
  return {slot >= params.num_slots ? slot - params.num_slots : slot, drawn.sign};
}

HFH_NAMESPACE_END
