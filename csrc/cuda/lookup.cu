#include "cuda/bags.h"
#include "cuda/lookup.h"
#include "cuda/rows.h"

// hfh::embedding and hfh::embedding_bag, forward.

namespace hfh::cuda {

namespace {

constexpr int kBlocksAProcessor = 64;
// Rows and columns are counted in int32 within a row, and lanes may reach beyond the last.

template <class Number, int kColumns, class Shape>
__global__ __launch_bounds__(kLookupThreads, 4) void embedding_kernel(Lookup lookup, Layout layout,
                                                                      Rows<const Number> dense,
                                                                      Rows<Number> output) {
  const RowMaker<Number, kColumns, Shape> maker(lookup.weight, layout);
  for (Walk walk(layout, lookup.num_entries, Worker::warp()); walk.goes_on(); walk.step()) {
    const int64_t entry = walk.row();
    const int col = walk.col<kColumns>();
    const bool inside = entry < lookup.num_entries;
    const Rank rank = look_up(lookup, inside ? lookup.indices[entry] : 0, inside);
    float row[kColumns];
    make_row(maker, dense, lookup.num_dense, rank, col, row);
    if (inside) output.write(entry, col, Columns<Number, kColumns>::pack_from(row));
  }
}

/// What a lane has added up of a bag.
template <int kColumns>
struct Partial {
  float sum[kColumns];
  int used;  // entries that are no padding
};

/// Adds the parts of a block's warps, for its first warp.
template <int kColumns>
__device__ __forceinline__ void add_parts(Partial<kColumns>& partial) {
  auto* parts = reinterpret_cast<Partial<kColumns>*>(shared_memory());
  parts[threadIdx.x] = partial;
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    for (int part = 1; part < kLookupWarps; ++part) {
      const Partial<kColumns>& other = parts[part * kWarpSize + threadIdx.x];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) partial.sum[j] += other.sum[j];
      partial.used += other.used;
    }
  }
  __syncthreads();
}

/// A team sums a bag, or with kSplit the teams of a block's warps, each some of the entries.
template <bool kSplit, class Number, int kColumns, class Shape>
__global__ __launch_bounds__(kLookupThreads, 1) void embedding_bag_kernel(Lookup lookup, Bags bags,
                                                                          Layout layout,
                                                                          Rows<const Number> dense,
                                                                          Rows<Number> output) {
  const RowMaker<Number, kColumns, Shape> maker(lookup.weight, layout);
  const int part = kSplit ? static_cast<int>(threadIdx.x) / kWarpSize : 0;
  constexpr int kParts = kSplit ? kLookupWarps : 1;
  for (Walk walk(layout, bags.count, kSplit ? Worker::block() : Worker::warp()); walk.goes_on();
       walk.step()) {
    const int64_t bag = walk.row();
    const int col = walk.col<kColumns>();
    const EntryRange range = entries_of(bags, bag, lookup.num_entries);
    const auto index_of = [&](int64_t i) { return i < range.end ? lookup.indices[i] : 0; };
    Partial<kColumns> partial{};
    int64_t index = index_of(range.begin + part);
    for (int64_t entry = range.begin + part; __any_sync(kFullWarp, entry < range.end);
         entry += kParts) {
      const Rank rank = look_up(lookup, index, entry < range.end);
      // Ahead of time: the next row waits for it.
      index = index_of(entry + kParts);
      float row[kColumns];
      make_row(maker, dense, lookup.num_dense, rank, col, row);
      if (!rank.exists) continue;
      const float factor = factor_of<Number>(bags, entry);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) partial.sum[j] = fmaf(factor, row[j], partial.sum[j]);
      ++partial.used;
    }
    if constexpr (kSplit) add_parts(partial);
    if (bags.is_mean && partial.used > 1) {
#pragma unroll
      for (float& x : partial.sum) x /= static_cast<float>(partial.used);
    }
    if (part == 0 && bag < bags.count) {
      output.write(bag, col, Columns<Number, kColumns>::pack_from(partial.sum));
    }
  }
}

/// Whether there are too few bags to keep the device busy with a warp each.
bool should_split(const Lookup& lookup, const Bags& bags, const Layout& layout) {
  constexpr int64_t kBusyWarps = 16, kLongBag = 16;
  return num_steps(layout, bags.count) < kBusyWarps * current_device().processors &&
         lookup.num_entries >= kLongBag * bags.count;
}

}  // namespace

std::string why_not_lookup(const VirtualWeight& weight, int64_t cols) {
  if (cols > kMaxExtent) {
    return "rows have at most " + std::to_string(kMaxExtent) + " columns, received " +
           std::to_string(cols);
  }
  return why_not_shape(weight);
}

std::string why_not_mode(const std::string& mode) {
  return mode == "max" ? "mode 'max' has no kernel here, backend 'triton' has one" : "";
}

void embedding(const Lookup& lookup, void* output, cudaStream_t stream) {
  with_kernel(lookup.weight, [&]<class Number, class Shape>(Number, auto columns, Shape) {
    constexpr int kColumns = columns;
    using Maker = RowMaker<Number, kColumns, Shape>;
    const Layout layout =
        make_layout<Number, kColumns, Maker::kSharing>(lookup, {output, lookup.dense});
    launch("embedding", embedding_kernel<Number, kColumns, Shape>,
           {lookup_blocks(layout, lookup.num_entries, kBlocksAProcessor), kLookupThreads}, stream,
           lookup, layout, dense_rows<Number>(lookup, layout),
           Rows<Number>{static_cast<Number*>(output), lookup.cols, layout.aligned});
  });
}

void embedding_bag(const Lookup& lookup, const Bags& bags, void* output, cudaStream_t stream) {
  with_kernel(lookup.weight, [&]<class Number, class Shape>(Number, auto columns, Shape) {
    constexpr int kColumns = columns;
    using Maker = RowMaker<Number, kColumns, Shape>;
    const Layout layout =
        make_layout<Number, kColumns, Maker::kSharing>(lookup, {output, lookup.dense});
    const auto run = [&]<bool kSplit>(std::bool_constant<kSplit>, unsigned blocks) {
      const size_t shared = kSplit ? kLookupThreads * sizeof(Partial<kColumns>) : 0;
      launch("embedding_bag", embedding_bag_kernel<kSplit, Number, kColumns, Shape>,
             {blocks, kLookupThreads, shared}, stream, lookup, bags, layout,
             dense_rows<Number>(lookup, layout),
             Rows<Number>{static_cast<Number*>(output), lookup.cols, layout.aligned});
    };
    if (should_split(lookup, bags, layout)) {
      run(std::true_type{}, static_cast<unsigned>(num_steps(layout, bags.count)));
    } else {
      run(std::false_type{}, lookup_blocks(layout, bags.count, kBlocksAProcessor));
    }
  });
}

}  // namespace hfh::cuda
