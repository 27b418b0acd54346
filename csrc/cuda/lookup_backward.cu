#include "cuda/bags.h"
#include "cuda/block_sum.h"
#include "cuda/lookup.h"
#include "cuda/rows.h"

// hfh::embedding and hfh::embedding_bag, backward.

namespace hfh::cuda {

namespace {

// Each has a row of theta's partial gradients.
constexpr int kBlocksAProcessor = 16;
// Of a processor; registers allow about as many.
constexpr int kWarpsAtOnce = 16;
// Entries of one index that a team adds up at most; one more scatter for so many is little.
constexpr int kLongestRun = 32;
// Elements that one operation adds to.
constexpr int kScattered = 4;

/// Adds kCount neighbours, the first aligned to as many.
template <int kCount>
__device__ __forceinline__ void add_to(const Total& total, int64_t first,
                                       const float (&terms)[kCount]) {
  if (total.units != nullptr) {
    auto* sum = static_cast<unsigned long long*>(total.sum) + first;
    const float units = __ldg(total.units);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      atomicAdd(sum + j, static_cast<unsigned long long>(__float2ll_rn(terms[j] * units)));
    }
  } else if constexpr (kCount == kScattered) {
    add_vector(static_cast<float*>(total.sum) + first,
               make_float4(terms[0], terms[1], terms[2], terms[3]));
  } else {
    static_assert(kCount == 1);
    atomicAdd(static_cast<float*>(total.sum) + first, terms[0]);
  }
}

/// Adds to the gradients of pool and theta, given that of a row of the virtual weight, zeros at
/// columns that the row has not.
template <class Maker, int kColumns>
__device__ __forceinline__ void make_backward(const Maker& maker,
                                              const uint32_t (&draws)[Maker::kHashes], int col,
                                              int cols, bool aligned,
                                              const float (&gradient)[kColumns], const Total& pool,
                                              float (&grad_theta)[Maker::kThetaSize]) {
  constexpr int kHashes = Maker::kHashes;
  constexpr int kPart = kColumns < kScattered ? kColumns : kScattered;
  typename Maker::Elements elements[kHashes];
  maker.gather(draws, col, elements);
  float a[kHashes][kColumns];
#pragma unroll
  for (int u = 0; u < kHashes; ++u) {
    elements[u].flip(Maker::sign(draws[u]));
    elements[u].unpack_to(a[u]);
  }
  if (!aligned) {
    // A pool's infinity times such a column's zero would be NaN.
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const bool inside = static_cast<unsigned>(col + j) < static_cast<unsigned>(cols);
#pragma unroll
      for (int u = 0; u < kHashes; ++u) a[u][j] = inside ? a[u][j] : 0.0f;
    }
  }
#pragma unroll
  for (int part = 0; part < kColumns; part += kPart) {
    float grad_a[kHashes][kPart];
#pragma unroll
    for (int j = 0; j < kPart; ++j) {
      float x[kHashes], grad_x[kHashes];
#pragma unroll
      for (int u = 0; u < kHashes; ++u) x[u] = a[u][part + j];
      reconstruct_backward(maker.shape, maker.theta, x, gradient[part + j], grad_theta, grad_x);
#pragma unroll
      for (int u = 0; u < kHashes; ++u) grad_a[u][j] = grad_x[u];
    }
#pragma unroll
    for (int u = 0; u < kHashes; ++u) {
#pragma unroll
      for (float& x : grad_a[u]) {
        x = __uint_as_float(__float_as_uint(x) ^ Maker::sign(draws[u]));
      }
      add_to(pool, maker.offset(draws[u], col) + part, grad_a[u]);
    }
  }
}

/// The gradients of an entry and its neighbours, as a lane reads them ahead of time.
template <class Number, int kColumns>
struct EntryReader {
  const Lookup& lookup;
  const Rows<const Number>& grad;
  const int64_t* grad_row;
  const float* share;

  /// What is known of an entry; `row` is -1 where it has no gradient.
  struct Entry {
    int64_t index, row;
    float share;
  };

  __device__ __forceinline__ Entry entry(int64_t i, int64_t end) const {
    if (i >= end) return {-1, -1, 0.0f};
    const int64_t index = lookup.indices[i];
    const int64_t row = grad_row == nullptr ? i : __ldg(grad_row + i);
    return {index, index == lookup.padding_idx ? -1 : row,
            share == nullptr ? 1.0f : __ldg(share + i)};
  }

  __device__ __forceinline__ Columns<Number, kColumns> gradient(const Entry& of, int col) const {
    if (of.row < 0) return {};
    return grad.template read<kColumns, Reuse::kNever>(of.row, col);
  }
};

