#include "cpu/slots.h"

#include "cpu/declarations.h"
#include "cpu/lanes.h"
#include "cpu/multiply.h"

// Linear g (depth 0 or 1) without weights at all. Where each weight is a signed mixture of pool
// elements, so is each output a mixture of products <slot of the pool, block of the input>, and
// every row draws from the same products: they are computed once, and a row only adds up those it
// draws. That costs pool_size * blocks multiplications an input instead of rows * columns, few
// where the pool is small or the block long. (An infinite input meets the products apart, not their
// sum: where they differ in sign the output is NaN, not infinite.)

HFH_NAMESPACE_BEGIN

namespace {

constexpr int64_t kSlotsAtOnce = 64;
constexpr int64_t kInputStride = kMaxBlock + 16;

/// panel[k][s] = pool[(slot + s) * block + k]
template <class Pool>
void transpose_slots(const Pool* pool, int64_t block, int64_t slots, float* rows, float* panel) {
  for (int64_t s = 0; s < slots; s += kFloatLanes) {
    const int64_t count = slots - s < kFloatLanes ? slots - s : kFloatLanes;
    for (int64_t i = 0; i < count * block; i += kFloatLanes) {
      store(rows + i, load_as<FloatVector>(pool + s * block + i));
    }
    for (int64_t k = 0; k < block; k += kFloatLanes) {
      transpose_square(rows + k, block, panel + k * kSlotsAtOnce + s, kSlotsAtOnce);
    }
  }
}

/// values[s][m] = <slot s, column m of inputs>, for kRows slots.
template <int kRows, class Pool>
HFH_HOST_DEVICE void multiply_some_slots(const Pool* pool, int64_t block, const float* inputs,
                                         float* values) {
  FloatVector sum[kRows][kBatchVectors] = {};
  for (int64_t k = 0; k < block; ++k) {
    FloatVector column[kBatchVectors];
    for (int v = 0; v < kBatchVectors; ++v) {
      column[v] = load<FloatVector>(inputs + k * kBatchLanes + v * kFloatLanes);
    }
    for (int s = 0; s < kRows; ++s) {
      const FloatVector element = splat<FloatVector>(to_float(pool[s * block + k]));
      for (int v = 0; v < kBatchVectors; ++v) sum[s][v] += element * column[v];
    }
  }
  for (int s = 0; s < kRows; ++s) {
    for (int v = 0; v < kBatchVectors; ++v) {
      store(values + s * kBatchLanes + v * kFloatLanes, sum[s][v]);
    }
  }
}

template <class Pool>
void multiply_slots(const Pool* pool, int64_t block, int64_t slots, const float* inputs,
                    float* values) {
  constexpr int kSlots = kBatchVectors == 2 ? kTileRows : kTileRows / 2;
  int64_t s = 0;
  for (; s + kSlots <= slots; s += kSlots) {
    multiply_some_slots<kSlots>(pool + s * block, block, inputs, values + s * kBatchLanes);
  }
  for (; s < slots; ++s) {
    multiply_some_slots<1>(pool + s * block, block, inputs, values + s * kBatchLanes);
  }
}

}  // namespace

bool has_slot_products_kernel(const VirtualWeight& weight) {
  return weight.reconstruct.depth == 1 && weight.pool_dtype != DType::kFloat64 &&
         weight.hash.block() % kFloatLanes == 0 && weight.col_offset % weight.hash.block() == 0;
}

size_t slot_products_scratch_kernel(int64_t num_products) {
  return num_products * kInputStride + (kFloatLanes + kSlotsAtOnce) * kMaxBlock;
}

void slot_products_kernel(const VirtualWeight& weight, const cpu::SlotProducts& products,
                          const cpu::LinearBatch& args, int64_t slot_begin, int64_t slot_end,
                          float* scratch) {
  const int64_t block = weight.hash.block(), num_products = args.batch * products.num_blocks;
  float* inputs = scratch;
  float* rows = inputs + num_products * kInputStride;
  float* panel = rows + kFloatLanes * kMaxBlock;
  for (int64_t m = 0; m < args.batch; ++m) {
    for (int64_t b = 0; b < products.num_blocks; ++b) {
      const int64_t col = (products.first_block + b) * block;
      std::memcpy(inputs + (m * products.num_blocks + b) * kInputStride,
                  args.input + m * args.in_features + col, block * sizeof(float));
    }
  }
  for (int64_t slot = slot_begin; slot < slot_end; slot += kSlotsAtOnce) {
    const int64_t slots = slot_end - slot < kSlotsAtOnce ? slot_end - slot : kSlotsAtOnce;
    if (weight.pool_dtype == DType::kBFloat16) {
      transpose_slots(static_cast<const BFloat16*>(weight.pool) + slot * block, block, slots, rows,
                      panel);
    } else {
      transpose_slots(static_cast<const float*>(weight.pool) + slot * block, block, slots, rows,
                      panel);
    }
    for (int64_t i = 0; i < num_products; ++i) {
      float* target = products.values + i * products.stride + slot;
      for (int64_t s = 0; s < slots; ++s) target[s] = 0.0f;
    }
    multiply_add<kInputStride>(num_products, slots, block, inputs, panel, kSlotsAtOnce,
                               products.values + slot, products.stride);
  }
}

