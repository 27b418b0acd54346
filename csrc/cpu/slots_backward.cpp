#include <type_traits>

#include "cpu/declarations.h"
#include "cpu/multiply.h"
#include "cpu/slots.h"

// Backward through slot products (see slots.cpp), for a batch whose inputs lie side by side. The
// gradient of the product of a slot and a block is the signed sum of the gradients of the rows that
// draw the slot there. From it follow those of the input and of the pool by one product each, and
// that of g's weights from the products themselves.

HFH_NAMESPACE_BEGIN

namespace {

/// c[i][v] = sum_k a(i, k) b[k * b_stride + v kFloatLanes...], for kRows rows and kVectors vectors.
template <int kRows, int kVectors, class Left>
HFH_HOST_DEVICE void multiply_in_registers(int64_t depth, const Left& a, const float* b,
                                           int64_t b_stride, FloatVector (&sum)[kRows][kVectors]) {
  for (int64_t k = 0; k < depth; ++k) {
    FloatVector column[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      column[v] = load<FloatVector>(b + k * b_stride + v * kFloatLanes);
    }
    for (int i = 0; i < kRows; ++i) {
      const FloatVector factor = splat<FloatVector>(a(i, k));
      for (int v = 0; v < kVectors; ++v) sum[i][v] += factor * column[v];
    }
  }
}

template <class Pool>
void backward_input(const VirtualWeight& weight, const cpu::BatchSlotProducts& sums,
                    int64_t block_begin, int64_t block_end, float* grad_input, int64_t stride,
                    int64_t batch) {
  // A quarter of the registers' rows, so that blocks of any length divide.
  constexpr int kRows = kFloatLanes / 2;
  const auto* pool = static_cast<const Pool*>(weight.pool);
  const int64_t block = weight.hash.block();
  for (int64_t b = block_begin; b < block_end; ++b) {
    const float* values = sums.values + b * sums.num_slots * kBatchLanes;
    for (int64_t k = 0; k < block; k += kFloatLanes) {
      float turned[kBatchVectors][kFloatLanes][kFloatLanes];
      for (int half = 0; half < 2; ++half) {
        const Pool* column = pool + k + half * kRows;
        FloatVector sum[kRows][kBatchVectors] = {};
        const auto element = [&](int i, int64_t slot) {
          return to_float(column[slot * block + i]);
        };
        multiply_in_registers(sums.num_slots, element, values, kBatchLanes, sum);
        for (int i = 0; i < kRows; ++i) {
          for (int v = 0; v < kBatchVectors; ++v) store(turned[v][half * kRows + i], sum[i][v]);
        }
      }
      for (int v = 0; v < kBatchVectors; ++v) {
        float rows[kFloatLanes][kFloatLanes];
        transpose_square(turned[v][0], kFloatLanes, rows[0], kFloatLanes);
        for (int64_t i = 0; i < kFloatLanes && v * kFloatLanes + i < batch; ++i) {
          float* target =
              grad_input + (v * kFloatLanes + i) * stride + (sums.first_block + b) * block + k;
          store(target, load<FloatVector>(rows[i]));
        }
      }
    }
  }
}

}  // namespace

void scatter_slots_kernel(const VirtualWeight& weight, const cpu::BatchSlotProducts& sums,
                          const float* grad_turned, int64_t row_begin, int64_t row_end,
                          int64_t block_begin, int64_t block_end) {
  const SignedFactors theta(weight);
  for (int64_t b = block_begin; b < block_end; ++b) {
    float* values = sums.values + b * sums.num_slots * kBatchLanes;
    for (int64_t row = row_begin; row < row_end; row += kFloatLanes) {
      const RowDraws draws(weight, row, logical_block(weight, sums, b), theta);
      const int64_t rows = row_end - row < kFloatLanes ? row_end - row : kFloatLanes;
      for (int64_t i = 0; i < rows; ++i) {
        FloatVector grad[kBatchVectors];
        for (int v = 0; v < kBatchVectors; ++v) {
          grad[v] = load<FloatVector>(grad_turned + (row - row_begin + i) * kBatchLanes +
                                      v * kFloatLanes);
        }
        for (int u = 0; u < weight.hash.num_hashes; ++u) {
          float* target = values + int64_t{draws.slots[u][i]} * kBatchLanes;
          for (int v = 0; v < kBatchVectors; ++v) {
            store(target + v * kFloatLanes,
                  load<FloatVector>(target + v * kFloatLanes) + draws.factors[u][i] * grad[v]);
          }
        }
      }
    }
  }
}