template <class Number, int kColumns, class Shape>
__global__ __launch_bounds__(kLookupThreads, 1) void lookup_backward_kernel(
    Lookup lookup, Layout layout, int run, Rows<const Number> grad, const int64_t* grad_row,
    const float* share, LookupGradients gradients) {
  using Maker = RowMaker<Number, kColumns, Shape>;
  const Maker maker(lookup.weight, layout);
  const EntryReader<Number, kColumns> reader{lookup, grad, grad_row, share};
  float grad_theta[Maker::kThetaSize] = {};
  const int64_t num_runs = (lookup.num_entries + run - 1) / run;
  for (Walk walk(layout, num_runs, Worker::warp()); walk.goes_on(); walk.step()) {
    const int col = walk.col<kColumns>();
    const int64_t begin = walk.row() * run;
    const int64_t end = min(begin + run, lookup.num_entries);
    float sum[kColumns] = {};
    auto entry = reader.entry(begin, end);
    auto next = reader.entry(begin + 1, end);
    auto read = reader.gradient(entry, col);
    for (int64_t i = begin; __any_sync(kFullWarp, i < end); ++i) {
      // Ahead of time: the next gradient, and where the one behind it is.
      const auto next_read = reader.gradient(next, col);
      const auto behind = reader.entry(i + 2, end);
      if (entry.row >= 0) {
        float x[kColumns];
        read.unpack_to(x);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[j] = fmaf(entry.share, x[j], sum[j]);
      }
      const bool is_last = i < end && (i + 1 == end || next.index != entry.index);
      if (__any_sync(kFullWarp, is_last)) {
        const Rank rank = look_up(lookup, entry.index, is_last);
        uint32_t draws[Maker::kHashes];
        maker.draw_all(static_cast<uint32_t>(rank.row), col, draws);
        const bool has_columns = col < lookup.cols && col + kColumns > 0;
        if (rank.exists && has_columns) {
          if (rank.row < lookup.num_dense) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
              if (!grad.has(col + j)) continue;
              const float term[1] = {sum[j]};
              add_to(gradients.dense, rank.row * lookup.cols + col + j, term);
            }
          } else {
            make_backward(maker, draws, col, lookup.cols, layout.aligned, sum, gradients.pool,
                          grad_theta);
          }
        }
        if (is_last) {
#pragma unroll
          for (float& x : sum) x = 0.0f;
        }
      }
      entry = next;
      next = behind;
      read = next_read;
    }
  }
  sum_over_block(grad_theta, gradients.theta + int64_t{blockIdx.x} * Maker::kThetaSize);
}

template <class Number, int kColumns, class Shape>
__global__ __launch_bounds__(kLookupThreads, 1) void factor_gradients_kernel(
    Lookup lookup, Layout layout, Rows<const Number> dense, const int64_t* bag_of_entry,
    Rows<const Number> grad, Rows<Number> grad_factors) {
  const RowMaker<Number, kColumns, Shape> maker(lookup.weight, layout);
  // All of a row belongs to one team: its stretches are added up one after another.
  Layout whole = layout;
  whole.stretches = 1;
  for (Walk walk(whole, lookup.num_entries, Worker::warp()); walk.goes_on(); walk.step()) {
    const int64_t entry = walk.row();
    const bool inside = entry < lookup.num_entries;
    const int64_t bag = inside ? __ldg(bag_of_entry + entry) : -1;
    const Rank rank = look_up(lookup, bag < 0 ? 0 : lookup.indices[entry], bag >= 0);
    float sum = 0.0f;
    for (int stretch = 0; stretch < layout.stretches; ++stretch) {
      const int col = walk.col<kColumns>() + (stretch << layout.log2_lanes) * kColumns;
      float row[kColumns], g[kColumns];
      make_row(maker, dense, lookup.num_dense, rank, col, row);
      if (!rank.exists) continue;
      grad.template read<kColumns, Reuse::kLater>(bag, col).unpack_to(g);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (grad.has(col + j)) sum = fmaf(row[j], g[j], sum);
      }
    }
    for (int step = 1 << layout.log2_lanes >> 1; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, step);
    }
    const float gradient[1] = {sum};
    const bool is_first = threadIdx.x % (1u << layout.log2_lanes) == 0;
    if (inside && is_first) {
      grad_factors.write(entry, 0, Columns<Number, 1>::pack_from(gradient));
    }
  }
}