void add_slot_products_kernel(const VirtualWeight& weight, const cpu::SlotProducts& products,
                              const cpu::LinearBatch& args, int64_t row_begin, int64_t row_end) {
  const HashParams params = weight.hash;
  const auto* theta = static_cast<const float*>(weight.theta);
  const uint32_t first_block =
      (weight.col_offset >> params.log2_block) + static_cast<uint32_t>(products.first_block);
  constexpr int64_t kRowsAtOnce = 256;
  for (int64_t group = row_begin; group < row_end; group += kRowsAtOnce) {
    const int64_t group_rows = row_end - group < kRowsAtOnce ? row_end - group : kRowsAtOnce;
    // Rows past the last have keys too; what they add up is dropped below.
    uint32_t keys[kRowsAtOnce], bases[kRowsAtOnce];
    for (int64_t i = 0; i < kRowsAtOnce; ++i) {
      const uint32_t row = weight.row_offset + static_cast<uint32_t>(group + i);
      keys[i] = row_key(row, params.seed);
      bases[i] = window_base(row, params);
    }
    for (int64_t b = 0; b < products.num_blocks; ++b) {
      const UintVector block = splat_uint<UintVector>(first_block + static_cast<uint32_t>(b));
      for (int64_t i = 0; i < group_rows; i += kFloatLanes) {
        const UintVector key = weight_key(load<UintVector>(keys + i), block);
        const UintVector base = load<UintVector>(bases + i);
        UintVector slots[kMaxHashes], signs[kMaxHashes];
        for (int u = 0; u < params.num_hashes; ++u) {
          const Draw<UintVector> one = draw(key, hash_lane(u), base, params);
          slots[u] = one.slot;
          signs[u] = one.sign;
        }
        for (int64_t m = 0; m < args.batch; ++m) {
          const float* values = products.values + (m * products.num_blocks + b) * products.stride;
          FloatVector sum = {};
          for (int u = 0; u < params.num_hashes; ++u) {
            sum += theta[u] * flip_sign(gather<FloatVector>(values, slots[u]), signs[u]);
          }
          float* out = args.output + m * args.out_features + group + i;
          if (group_rows - i >= kFloatLanes) {
            store(out, load<FloatVector>(out) + sum);
          } else {
            for (int64_t r = 0; r < group_rows - i; ++r) out[r] += sum[r];
          }
        }
      }
    }
  }
}

void batch_slot_products_kernel(const VirtualWeight& weight, const cpu::BatchSlotProducts& products,
                                const float* inputs, int64_t slot_begin, int64_t slot_end) {
  const int64_t block = weight.hash.block();
  for (int64_t b = 0; b < products.num_blocks; ++b) {
    const float* columns = inputs + b * block * kBatchLanes;
    float* values = products.values + (b * products.num_slots + slot_begin) * kBatchLanes;
    if (weight.pool_dtype == DType::kBFloat16) {
      multiply_slots(static_cast<const BFloat16*>(weight.pool) + slot_begin * block, block,
                     slot_end - slot_begin, columns, values);
    } else {
      multiply_slots(static_cast<const float*>(weight.pool) + slot_begin * block, block,
                     slot_end - slot_begin, columns, values);
    }
  }
}

void turn_inputs_kernel(const float* input, int64_t stride, int64_t batch, int64_t cols,
                        float* turned) {
  for (int64_t k = 0; k < cols; k += kFloatLanes) {
    for (int64_t m = 0; m < kBatchLanes; m += kFloatLanes) {
      float rows[kFloatLanes][kFloatLanes] = {};
      for (int64_t i = 0; i < kFloatLanes && m + i < batch; ++i) {
        const float* source = input + (m + i) * stride + k;
        if (cols - k >= kFloatLanes) {
          store(rows[i], load<FloatVector>(source));
        } else {
          for (int64_t j = 0; j < cols - k; ++j) rows[i][j] = source[j];
        }
      }
      transpose_square(rows[0], kFloatLanes, turned + k * kBatchLanes + m, kBatchLanes);
    }
  }
}

void add_batch_slot_products_kernel(const VirtualWeight& weight,
                                    const cpu::BatchSlotProducts& products, float* output,
                                    int64_t stride, int64_t batch, int64_t row_begin,
                                    int64_t row_end) {
  const SignedFactors theta(weight);
  for (int64_t row = row_begin; row < row_end; row += kFloatLanes) {
    const int64_t rows = row_end - row < kFloatLanes ? row_end - row : kFloatLanes;
    float sums[kBatchVectors][kFloatLanes][kFloatLanes] = {};
    for (int64_t b = 0; b < products.num_blocks; ++b) {
      const RowDraws draws(weight, row, logical_block(weight, products, b), theta);
      const float* values = products.values + b * products.num_slots * kBatchLanes;
      for (int64_t i = 0; i < kFloatLanes; ++i) {
        FloatVector sum[kBatchVectors];
        for (int v = 0; v < kBatchVectors; ++v) sum[v] = load<FloatVector>(sums[v][i]);
        for (int u = 0; u < weight.hash.num_hashes; ++u) {
          const float* product = values + int64_t{draws.slots[u][i]} * kBatchLanes;
          for (int v = 0; v < kBatchVectors; ++v) {
            sum[v] += draws.factors[u][i] * load<FloatVector>(product + v * kFloatLanes);
          }
        }
        for (int v = 0; v < kBatchVectors; ++v) store(sums[v][i], sum[v]);
      }
    }
    for (int v = 0; v < kBatchVectors; ++v) {
      float turned[kFloatLanes][kFloatLanes];
      transpose_square(sums[v][0], kFloatLanes, turned[0], kFloatLanes);
      for (int64_t i = 0; i < kFloatLanes && v * kFloatLanes + i < batch; ++i) {
        float* out = output + (v * kFloatLanes + i) * stride + row;
        if (rows == kFloatLanes) {
          store(out, load<FloatVector>(out) + load<FloatVector>(turned[i]));
        } else {
          for (int64_t r = 0; r < rows; ++r) out[r] += turned[i][r];
        }
      }
    }
  }
}

HFH_NAMESPACE_END
