#pragma once

#include "cpu/kernels.h"
#include "cpu/lanes.h"

// What the passes over inputs side by side share; see slots.cpp.

HFH_NAMESPACE_BEGIN

inline constexpr int kBatchLanes = cpu::BatchSlotProducts::kInputs;
inline constexpr int kBatchVectors = kBatchLanes / kFloatLanes;

/// What the sign of each hash function's draw is put on: g's weights, or 1.
struct SignedFactors {
  FloatVector values[kMaxHashes];

  SignedFactors() {
    for (FloatVector& value : values) value = splat<FloatVector>(1.0f);
  }
  explicit SignedFactors(const VirtualWeight& weight) {
    const auto* theta = static_cast<const float*>(weight.theta);
    for (int u = 0; u < weight.hash.num_hashes; ++u) values[u] = splat<FloatVector>(theta[u]);
  }
};

/// The draws of kFloatLanes rows in one block. Rows past the weight's last have draws too.
struct RowDraws {
  uint32_t slots[kMaxHashes][kFloatLanes];
  float factors[kMaxHashes][kFloatLanes];

  RowDraws(const VirtualWeight& weight, int64_t row, uint32_t block,
           const SignedFactors& signed_by) {
    const HashParams params = weight.hash;
    uint32_t keys[kFloatLanes], bases[kFloatLanes];
    for (int i = 0; i < kFloatLanes; ++i) {
      const uint32_t logical_row = weight.row_offset + static_cast<uint32_t>(row + i);
      keys[i] = row_key(logical_row, params.seed);
      bases[i] = window_base(logical_row, params);
    }
    const UintVector key = weight_key(load<UintVector>(keys), splat_uint<UintVector>(block));
    for (int u = 0; u < params.num_hashes; ++u) {
      const Draw<UintVector> one = draw(key, hash_lane(u), load<UintVector>(bases), params);
      store(slots[u], one.slot);
      store(factors[u], flip_sign(signed_by.values[u], one.sign));
    }
  }
};

HFH_HOST_DEVICE uint32_t logical_block(const VirtualWeight& weight,
                                       const cpu::BatchSlotProducts& products, int64_t block) {
  return (weight.col_offset >> weight.hash.log2_block) +
         static_cast<uint32_t>(products.first_block + block);
}

HFH_NAMESPACE_END
