#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "torch/lookup.h"
#include "torch/parallel.h"

// The pool's gradient behind a look-up. Where pools are small each thread adds to one of its own;
// where they are large, threads list what they would add, and then each adds what belongs to its
// stretch of the pool. Both orders depend on the number of threads alone.

namespace hfh::torch_ops {

namespace {

using cpu::kernels;
using cpu::PoolContributions;

constexpr int64_t kTileCols = 512;
constexpr int64_t kTileEntries = 512;
constexpr int64_t kTileElements = 1024;
// Bound of what one thread lists, and of what each but the first may hold of pool gradients.
constexpr int64_t kListBytes = 5 << 17;
constexpr int64_t kReplicaBytes = 4 << 20;

/// What one thread works with. `offsets` and `values` are empty where it has a pool gradient.
struct Work {
  at::Tensor offsets, values;
  PoolContributions contributions{};
  std::vector<double> grad_theta;
  RowGradients rows;
  std::vector<uint32_t> element_row, element_col;
  std::vector<double> element_grad;
};

/// Entries and values that a tile lists at most.
struct ListBounds {
  int64_t entries, values;
};

/// Some entries of a look-up times some columns.
class EntryTiles {
 public:
  EntryTiles(const CheckedWeight& weight, int64_t num_entries, const GradientSource& source)
      : weight_(weight),
        num_entries_(num_entries),
        source_(source),
        cols_(std::clamp<int64_t>(weight.cols(), 1, kTileCols)) {
    kernels().contribution_bounds(weight.get(), {0, 1, 0, cols_}, &row_.entries, &row_.values);
    const int64_t row_bytes = row_.entries * static_cast<int64_t>(sizeof(uint32_t)) +
                              row_.values * element_size(weight.compute_dtype());
    entries_ = std::clamp<int64_t>(kListBytes / row_bytes, 1, kTileEntries);
    across_ = (weight.cols() + cols_ - 1) / cols_;
  }

  int64_t count() const { return across_ * ((num_entries_ + entries_ - 1) / entries_); }
  ListBounds bounds() const { return {entries_ * row_.entries, entries_ * row_.values}; }

  void run(int64_t index, Work& work) const {
    const int64_t begin = index / across_ * entries_, col = index % across_ * cols_;
    const int64_t end = std::min(num_entries_, begin + entries_);
    const int64_t cols = std::min(cols_, weight_.cols() - col);
    RowGradients& rows = work.rows;
    rows.row.resize(entries_);
    rows.place.resize(entries_);
    rows.count = 0;
    source_(begin, end, col, cols, rows);
    kernels().lookup_backward(
        weight_.get(), {rows.row.data(), rows.place.data(), rows.count, rows.count}, col, cols,
        rows.data, rows.dtype, work.grad_theta.data(), &work.contributions);
  }

 private:
  const CheckedWeight& weight_;
  int64_t num_entries_;
  const GradientSource& source_;
  int64_t cols_, entries_, across_;
  ListBounds row_{};
};

/// Elements that each come from a row of their own.
template <class Gradient, class Scalar>
class ElementTiles {
 public:
  ElementTiles(const Table& table, const at::Tensor& ranks, const at::Tensor& grad)
      : table_(table),
        ranks_(ranks.const_data_ptr<int64_t>()),
        grad_(grad.const_data_ptr<Gradient>()),
        size_(grad.numel()) {}

  int64_t count() const { return (size_ + kTileElements - 1) / kTileElements; }
  ListBounds bounds() const {
    const int64_t lanes = kernels().lanes;
    const int64_t entries = round_up(kTileElements, lanes) * table_.weight().get().hash.num_hashes;
    return {entries, entries};
  }

  void run(int64_t index, Work& work) const {
    work.element_row.resize(kTileElements);
    work.element_col.resize(kTileElements);
    work.element_grad.resize(kTileElements);
    auto* grad = reinterpret_cast<Scalar*>(work.element_grad.data());
    int64_t count = 0;
    for (int64_t i = index * kTileElements; i < std::min(size_, (index + 1) * kTileElements); ++i) {
      if (ranks_[i] < 0 || table_.is_dense(ranks_[i])) continue;
      work.element_row[count] = table_.virtual_row(ranks_[i]);
      work.element_col[count] =
          table_.weight().get().col_offset + static_cast<uint32_t>(i % table_.cols());
      grad[count++] = static_cast<Scalar>(grad_[i]);
    }
    kernels().elements_backward(table_.weight().get(),
                                {work.element_row.data(), work.element_col.data(), grad, count},
                                work.grad_theta.data(), &work.contributions);
  }

