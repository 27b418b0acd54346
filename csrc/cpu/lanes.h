#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hfh/config.h"
#include "hfh/hash.h"
#include "hfh/params.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Lanes: what the kernels need of a vector unit, on the compiler's own vector types. Arithmetic is
// written with operators; a few operations that compilers do not find by themselves are spelt out
// for each instruction set.

HFH_NAMESPACE_BEGIN

#if defined(__AVX512F__)
inline constexpr int kFloatLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kFloatLanes = 8;
#else
inline constexpr int kFloatLanes = 4;
#endif

typedef float FloatVector __attribute__((vector_size(kFloatLanes * sizeof(float))));
typedef uint32_t UintVector __attribute__((vector_size(kFloatLanes * sizeof(float))));

/// SIMD lanes of float.
struct FloatLanes {
  using Scalar = float;
  using Vector = FloatVector;
  using Uint = UintVector;
  static constexpr int kCount = kFloatLanes;
};

/// One lane of double: gradcheck runs the kernels' own text in float64.
struct DoubleLane {
  using Scalar = double;
  using Vector = double;
  using Uint = uint32_t;
  static constexpr int kCount = 1;
};

/// Two vectors whose operations alternate: those of one fill the gaps in which the other waits.
template <class V>
struct VectorPair {
  V first, second;

  HFH_HOST_DEVICE friend VectorPair operator+(const VectorPair& x, const VectorPair& y) {
    return {x.first + y.first, x.second + y.second};
  }
  HFH_HOST_DEVICE VectorPair& operator+=(const VectorPair& x) { return *this = *this + x; }
  template <class T>
  HFH_HOST_DEVICE friend VectorPair operator*(T x, const VectorPair& y) {
    return {x * y.first, x * y.second};
  }
  template <class T>
  HFH_HOST_DEVICE friend VectorPair operator-(T x, const VectorPair& y) {
    return {x - y.first, x - y.second};
  }
};

/// x in every lane. (Not `V{} + x`: that would turn -0 into +0 and cost an addition.)
template <class V, class T>
HFH_HOST_DEVICE V splat(T x) {
  return x - V{};
}

/// x, as a whole vector whose origin the compiler cannot see. Of a broadcast it would otherwise
/// keep the scalar, and repeat the broadcast wherever registers run short.
HFH_HOST_DEVICE FloatVector opaque(FloatVector x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#endif
  return x;
}

template <class U>
HFH_HOST_DEVICE U splat_uint(uint32_t x) {
  return U{} + x;
}

template <class V, class T>
HFH_HOST_DEVICE V load(const T* source) {
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}

template <class V, class T>
HFH_HOST_DEVICE void store(T* target, V value) {
  std::memcpy(target, &value, sizeof(V));
}

/// `store` to an address aligned to V, past the caches where the machine can: what is written and
/// not soon read would push out what is. `fence_streams` comes before anybody reads.
template <class T, class V>
HFH_HOST_DEVICE void stream(T* target, V value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == sizeof(__m512)) return _mm512_stream_ps(target, (__m512)value);
#elif defined(__AVX2__)
  if constexpr (sizeof(V) == sizeof(__m256)) return _mm256_stream_ps(target, (__m256)value);
#endif
  store(target, value);
}

HFH_HOST_DEVICE void fence_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

HFH_HOST_DEVICE float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
HFH_HOST_DEVICE float to_float(float x) { return x; }
HFH_HOST_DEVICE double to_float(double x) { return x; }

/// To the nearest, ties to even; NaN stays NaN.
HFH_HOST_DEVICE BFloat16 round_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

/// Loads `V` from memory of another floating type.
template <class V, class T>
HFH_HOST_DEVICE V load_as(const T* source) {
  if constexpr (sizeof(V) == sizeof(double) && sizeof(T) == sizeof(double)) {
    return *source;
  } else if constexpr (sizeof(T) == sizeof(float)) {
    return load<V>(source);
  } else {
    typedef uint16_t Half __attribute__((vector_size(kFloatLanes * sizeof(uint16_t))));
#if defined(__AVX512F__)
    const UintVector wide = (UintVector)_mm512_cvtepu16_epi32((__m256i)load<Half>(source));
#elif defined(__AVX2__)
    const UintVector wide = (UintVector)_mm256_cvtepu16_epi32((__m128i)load<Half>(source));
#else
    const UintVector wide = __builtin_convertvector(load<Half>(source), UintVector);
#endif
    return (FloatVector)(wide << 16);
  }
}

/// Flips the sign where bit 31 of `sign` is set.
HFH_HOST_DEVICE FloatVector flip_sign(FloatVector x, UintVector sign) {
  return (FloatVector)((UintVector)x ^ sign);
}
HFH_HOST_DEVICE float flip_sign(float x, uint32_t sign) { return sign >> 31 ? -x : x; }
HFH_HOST_DEVICE double flip_sign(double x, uint32_t sign) { return sign >> 31 ? -x : x; }

