#include <algorithm>
#include <type_traits>

#include "cuda/crossovers.h"
#include "cuda/slot_products.h"
#include "cuda/slot_products_kernel.h"
#include "cuda/sum_parts.h"

namespace hfh::cuda {

using namespace slots;

static_assert(kMaxRows == kSlotProductRows);

namespace {

constexpr int kMinBlock = 16;
constexpr int64_t kMaxParts = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t max_batch(DType dtype) { return dtype == DType::kBFloat16 ? 16 : 8; }

/// The layer's column blocks: whole ones, and the parts of one at either end.
struct Columns {
  ColumnBlocks whole, before, after;

  Columns(const DeviceWeight& weight, int64_t in_features) : whole{}, before{}, after{} {
    const int64_t block = weight.hash.block(), begin = weight.col_offset;
    const int64_t end = begin + in_features, first = begin / block, last = end / block;
    const int cut_before = static_cast<int>(begin % block),
              cut_after = static_cast<int>(end % block);
    if (in_features == 0) return;
    const int64_t first_whole = first + (cut_before > 0);
    const auto number = [](int64_t block) { return static_cast<uint32_t>(block); };
    whole = {number(first_whole), static_cast<int>(std::max(last - first_whole, int64_t{0})), 0,
             static_cast<int>(block)};
    if (cut_before > 0) {
      before = {number(first), 1, cut_before, first == last ? cut_after : static_cast<int>(block)};
    }
    if (cut_after > 0 && (cut_before == 0 || first != last))
      after = {number(last), 1, 0, cut_after};
  }
};

int bytes_of_product(const SlotProductsLinear& linear) {
  return product_bytes(linear.dtype == DType::kBFloat16);
}

/// Whether whole column blocks of all inputs begin at multiples of 16 bytes.
bool is_aligned(const DeviceWeight& weight, const SlotProductsLinear& linear) {
  const bool rows = linear.batch == 1 || linear.in_features % kUnit == 0;
  return rows && weight.col_offset % kUnit == 0 &&
         reinterpret_cast<uintptr_t>(linear.input) % (kUnit * sizeof(uint16_t)) == 0;
}

// In clock cycles, as SlotProductCycles.
constexpr double kAnotherKernel = 5000;

template <class F>
void with_block(uint32_t block, const F& f) {
  switch (block) {
    case 16:
      return f(std::integral_constant<int, 16>());
    case 32:
      return f(std::integral_constant<int, 32>());
    case 64:
      return f(std::integral_constant<int, 64>());
    case 128:
      return f(std::integral_constant<int, 128>());
    default:
      return f(std::integral_constant<int, 256>());
  }
}

template <class F>
void with_batch(int64_t batch, const F& f) {
  switch (padded_slot_product_batch(batch)) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 8:
      return f(std::integral_constant<int, 8>());
    default:
      return f(std::integral_constant<int, 16>());
  }
}

}  // namespace

std::string why_not_slot_products(const DeviceWeight& weight, const SlotProductsLinear& linear) {
  const HashParams& hash = weight.hash;
  const int block = static_cast<int>(hash.block());
  const auto number = [](auto value) { return std::to_string(value); };
  if (linear.dtype == DType::kFloat32 || weight.pool_dtype != linear.dtype) {
    return "slot products need a pool and an input of one type, bfloat16 or float16";
  }
  if (weight.reconstruct.depth != 1) {
    return "slot products need a linear network, not depth " + number(weight.reconstruct.depth);
  }
  if (block < kMinBlock) {
    return "slot products need blocks of " + number(kMinBlock) + " and more, not " + number(block);
  }
  if (hash.draw_slots > static_cast<uint32_t>(max_slots(block))) {
    return "slot products need windows of at most " + number(max_slots(block)) + " blocks of " +
           number(block) + ", not " + number(hash.draw_slots);
  }
  if (linear.batch > max_batch(linear.dtype)) {
    return "slot products need a batch of at most " + number(max_batch(linear.dtype)) + ", not " +
           number(linear.batch);
  }
  if (reinterpret_cast<uintptr_t>(weight.pool) % 16 != 0) {
    return "slot products need a pool aligned to 16 bytes";
  }
  return "";
}

