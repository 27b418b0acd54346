#include "torch/slot_products.h"

#include <algorithm>
#include <limits>

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
/// How a product is best computed.
enum class Way { kWeights, kSlotProducts, kBatchSlotProducts };

/// Vector operations that each way takes, checked against measurements at 4096 x 4096. A draw takes
/// about 14 for a vector of rows, a gathered product 30; inputs side by side take 3 to add one. A
/// weight takes about 5 and one for each hash and input, and 8 more to turn it round for several
/// inputs; the matrix unit halves what inputs take.
Way fastest_way(const VirtualWeight& weight, const cpu::LinearBatch& args) {
  if (args.in_features % weight.hash.block() != 0 || !kernels().has_slot_products(weight)) {
    return Way::kWeights;
  }
  const double block = weight.hash.block(), hashes = weight.hash.num_hashes;
  const double rows = args.out_features, cols = args.in_features;
  const double batch = args.batch, unit = kernels().matrix_unit != nullptr && batch > 32 ? 0.5 : 1;
  const double products = weight.hash.num_slots * cols, draws = rows * cols / block * hashes;
  const double weights = rows * cols * (5 + hashes + batch * unit + (batch > 1 ? 8 : 0));
  constexpr double kNever = std::numeric_limits<double>::infinity();
  const double one_by_one =
      args.batch <= kMaxSlotProductBatch && args.batch * weight.hash.num_slots <= kSlotProducts
          ? batch * products + draws * (14 + 30 * batch)
          : kNever;
  const double inputs = round_up(args.batch, cpu::BatchSlotProducts::kInputs);
  const double rounds = inputs / cpu::BatchSlotProducts::kInputs;
  const double side_by_side =
      weight.hash.num_slots <= kSlotProducts / cpu::BatchSlotProducts::kInputs
          ? inputs * products + draws * (14 * rounds + 3 * inputs)
          : kNever;
  if (weights <= std::min(one_by_one, side_by_side)) return Way::kWeights;
  return one_by_one < side_by_side ? Way::kSlotProducts : Way::kBatchSlotProducts;
}

void forward_by_batch_slot_products(const VirtualWeight& weight, const cpu::LinearBatch& args) {
  constexpr int64_t kInputs = cpu::BatchSlotProducts::kInputs;
  const int64_t block = weight.hash.block(), num_slots = weight.hash.num_slots;
  const int64_t num_blocks = args.in_features / block;
  const int64_t blocks_at_once = std::clamp<int64_t>(
      std::min(kBatchSlotProducts / (num_slots * kInputs), kSlotProductInputs / block), 1,
      num_blocks);
  auto* values = static_cast<float*>(Scratch<Purpose::kSlotProducts>::get(
      blocks_at_once * (num_slots + block) * kInputs * sizeof(float)));
  float* turned = values + blocks_at_once * num_slots * kInputs;
  const int64_t threads = at::get_num_threads();
  const int64_t slots_at_once = round_up((num_slots + threads - 1) / threads, 12);
  const int64_t rows_at_once = round_up((args.out_features + threads - 1) / threads, 16);
  for (int64_t m = 0; m < args.batch; m += kInputs) {
    const int64_t batch = std::min(kInputs, args.batch - m);
    const float* input = args.input + m * args.in_features;
    float* output = args.output + m * args.out_features;
    for (int64_t first = 0; first < num_blocks; first += blocks_at_once) {
      const cpu::BatchSlotProducts products{values, num_slots, first,
                                            std::min(blocks_at_once, num_blocks - first)};
      kernels().turn_inputs(input + first * block, args.in_features, batch,
                            products.num_blocks * block, turned);
      parallel_stretches(num_slots, slots_at_once, [&](int64_t begin, int64_t end) {
        kernels().batch_slot_products(weight, products, turned, begin, end);
      });
      parallel_stretches(args.out_features, rows_at_once, [&](int64_t begin, int64_t end) {
        if (first == 0) set_bias(args, m, batch, begin, end);
        kernels().add_batch_slot_products(weight, products, output, args.out_features, batch, begin,
                                          end);
      });
    }
  }
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

bool slot_products_forward(const VirtualWeight& weight, const cpu::LinearBatch& args) {
  switch (fastest_way(weight, args)) {
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

}  // namespace hfh::torch_ops
