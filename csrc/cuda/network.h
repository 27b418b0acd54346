#pragma once

#include "cuda/ptx.h"
#include "cuda/scalar.h"
#include "cuda/weight.h"

namespace hfh::cuda {

/// g's parameters as operands of tensor instructions, in registers. What a lane owns of their
/// products, and why g's weights stand in blocks, is said in fragments.h.
template <class Number, class Shape>
class Network {
 public:
  static constexpr int kHashes = Shape::kHashesBound;
  static constexpr int kWidth = Shape::kWidthBound;
  static constexpr bool kIsLinear = Shape::depth() == 1;
  // Four elements of a weight enter a product at a time.
  static constexpr int kSteps = (kHashes + 3) / 4;
  static_assert(kIsLinear || (Shape::depth() == 2 && kWidth % 4 == 0 && kSteps == 1));

  __device__ __forceinline__ explicit Network(const DeviceWeight& weight) {
    const int lane = threadIdx.x % kWarpSize, m = lane / 4, q = lane % 4;
    const auto pair = [&weight](int i, bool both, bool here) {
      const float low = here ? theta_value(weight, i) : 0.0f;
      const float high = here && both ? theta_value(weight, i + 1) : 0.0f;
      return pack<Number>(low, high);
    };
#pragma unroll
    for (int tile = 0; tile < kFirstTiles; ++tile) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int u = 4 * step + 2 * half, hidden = 2 * tile + m % 2;
          const int row = kIsLinear ? 0 : hidden * kHashes;
          const bool here = u < kHashes && (kIsLinear ? m == 2 * q + tile : m / 2 == q);
          first_[tile][step][half] = pair(row + u, u + 1 < kHashes, here);
        }
      }
    }
    if constexpr (!kIsLinear) {
      const int bias = kHashes * kWidth, second = bias + kWidth;
#pragma unroll
      for (int i = 0; i < 2 * kWidth; ++i) {
        hidden_bias_[i / 4][i % 4] = theta_value(weight, bias + i / 4 * 2 + i % 2);
      }
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
#pragma unroll
        for (int j = 0; j < kWidth; j += 2) {
          second_[parity][j / 4][j % 4 / 2] = pair(second + j, true, m == 2 * q + parity);
        }
      }
      for (float& bias : bias_) bias = theta_value(weight, second + kWidth);
    }
  }

  /// What the sums of a pair of columns begin with.
  __device__ __forceinline__ const float* bias() const { return bias_; }

  /// d = c + what elements 4 step to 4 step + 3 contribute to g of one column in two, column
  /// `parity` of each lane's pairs, in rows m and m + 8. `a` are the elements as an operand.
  __device__ __forceinline__ void add(int step, int parity, const uint32_t (&a)[4], const float* c,
                                      float (&d)[4]) const {
    if constexpr (kIsLinear) {
      multiply_first(parity, step, a, c, d);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; j += 4) {
        uint32_t hidden[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int tile = j / 2 + half;
          float sums[4];
          multiply_first(tile, step, a, hidden_bias_[tile], sums);
          hidden[2 * half] = activated(sums[0], sums[1]);
          hidden[2 * half + 1] = activated(sums[2], sums[3]);
        }
        multiply_add_k16<Number>(d, hidden, second_[parity][j / 4], j == 0 ? c : d);
      }
    }
  }

 private:
  static constexpr int kFirstTiles = kIsLinear ? 2 : kWidth / 2;

  __device__ __forceinline__ void multiply_first(int tile, int step, const uint32_t (&a)[4],
                                                 const float* c, float (&d)[4]) const {
    if constexpr (kHashes <= 2) {
      multiply_add_k8<Number>(d, {a[0], a[1]}, first_[tile][step][0], c);
    } else {
      multiply_add_k16<Number>(d, a, first_[tile][step], c);
    }
  }

  __device__ __forceinline__ static uint32_t activated(float low, float high) {
    if constexpr (Shape::activation() == Activation::kReLU) {
      return pack_relu<Number>(low, high);
    } else {
      return pack<Number>(fast_tanh(low), fast_tanh(high));
    }
  }

  uint32_t first_[kFirstTiles][kSteps][2];
  uint32_t second_[2][kIsLinear ? 1 : kWidth / 4][2];
  float hidden_bias_[kWidth / 2 + 1][4];
  float bias_[4] = {};
};

}  // namespace hfh::cuda
