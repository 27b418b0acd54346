#include <algorithm>

#include "torch/lookup.h"
#include "torch/pool_gradient.h"

namespace hfh::torch_ops {

namespace {

using cpu::kernels;

constexpr int64_t kTileCols = 512;
constexpr int64_t kTileEntries = 512;
constexpr int64_t kTileElements = 1024;
// Bound of what one thread lists.
constexpr int64_t kListBytes = 5 << 17;

struct RowWork : PoolWork {
  RowGradients rows;
};

struct ElementWork : PoolWork {
  std::vector<uint32_t> row, col;
  std::vector<double> grad;
};

/// Some entries of a look-up times some columns.
class EntryTiles {
 public:
  using Work = RowWork;

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

  int64_t num_columns() const { return 1; }
  void select_column(int64_t) {}
  void list_contributions() {}
  int64_t count() const { return across_ * ((num_entries_ + entries_ - 1) / entries_); }
  ListBounds bounds() const { return {entries_ * row_.entries, entries_ * row_.values}; }

  RowWork make_work() const { return {}; }

  void run(int64_t index, RowWork& work) const {
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
  using Work = ElementWork;

  ElementTiles(const Table& table, const at::Tensor& ranks, const at::Tensor& grad)
      : table_(table),
        ranks_(ranks.const_data_ptr<int64_t>()),
        grad_(grad.const_data_ptr<Gradient>()),
        size_(grad.numel()) {}

  int64_t num_columns() const { return 1; }
  void select_column(int64_t) {}
  void list_contributions() {}
  int64_t count() const { return (size_ + kTileElements - 1) / kTileElements; }
  ListBounds bounds() const {
    const int64_t lanes = kernels().lanes;
    const int64_t entries = round_up(kTileElements, lanes) * table_.weight().get().hash.num_hashes;
    return {entries, entries};
  }

  ElementWork make_work() const { return {}; }

  void run(int64_t index, ElementWork& work) const {
    work.row.resize(kTileElements);
    work.col.resize(kTileElements);
    work.grad.resize(kTileElements);
    auto* grad = reinterpret_cast<Scalar*>(work.grad.data());
    int64_t count = 0;
    for (int64_t i = index * kTileElements; i < std::min(size_, (index + 1) * kTileElements); ++i) {
      if (ranks_[i] < 0 || table_.is_dense(ranks_[i])) continue;
      work.row[count] = table_.virtual_row(ranks_[i]);
      work.col[count] = table_.weight().get().col_offset + static_cast<uint32_t>(i % table_.cols());
      grad[count++] = static_cast<Scalar>(grad_[i]);
    }
    kernels().elements_backward(table_.weight().get(),
                                {work.row.data(), work.col.data(), grad, count},
                                work.grad_theta.data(), &work.contributions);
  }

 private:
  const Table& table_;
  const int64_t* ranks_;
  const Gradient* grad_;
  int64_t size_;
};

template <class Tiles>
WeightGradients backward_of_tiles(const CheckedWeight& weight, Tiles tiles) {
  WeightGradients result = zero_gradients(weight);
  add_pool_gradient(weight, tiles, result);
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