 private:
  const Table& table_;
  const int64_t* ranks_;
  const Gradient* grad_;
  int64_t size_;
};

Work make_work(const CheckedWeight& weight, ListBounds bounds, bool lists) {
  Work work;
  work.grad_theta.assign(weight.theta_size(), 0.0);
  if (!lists) return work;
  work.offsets = at::empty({bounds.entries}, at::dtype(at::kInt));
  work.values = at::empty({bounds.values}, at::dtype(weight.compute_dtype()));
  work.contributions.offset = reinterpret_cast<uint32_t*>(work.offsets.mutable_data_ptr<int>());
  work.contributions.values = work.values.mutable_data_ptr();
  return work;
}

void add_theta(std::vector<double>& sum, std::vector<double>& part) {
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += std::exchange(part[i], 0.0);
}

template <class Tiles>
void backward_by_replicas(const CheckedWeight& weight, const Tiles& tiles, int64_t threads,
                          WeightGradients& result) {
  std::vector<at::Tensor> replicas{result.pool};
  std::vector<Work> work;
  for (int64_t i = 0; i < threads; ++i) {
    if (i > 0) replicas.push_back(at::empty_like(result.pool));
    work.push_back(make_work(weight, tiles.bounds(), false));
    work.back().contributions.sum = replicas.back().mutable_data_ptr();
  }
  const int64_t share = (tiles.count() + threads - 1) / threads;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memset(work[i].contributions.sum, 0, replicas[i].nbytes());
      for (int64_t t = i * share; t < std::min(tiles.count(), (i + 1) * share); ++t) {
        tiles.run(t, work[i]);
      }
    }
  });
  for (int64_t i = 0; i < threads; ++i) {
    if (i > 0) result.pool.add_(replicas[i]);
    add_theta(result.theta, work[i].grad_theta);
  }
}

template <class Tiles>
void backward_by_rounds(const CheckedWeight& weight, const Tiles& tiles, int64_t threads,
                        WeightGradients& result) {
  const VirtualWeight& virtual_weight = weight.get();
  std::vector<Work> round;
  for (int64_t i = 0; i < threads; ++i) round.push_back(make_work(weight, tiles.bounds(), true));
  const int64_t pool_size = result.pool.numel();
  const int64_t stretch =
      round_up((pool_size + threads - 1) / threads, virtual_weight.hash.block());
  result.pool.zero_();
  for (int64_t first = 0; first < tiles.count(); first += threads) {
    const int64_t count = std::min(threads, tiles.count() - first);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) tiles.run(first + i, round[i]);
    });
    parallel_stretches(pool_size, stretch, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; ++i) {
        kernels().scatter(round[i].contributions, virtual_weight.pool_dtype,
                          static_cast<uint32_t>(begin), static_cast<uint32_t>(end),
                          result.pool.mutable_data_ptr());
      }
    });
    for (int64_t i = 0; i < count; ++i) add_theta(result.theta, round[i].grad_theta);
  }
}

template <class Tiles>
WeightGradients backward_of_tiles(const CheckedWeight& weight, const Tiles& tiles) {
  const HashParams& hash = weight.get().hash;
  const int64_t pool_size = int64_t{hash.num_slots} << hash.log2_block;
  WeightGradients result{at::empty({pool_size}, at::dtype(weight.compute_dtype())),
                         std::vector<double>(weight.theta_size(), 0.0)};
  const int64_t threads =
      std::clamp<int64_t>(tiles.count(), 1, static_cast<int64_t>(at::get_num_threads()));
  // What is held beyond the gradient that the caller gets: of a bfloat16 pool, the first one too.
  const int64_t extra = threads - (weight.get().pool_dtype == DType::kBFloat16 ? 0 : 1);
  if (threads == 1 ||
      extra * static_cast<int64_t>(result.pool.nbytes()) <= (threads - 1) * kReplicaBytes) {
    backward_by_replicas(weight, tiles, threads, result);
  } else {
    backward_by_rounds(weight, tiles, threads, result);
  }
  return result;
}

}  // namespace

WeightGradients lookup_backward(const CheckedWeight& weight, int64_t num_entries,
                                const GradientSource& source) {
  return backward_of_tiles(weight,
                           EntryTiles(weight, weight.cols() == 0 ? 0 : num_entries, source));
}

WeightGradients elements_backward(const Table& table, const at::Tensor& ranks,
                                  const at::Tensor& grad) {
  switch (table.weight().get().pool_dtype) {
    case DType::kFloat64:
      return backward_of_tiles(table.weight(), ElementTiles<double, double>(table, ranks, grad));
    case DType::kBFloat16:
      return backward_of_tiles(table.weight(),
                               ElementTiles<c10::BFloat16, float>(table, ranks, grad));
    default:
      return backward_of_tiles(table.weight(), ElementTiles<float, float>(table, ranks, grad));
  }
}

}  // namespace hfh::torch_ops
