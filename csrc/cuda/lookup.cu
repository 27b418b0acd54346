#include "cuda/bags.h"
#include "cuda/lookup.h"
#include "cuda/rows.h"

// hfh::embedding and hfh::embedding_bag, forward.

namespace hfh::cuda {

namespace {

constexpr int kBlocksAProcessor = 64;
// Rows and columns are counted in int32 within a row, and lanes may reach beyond the last.
constexpr int64_t kMaxCols = (int64_t{1} << 31) - (1 << 16);

template <class Number, int kColumns, class Shape>
__global__ __launch_bounds__(kLookupThreads, 4) void embedding_kernel(Lookup lookup, Layout layout,
                                                                   Rows<const Number> dense,
                                                                   Rows<Number> output) {
  const RowMaker<Number, kColumns, Shape> maker(lookup.weight, layout);
  for (Walk walk(layout, lookup.num_entries); walk.goes_on(); walk.step()) {
    const int64_t entry = walk.row();
    const int col = walk.col<kColumns>();
    const bool inside = entry < lookup.num_entries;
    const Rank rank = look_up(lookup, inside ? lookup.indices[entry] : 0, inside);
    float row[kColumns];
    make_row(maker, dense, lookup.num_dense, rank, col, row);
    if (inside) output.write(entry, col, Columns<Number, kColumns>::pack_from(row));
  }
}

template <class Number, int kColumns, class Shape>
__global__ __launch_bounds__(kLookupThreads, 1) void embedding_bag_kernel(Lookup lookup, Bags bags,
                                                                          Layout layout,
                                                                          Rows<const Number> dense,
                                                                          Rows<Number> output) {
  const RowMaker<Number, kColumns, Shape> maker(lookup.weight, layout);
  for (Walk walk(layout, bags.count); walk.goes_on(); walk.step()) {
    const int64_t bag = walk.row();
    const int col = walk.col<kColumns>();
    const EntryRange range = entries_of(bags, bag, lookup.num_entries);
    float sum[kColumns] = {};
    int64_t used = 0;
    int64_t index = range.begin < range.end ? lookup.indices[range.begin] : 0;
    for (int64_t entry = range.begin; __any_sync(kFullWarp, entry < range.end); ++entry) {
      const Rank rank = look_up(lookup, index, entry < range.end);
      // Ahead of time: the next row waits for it.
      index = entry + 1 < range.end ? lookup.indices[entry + 1] : 0;
      float row[kColumns];
      make_row(maker, dense, lookup.num_dense, rank, col, row);
      if (!rank.exists) continue;
      const float factor = factor_of<Number>(bags, entry);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[j] = fmaf(factor, row[j], sum[j]);
      ++used;
    }
    if (bags.is_mean && used > 1) {
#pragma unroll
      for (float& x : sum) x /= static_cast<float>(used);
    }
    if (bag < bags.count) output.write(bag, col, Columns<Number, kColumns>::pack_from(sum));
  }
}

}  // namespace

std::string why_not_lookup(const VirtualWeight& weight, int64_t cols) {
  if (cols > kMaxCols) {
    return "rows have at most " + std::to_string(kMaxCols) + " columns, received " +
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
    launch("embedding_bag", embedding_bag_kernel<Number, kColumns, Shape>,
           {lookup_blocks(layout, bags.count, kBlocksAProcessor), kLookupThreads}, stream, lookup,
           bags, layout, dense_rows<Number>(lookup, layout),
           Rows<Number>{static_cast<Number*>(output), lookup.cols, layout.aligned});
  });
}

}  // namespace hfh::cuda