SlotProductsPlan plan_slot_products(const DeviceWeight& weight, const SlotProductsLinear& linear,
                                    const Device& device) {
  const HashParams& hash = weight.hash;
  SlotProductsPlan plan{};
  const int batch = static_cast<int>(padded_slot_product_batch(linear.batch));
  int64_t window_rows = linear.out_features;
  plan.num_windows = 1;
  if (hash.rows_per_window > 0 && linear.out_features > 0) {
    const int64_t rows = hash.rows_per_window, end = weight.row_offset + linear.out_features;
    plan.num_windows = ceil_div(end, rows) - weight.row_offset / rows;
    window_rows = std::min(window_rows, rows);
    if (plan.num_windows > 1) window_rows = rows;
  }
  const int words = words_of_chunk(bytes_of_product(linear), batch);
  const int64_t chunks = std::max(
      ceil_div(Columns(weight, linear.in_features).whole.count, words / batch), int64_t{1});
  const SlotProductCycles cycles(hash, batch);
  const double multiply = words / 32.0 * cycles.multiply.most();
  const double add = static_cast<double>(words / batch * kPassRows) * cycles.add.most();
  // Of a thread block's slots.
  const double load = static_cast<double>(hash.draw_slots) * hash.block() / 10;
  double least = 0;
  for (int passes = kPasses; passes > 0; --passes) {
    const int64_t groups = std::max(ceil_div(window_rows, passes * kPassRows), int64_t{1});
    const int64_t group_passes = ceil_div(ceil_div(window_rows, groups), kPassRows);
    for (int64_t parts = 1; parts <= std::min(chunks, kMaxParts); ++parts) {
      const int64_t chunks_per_part = ceil_div(chunks, parts);
      if (ceil_div(chunks, chunks_per_part) != parts) continue;
      const auto per_processor =
          static_cast<double>(ceil_div(plan.num_windows * groups * parts, device.processors));
      const double chunk = multiply + add * static_cast<double>(group_passes);
      const double cost = per_processor * (load + static_cast<double>(chunks_per_part) * chunk) +
                          (parts > 1 ? kAnotherKernel : 0);
      if (least > 0 && cost >= least) continue;
      least = cost;
      plan.groups_per_window = static_cast<int>(groups);
      plan.rows_per_group = static_cast<int>(group_passes * kPassRows);
      plan.num_parts = static_cast<int>(parts);
      plan.chunks_per_part = static_cast<int>(chunks_per_part);
    }
  }
  return plan;
}

void slot_products(const DeviceWeight& weight, const SlotProductsLinear& linear,
                   const SlotProductsPlan& plan, float* workspace, cudaStream_t stream) {
  if (linear.batch == 0 || linear.out_features == 0) return;
  const Columns columns(weight, linear.in_features);
  const Arguments args{weight,
                       linear,
                       plan,
                       {columns.whole, columns.before, columns.after},
                       plan.num_parts == 1 ? nullptr : workspace,
                       is_aligned(weight, linear)};
  const uint32_t block = weight.hash.block();
  const int64_t blocks = plan.num_windows * plan.groups_per_window * plan.num_parts;
  const int product = bytes_of_product(linear);
  const int words =
      words_of_chunk(product, static_cast<int>(padded_slot_product_batch(linear.batch)));
  const Grid grid{blocks, kThreads,
                  shared_bytes(weight.hash.draw_slots, product, words, static_cast<int>(block))};
  const auto launch_for = [&](auto number, auto block_size, auto batch) {
    launch(
        "slot_products",
        slot_products_kernel<decltype(number), decltype(block_size)::value, decltype(batch)::value>,
        grid, stream, args);
  };
  with_block(block, [&](auto block_size) {
    with_batch(linear.batch, [&](auto batch) {
      if (linear.dtype == DType::kBFloat16) {
        launch_for(BFloat16{}, block_size, batch);
      } else if constexpr (decltype(batch)::value <= 8) {
        launch_for(Float16{}, block_size, batch);
      }
    });
  });
  if (plan.num_parts > 1) {
    sum_parts(workspace, plan.num_parts, linear.batch, linear.out_features, linear.bias,
              linear.dtype, linear.output, stream);
  }
}

}  // namespace hfh::cuda
