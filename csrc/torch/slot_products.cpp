#include "torch/slot_products.h"

#include <algorithm>
#include <limits>

#include "torch/matrix_unit.h"
#include "torch/parallel.h"

namespace hfh::torch_ops {

namespace {

using cpu::kernels;

// Beyond this batch the products of one block leave the first-level cache, and gathering them costs
// more than it saves.
constexpr int64_t kMaxSlotProductBatch = 32;
// Slot products held at once, and the blocks of inputs that they are taken of.
constexpr int64_t kSlotProducts = 1 << 19;
constexpr int64_t kSlotProductInputs = 1 << 10;
// Of inputs side by side: what stays in a second-level cache.
constexpr int64_t kBatchSlotProducts = 1 << 17;
// Rows whose gradients lie side by side at once.
constexpr int64_t kGradRows = 1 << 12;
constexpr int64_t kInputs = cpu::BatchSlotProducts::kInputs;

/// How a product is best computed.
enum class Way { kWeights, kSlotProducts, kBatchSlotProducts };

/// Vector operations to multiply a vector of weights with one of many inputs. On the matrix unit
/// they take a little less.
double cost_of_input(int64_t batch) { return prefers_matrix_unit(batch) ? 0.85 : 1; }
/// The same of bfloat16.
double cost_of_bfloat16() { return 1.0 / kernels().bfloat16_products; }

/// Vector operations that each way takes, checked against measurements at 4096 x 4096. A draw takes
/// about 14 for a vector of rows, a gathered product 30; inputs side by side take 12 to add one. A
/// weight takes about 5 and one for each hash, `unit` for each input, and 8 more to turn it round
/// for several inputs.
Way fastest_way(const VirtualWeight& weight, int64_t out_features, int64_t in_features,
                int64_t num_inputs, double unit) {
  if (in_features % weight.hash.block() != 0 || !kernels().has_slot_products(weight)) {
    return Way::kWeights;
  }
  const double block = weight.hash.block(), hashes = weight.hash.num_hashes;
  const double rows = out_features, cols = in_features, batch = num_inputs;
  const double products = weight.hash.num_slots * cols, draws = rows * cols / block * hashes;
  const double weights = rows * cols * (5 + hashes + batch * unit + (batch > 1 ? 8 : 0));
  constexpr double kNever = std::numeric_limits<double>::infinity();
  const double one_by_one =
      num_inputs <= kMaxSlotProductBatch && num_inputs * weight.hash.num_slots <= kSlotProducts
          ? batch * products + draws * (14 + 30 * batch)
          : kNever;
  const double inputs = round_up(num_inputs, cpu::BatchSlotProducts::kInputs);
  const double rounds = inputs / cpu::BatchSlotProducts::kInputs;
  const double side_by_side =
      weight.hash.num_slots <= kSlotProducts / cpu::BatchSlotProducts::kInputs
          ? inputs * products + draws * (14 * rounds + 12 * inputs)
          : kNever;
  if (weights <= std::min(one_by_one, side_by_side)) return Way::kWeights;
  return one_by_one < side_by_side ? Way::kSlotProducts : Way::kBatchSlotProducts;
}

/// Whether the gradients are best taken through the products of inputs side by side; `per_weight`
/// is what the gradient of a weight takes beside the batch, which takes `unit` an input; `products`
/// how often all are needed.
bool prefers_slots_backward(const VirtualWeight& weight, int64_t rows, int64_t cols, int64_t batch,
                            double per_weight, double products, double unit) {
  const double num_slots = weight.hash.num_slots, block = weight.hash.block();
  if (cols % weight.hash.block() != 0 || !kernels().has_slot_products(weight) ||
      num_slots * kInputs > kSlotProducts) {
    return false;
  }
  const double inputs = round_up(batch, kInputs);
  const double draws = static_cast<double>(rows) * cols / block * weight.hash.num_hashes;
  return products * (inputs * num_slots * cols + draws * (14 * inputs / kInputs + 12 * inputs)) <
         static_cast<double>(rows) * cols * (per_weight + batch * unit);
}

/// Inputs side by side, some blocks at a time: their slot products, or the sums behind them.
struct BatchRound {
  int64_t num_slots, block, num_blocks, blocks_at_once;