void slots_backward_input_kernel(const VirtualWeight& weight, const cpu::BatchSlotProducts& sums,
                                 int64_t block_begin, int64_t block_end, float* grad_input,
                                 int64_t stride, int64_t batch) {
  if (weight.pool_dtype == DType::kBFloat16) {
    backward_input<BFloat16>(weight, sums, block_begin, block_end, grad_input, stride, batch);
  } else {
    backward_input<float>(weight, sums, block_begin, block_end, grad_input, stride, batch);
  }
}

void slots_backward_pool_kernel(const VirtualWeight& weight, const cpu::BatchSlotProducts& sums,
                                const float* input, int64_t stride, int64_t batch,
                                int64_t slot_begin, int64_t slot_end, float* grad_pool) {
  constexpr int kRows = kTileRows, kVectors = 1;
  const int64_t block = weight.hash.block();
  const auto add = [&]<int rows>(std::integral_constant<int, rows>, int64_t slot) {
    for (int64_t k = 0; k < block; k += kVectors * kFloatLanes) {
      FloatVector sum[rows][kVectors] = {};
      for (int64_t b = 0; b < sums.num_blocks; ++b) {
        const float* values = sums.values + (b * sums.num_slots + slot) * kBatchLanes;
        const auto element = [&](int i, int64_t m) { return values[i * kBatchLanes + m]; };
        multiply_in_registers(batch, element, input + b * block + k, stride, sum);
      }
      for (int i = 0; i < rows; ++i) {
        float* target = grad_pool + (slot + i) * block + k;
        store(target, load<FloatVector>(target) + sum[i][0]);
      }
    }
  };
  int64_t slot = slot_begin;
  for (; slot + kRows <= slot_end; slot += kRows) add(std::integral_constant<int, kRows>{}, slot);
  for (; slot < slot_end; ++slot) add(std::integral_constant<int, 1>{}, slot);
}

void slots_backward_theta_kernel(const VirtualWeight& weight,
                                 const cpu::BatchSlotProducts& products, const float* grad_turned,
                                 int64_t row_begin, int64_t row_end, double* grad_theta) {
  const SignedFactors ones;
  for (int64_t row = row_begin; row < row_end; row += kFloatLanes) {
    const int64_t rows = row_end - row < kFloatLanes ? row_end - row : kFloatLanes;
    FloatVector sums[kMaxHashes] = {};
    for (int64_t b = 0; b < products.num_blocks; ++b) {
      const RowDraws draws(weight, row, logical_block(weight, products, b), ones);
      const float* values = products.values + b * products.num_slots * kBatchLanes;
      for (int64_t i = 0; i < rows; ++i) {
        FloatVector grad[kBatchVectors];
        for (int v = 0; v < kBatchVectors; ++v) {
          grad[v] = load<FloatVector>(grad_turned + (row - row_begin + i) * kBatchLanes +
                                      v * kFloatLanes);
        }
        for (int u = 0; u < weight.hash.num_hashes; ++u) {
          const float* product = values + int64_t{draws.slots[u][i]} * kBatchLanes;
          FloatVector dot = {};
          for (int v = 0; v < kBatchVectors; ++v) {
            dot += grad[v] * load<FloatVector>(product + v * kFloatLanes);
          }
          sums[u] += draws.factors[u][i] * dot;
        }
      }
    }
    for (int u = 0; u < weight.hash.num_hashes; ++u) grad_theta[u] += horizontal_sum(sums[u]);
  }
}

bool all_finite_kernel(const float* values, int64_t count) {
  FloatVector check = {};
  int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) check += load<FloatVector>(values + i) * 0.0f;
  float rest = horizontal_sum(check);
  for (; i < count; ++i) rest += values[i] * 0.0f;
  return rest == 0.0f;
}

HFH_NAMESPACE_END