/// A warp a bag.
template <class Number>
__global__ __launch_bounds__(kLookupThreads, 1) void shares_of_bags_kernel(Lookup lookup, Bags bags,
                                                                           int64_t* bag_of_entry,
                                                                           float* share) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps = int64_t{gridDim.x} * kLookupWarps;
  const int64_t warp = (int64_t{blockIdx.x} * kLookupThreads + threadIdx.x) / kWarpSize;
  for (int64_t bag = warp; bag < bags.count; bag += warps) {
    const EntryRange range = entries_of(bags, bag, lookup.num_entries);
    int64_t used = 0;
    if (bags.is_mean) {
      for (int64_t first = range.begin; first < range.end; first += kWarpSize) {
        const int64_t i = first + lane;
        const bool is_used = i < range.end && lookup.indices[i] != lookup.padding_idx;
        used += __popc(__ballot_sync(kFullWarp, is_used));
      }
    }
    for (int64_t i = range.begin + lane; i < range.end; i += kWarpSize) {
      bag_of_entry[i] = bag;
      share[i] = bags.is_mean ? 1.0f / static_cast<float>(max(used, int64_t{1}))
                              : factor_of<Number>(bags, i);
    }
  }
}

template <class Number, int kColumns, class Shape>
Layout layout_of(const Lookup& lookup, std::initializer_list<const void*> matrices) {
  return make_layout<Number, kColumns, RowMaker<Number, kColumns, Shape>::kSharing>(lookup,
                                                                                    matrices);
}

}  // namespace

LookupPlan plan_lookup_backward(const Lookup& lookup) {
  LookupPlan plan{};
  with_kernel(lookup.weight, [&]<class Number, class Shape>(Number, auto columns, Shape) {
    const Layout layout = layout_of<Number, columns, Shape>(lookup, {});
    const int64_t warps = int64_t{kWarpsAtOnce} * current_device().processors;
    // Short runs where there is not enough for everybody.
    plan.run = static_cast<int>(
        std::clamp<int64_t>(num_steps(layout, lookup.num_entries) / warps, 1, kLongestRun));
    plan.blocks =
        lookup_blocks(layout, (lookup.num_entries + plan.run - 1) / plan.run, kBlocksAProcessor);
  });
  return plan;
}

void lookup_backward(const Lookup& lookup, const LookupPlan& plan, const void* grad,
                     const int64_t* grad_row, const float* share, const LookupGradients& gradients,
                     cudaStream_t stream) {
  with_kernel(lookup.weight, [&]<class Number, class Shape>(Number, auto columns, Shape) {
    constexpr int kColumns = columns;
    using Maker = RowMaker<Number, kColumns, Shape>;
    const Layout layout = layout_of<Number, kColumns, Shape>(lookup, {grad});
    const size_t shared = block_sum_bytes(Maker::kThetaSize, kLookupThreads);
    launch("lookup_backward", lookup_backward_kernel<Number, kColumns, Shape>,
           {plan.blocks, kLookupThreads, shared}, stream, lookup, layout, plan.run,
           Rows<const Number>{static_cast<const Number*>(grad), lookup.cols, layout.aligned},
           grad_row, share, gradients);
  });
}

void shares_of_bags(const Lookup& lookup, const Bags& bags, int64_t* bag_of_entry, float* share,
                    cudaStream_t stream) {
  with_kernel(lookup.weight, [&]<class Number, class Shape>(Number, auto, Shape) {
    constexpr int64_t kMostBlocks = 1 << 16;
    const auto blocks =
        std::clamp<int64_t>((bags.count + kLookupWarps - 1) / kLookupWarps, 1, kMostBlocks);
    launch("shares_of_bags", shares_of_bags_kernel<Number>,
           {static_cast<unsigned>(blocks), kLookupThreads}, stream, lookup, bags, bag_of_entry,
           share);
  });
}

void factor_gradients(const Lookup& lookup, const int64_t* bag_of_entry, const void* grad,
                      void* grad_factors, cudaStream_t stream) {
  with_kernel(lookup.weight, [&]<class Number, class Shape>(Number, auto columns, Shape) {
    constexpr int kColumns = columns;
    const Layout layout = layout_of<Number, kColumns, Shape>(lookup, {grad, lookup.dense});
    Layout whole = layout;
    whole.stretches = 1;
    launch("factor_gradients", factor_gradients_kernel<Number, kColumns, Shape>,
           {lookup_blocks(whole, lookup.num_entries, kBlocksAProcessor), kLookupThreads}, stream,
           lookup, layout, dense_rows<Number>(lookup, layout), bag_of_entry,
           Rows<const Number>{static_cast<const Number*>(grad), lookup.cols, layout.aligned},
           Rows<Number>{static_cast<Number*>(grad_factors), 1, true});
  });
}

}  // namespace hfh::cuda