  BatchRound(const VirtualWeight& weight, int64_t cols)
      : num_slots(weight.hash.num_slots), block(weight.hash.block()), num_blocks(cols / block) {
    const int64_t in_cache =
        std::min(kBatchSlotProducts / (num_slots * kInputs), kSlotProductInputs / block);
    blocks_at_once = std::min(std::max<int64_t>(in_cache, at::get_num_threads()), num_blocks);
  }
  int64_t num_values() const { return blocks_at_once * num_slots * kInputs; }
  int64_t num_inputs() const { return blocks_at_once * block * kInputs; }
  cpu::BatchSlotProducts products(float* values, int64_t first) const {
    return {values, num_slots, first, std::min(blocks_at_once, num_blocks - first)};
  }
};

float* slot_scratch(int64_t num_floats) {
  return static_cast<float*>(Scratch<Purpose::kSlotProducts>::get(num_floats * sizeof(float)));
}

int64_t share_of_thread(int64_t size, int64_t multiple) {
  const int64_t threads = at::get_num_threads();
  return round_up((size + threads - 1) / threads, multiple);
}

void forward_by_batch_slot_products(const VirtualWeight& weight, const cpu::LinearBatch& args) {
  const BatchRound round(weight, args.in_features);
  float* values = slot_scratch(round.num_values() + round.num_inputs());
  float* turned = values + round.num_values();
  for (int64_t m = 0; m < args.batch; m += kInputs) {
    const int64_t batch = std::min(kInputs, args.batch - m);
    const float* input = args.input + m * args.in_features;
    float* output = args.output + m * args.out_features;
    for (int64_t first = 0; first < round.num_blocks; first += round.blocks_at_once) {
      const cpu::BatchSlotProducts products = round.products(values, first);
      kernels().turn_inputs(input + first * round.block, args.in_features, batch,
                            products.num_blocks * round.block, turned);
      parallel_stretches(round.num_slots, share_of_thread(round.num_slots, 12),
                         [&](int64_t begin, int64_t end) {
                           kernels().batch_slot_products(weight, products, turned, begin, end);
                         });
      parallel_stretches(args.out_features, share_of_thread(args.out_features, 16),
                         [&](int64_t begin, int64_t end) {
                           if (first == 0) set_bias(args, m, batch, begin, end);
                           kernels().add_batch_slot_products(weight, products, output,
                                                             args.out_features, batch, begin, end);
                         });
    }
  }
}

/// The gradients of one round's inputs, side by side, `kGradRows` rows of the weight at a time.
struct TurnedGradients {
  const float* grad_output;
  int64_t num_rows, batch;
  float* turned;