// NaN must come out as NaN: hence max(0, x) in this order, which the x86 instruction resolves to x.
HFH_HOST_DEVICE FloatVector relu(FloatVector x) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x);
#elif defined(__AVX2__)
  return (FloatVector)_mm256_max_ps(_mm256_setzero_ps(), (__m256)x);
#else
  return x < 0.0f ? FloatVector{} : x;
#endif
}
HFH_HOST_DEVICE double relu(double x) { return x < 0.0 ? 0.0 : x; }

template <class V>
HFH_HOST_DEVICE VectorPair<V> relu(const VectorPair<V>& x) {
  return {relu(x.first), relu(x.second)};
}

template <class V>
HFH_HOST_DEVICE V zero_where_not_positive(V y, V gradient) {
  return y <= 0 ? V{} : gradient;
}

/// tanh as x P(x^2) / Q(x^2), fitted here by least squares on the relative error over |x| <= 9
/// (beyond, tanh is 1 in float): relative error at most 4e-7.
HFH_HOST_DEVICE FloatVector tanh_lanes(FloatVector x) {
  const FloatVector bound = splat<FloatVector>(9.0f);
  x = x > bound ? bound : x;
  x = x < -bound ? -bound : x;
  const FloatVector s = x * x;
  FloatVector p = s * 1.3355205830123396e-08f + 2.0609526472981088e-05f;
  p = p * s + 3.495617303997278e-03f;
  p = p * s + 0.13381050527095795f;
  p = p * s + 1.0f;
  FloatVector q = s * 7.776796451253176e-07f + 3.2856810139492154e-04f;
  q = q * s + 0.025877095758914948f;
  q = q * s + 0.4671436548233032f;
  q = q * s + 1.0f;
  return x * p / q;
}
HFH_HOST_DEVICE double tanh_lanes(double x) { return std::tanh(x); }

template <class V>
HFH_HOST_DEVICE VectorPair<V> tanh_lanes(const VectorPair<V>& x) {
  return {tanh_lanes(x.first), tanh_lanes(x.second)};
}

template <>
HFH_HOST_DEVICE Product<UintVector> wide_multiply(UintVector a, uint32_t b) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, y = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  return {(UintVector)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd),
          (UintVector)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32))};
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, y = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  return {(UintVector)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa),
          (UintVector)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
#else
  Product<UintVector> product;
  for (int lane = 0; lane < kFloatLanes; ++lane) {
    const Product<uint32_t> one = wide_multiply(uint32_t{a[lane]}, b);
    product.high[lane] = one.high;
    product.low[lane] = one.low;
  }
  return product;
#endif
}

/// pool[offset] in every lane.
template <class V, class T, class U>
HFH_HOST_DEVICE V gather(const T* pool, U offset) {
  if constexpr (sizeof(U) == sizeof(uint32_t)) {
    return to_float(pool[offset]);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == sizeof(float)) {
      return (V)_mm512_i32gather_ps((__m512i)offset, pool, sizeof(float));
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == sizeof(float)) {
      return (V)_mm256_i32gather_ps(pool, (__m256i)offset, sizeof(float));
    }
#endif
    V value;
    for (int lane = 0; lane < kFloatLanes; ++lane) value[lane] = to_float(pool[offset[lane]]);
    return value;
  }
}

/// values[index] in every lane; indices are below 2^31.
HFH_HOST_DEVICE UintVector gather_uint(const uint32_t* values, UintVector index) {
#if defined(__AVX512F__)
  return (UintVector)_mm512_i32gather_epi32((__m512i)index, values, sizeof(uint32_t));
#elif defined(__AVX2__)
  return (UintVector)_mm256_i32gather_epi32(reinterpret_cast<const int*>(values), (__m256i)index,
                                            sizeof(uint32_t));
#else
  UintVector value;
  for (int lane = 0; lane < kFloatLanes; ++lane) value[lane] = values[index[lane]];
  return value;
#endif
}

/// first, first + 1, ... in consecutive lanes.
template <class U>
HFH_HOST_DEVICE U count_from(uint32_t first) {
  if constexpr (sizeof(U) == sizeof(uint32_t)) {
    return first;
  } else {
    static constexpr uint32_t kCount[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load<U>(kCount) + first;
  }
}

HFH_HOST_DEVICE float horizontal_sum(FloatVector x) {
  float lanes[kFloatLanes];
  store(lanes, x);
  for (int width = kFloatLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}
HFH_HOST_DEVICE double horizontal_sum(double x) { return x; }

HFH_NAMESPACE_END