  static int64_t size(int64_t num_rows) {
    return round_up(std::min(num_rows, kGradRows), kernels().lanes) * kInputs;
  }
  /// Calls `f(row_begin, row_end)` with each stretch of rows in place.
  template <class F>
  void for_each(const F& f) const {
    for (int64_t row = 0; row < num_rows; row += kGradRows) {
      const int64_t end = std::min(num_rows, row + kGradRows);
      kernels().turn_inputs(grad_output + row, num_rows, batch, end - row, turned);
      f(row, end);
    }
  }
};

/// Sums what all rows pass on to the slots of some blocks, then calls `then(begin, end)` for
/// stretches of those blocks.
template <class Then>
void scatter_slots(const VirtualWeight& weight, const cpu::BatchSlotProducts& sums,
                   const TurnedGradients& gradients, const Then& then) {
  const int64_t size = sums.num_slots * kInputs;
  gradients.for_each([&](int64_t row, int64_t row_end) {
    at::parallel_for(0, sums.num_blocks, 1, [&](int64_t begin, int64_t end) {
      if (row == 0) std::fill(sums.values + begin * size, sums.values + end * size, 0.0f);
      kernels().scatter_slots(weight, sums, gradients.turned, row, row_end, begin, end);
      if (row_end == gradients.num_rows) then(begin, end);
    });
  });
}

void forward_by_slot_products(const VirtualWeight& weight, const cpu::LinearBatch& args) {
  const int64_t block = weight.hash.block(), num_slots = weight.hash.num_slots;
  const int64_t num_blocks = args.in_features / block;
  const int64_t blocks_at_once = std::min(
      {kSlotProducts / (num_slots * args.batch), kSlotProductInputs / args.batch, num_blocks});
  auto* values = static_cast<float*>(Scratch<Purpose::kSlotProducts>::get(
      args.batch * blocks_at_once * num_slots * sizeof(float)));
  set_bias(args, 0, args.batch, 0, args.out_features);
  const int64_t threads = at::get_num_threads();
  const int64_t slots_at_once = round_up((num_slots + threads - 1) / threads, 64);
  const int64_t rows_at_once = round_up((args.out_features + threads - 1) / threads, 256);
  for (int64_t first = 0; first < num_blocks; first += blocks_at_once) {
    const cpu::SlotProducts products{values, num_slots, first,
                                     std::min(blocks_at_once, num_blocks - first)};
    parallel_stretches(num_slots, slots_at_once, [&](int64_t begin, int64_t end) {
      const size_t floats = kernels().slot_products_scratch(args.batch * products.num_blocks);
      auto* scratch = static_cast<float*>(Scratch<Purpose::kPanels>::get(floats * sizeof(float)));
      kernels().slot_products(weight, products, args, begin, end, scratch);
    });
    parallel_stretches(args.out_features, rows_at_once, [&](int64_t begin, int64_t end) {
      kernels().add_slot_products(weight, products, args, begin, end);
    });
  }
}

}  // namespace

bool prefers_slot_products_bfloat16(const VirtualWeight& weight, int64_t out_features,
                                    int64_t in_features, int64_t batch) {
  return fastest_way(weight, out_features, in_features, batch, cost_of_bfloat16()) != Way::kWeights;
}

bool prefers_slots_backward_input_bfloat16(const VirtualWeight& weight, int64_t out_features,
                                           int64_t in_features, int64_t batch) {
  return prefers_slots_backward(weight, out_features, in_features, batch, 20, 1,
                                cost_of_bfloat16());
}

bool prefers_slots_backward_weight_bfloat16(const VirtualWeight& weight, int64_t out_features,
                                            int64_t in_features, int64_t batch) {
  return prefers_slots_backward(weight, out_features, in_features, batch, 50, 2,
                                cost_of_bfloat16());
}

bool slot_products_forward(const VirtualWeight& weight, const cpu::LinearBatch& args) {
  switch (fastest_way(weight, args.out_features, args.in_features, args.batch,
                      cost_of_input(args.batch))) {
    case Way::kSlotProducts:
      forward_by_slot_products(weight, args);
      return true;
    case Way::kBatchSlotProducts:
      forward_by_batch_slot_products(weight, args);
      return true;
    default:
      return false;
  }
}

bool slot_products_backward_input(const VirtualWeight& weight, const cpu::LinearBatch& args) {
  const int64_t rows = args.in_features, cols = args.out_features;
  if (!prefers_slots_backward(weight, rows, cols, args.batch, 100, 1, cost_of_input(args.batch))) {
    return false;
  }
  const BatchRound round(weight, cols);
  float* values = slot_scratch(round.num_values() + TurnedGradients::size(rows));
  for (int64_t m = 0; m < args.batch; m += kInputs) {
    const int64_t batch = std::min(kInputs, args.batch - m);
    const TurnedGradients gradients{args.input + m * rows, rows, batch,
                                    values + round.num_values()};
    for (int64_t first = 0; first < round.num_blocks; first += round.blocks_at_once) {
      const cpu::BatchSlotProducts sums = round.products(values, first);
      scatter_slots(weight, sums, gradients, [&](int64_t begin, int64_t end) {
        kernels().slots_backward_input(weight, sums, begin, end, args.output + m * cols, cols,
                                       batch);
      });
    }
  }
  return kernels().all_finite(args.output, args.batch * cols);
}

bool slot_products_backward_weight(const VirtualWeight& weight, const cpu::LinearBatch& args,
                                   const float* grad_output, float* grad_pool,
                                   std::vector<double>& grad_theta) {
  const int64_t rows = args.out_features, cols = args.in_features;
  // What is not finite would reach slots that no row draws.
  if (!prefers_slots_backward(weight, rows, cols, args.batch, 200, 2, cost_of_input(args.batch)) ||
      !kernels().all_finite(args.input, args.batch * cols) ||
      !kernels().all_finite(grad_output, args.batch * rows)) {
    return false;
  }
  const BatchRound round(weight, cols);
  float* sum_values =
      slot_scratch(2 * round.num_values() + round.num_inputs() + TurnedGradients::size(rows));
  float* product_values = sum_values + round.num_values();
  float* turned_input = product_values + round.num_values();
  float* turned_grad = turned_input + round.num_inputs();
  const int64_t row_share = share_of_thread(std::min(rows, kGradRows), 16);
  std::vector<std::vector<double>> thetas((kGradRows + row_share - 1) / row_share,
                                          std::vector<double>(grad_theta.size(), 0.0));
  for (int64_t m = 0; m < args.batch; m += kInputs) {
    const int64_t batch = std::min(kInputs, args.batch - m);
    const TurnedGradients gradients{grad_output + m * rows, rows, batch, turned_grad};
    for (int64_t first = 0; first < round.num_blocks; first += round.blocks_at_once) {
      const float* input = args.input + m * cols + first * round.block;
      const cpu::BatchSlotProducts sums = round.products(sum_values, first);
      const cpu::BatchSlotProducts products = round.products(product_values, first);
      scatter_slots(weight, sums, gradients, [](int64_t, int64_t) {});
      kernels().turn_inputs(input, cols, batch, products.num_blocks * round.block, turned_input);
      parallel_stretches(
          round.num_slots, share_of_thread(round.num_slots, 12), [&](int64_t begin, int64_t end) {
            kernels().slots_backward_pool(weight, sums, input, cols, batch, begin, end, grad_pool);
            kernels().batch_slot_products(weight, products, turned_input, begin, end);
          });
      gradients.for_each([&](int64_t row, int64_t row_end) {
        parallel_stretches(row_end - row, row_share, [&](int64_t begin, int64_t end) {
          kernels().slots_backward_theta(weight, products, turned_grad + begin * kInputs,
                                         row + begin, row + end, thetas[begin / row_share].data());
        });
      });
    }
  }
  for (const std::vector<double>& part : thetas) {
    for (size_t i = 0; i < grad_theta.size(); ++i) grad_theta[i] += part[i];
  }
  return true;
}

}  // namespace hfh::torch_ops
