#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "torch/panels.h"
#include "torch/weight.h"

// A table of embeddings, a few rows of its own and then those of a virtual weight, and the indices
// looked up in it. Rows exist a handful at a time.

namespace hfh::torch_ops {

/// The ranks that indices stand for: the indices themselves, or what a permutation makes of them.
class Ranks {
 public:
  /// Stands for padding.
  static constexpr int64_t kNone = -1;

  Ranks(const at::Tensor& indices, const std::optional<at::Tensor>& permutation,
        int64_t num_embeddings, int64_t padding_idx);

  int64_t size() const { return indices_.numel(); }

  /// The rank of entry i, or kNone. An IndexError where the index or its rank is out of range.
  int64_t operator[](int64_t i) const {
    const int64_t index = wide_ != nullptr ? wide_[i] : int64_t{narrow_[i]};
    if (index == padding_idx_) return kNone;
    if (!in_range(index)) refuse(index);
    if (permuted_ == nullptr) return index;
    const int64_t rank = permuted_[index];
    if (!in_range(rank)) refuse_permutation(index, rank);
    return rank;
  }

 private:
  bool in_range(int64_t i) const {
    return static_cast<uint64_t>(i) < static_cast<uint64_t>(num_embeddings_);
  }
  [[noreturn]] void refuse(int64_t index) const;
  [[noreturn]] void refuse_permutation(int64_t index, int64_t rank) const;

  at::Tensor indices_, permutation_;
  const int64_t* wide_ = nullptr;
  const int32_t* narrow_ = nullptr;
  const int64_t* permuted_ = nullptr;
  int64_t num_embeddings_;
  int64_t padding_idx_ = std::numeric_limits<int64_t>::min();
};

/// The rows: `dense`, if any, holds those of the first ranks; the others are virtual.
class Table {
 public:
  Table(const CheckedWeight& weight, const std::optional<at::Tensor>& dense,
        const at::Tensor& pool);

  const CheckedWeight& weight() const { return weight_; }
  int64_t cols() const { return weight_.cols(); }
  int64_t dense_rows() const { return dense_rows_; }
  bool is_dense(int64_t rank) const { return rank < dense_rows_; }
  const char* dense_row(int64_t rank) const { return dense_data_ + rank * cols() * element_size_; }
  uint32_t virtual_row(int64_t rank) const {
    return weight_.get().row_offset + static_cast<uint32_t>(rank);
  }
  bool is_bfloat16() const { return weight_.get().pool_dtype == DType::kBFloat16; }
  /// Bytes of an element as it is stored.
  int64_t element_size() const { return element_size_; }

 private:
  const CheckedWeight& weight_;
  at::Tensor dense_;
  const char* dense_data_ = nullptr;
  int64_t dense_rows_ = 0, element_size_;
};

/// Reads the rows of some entries, in the dtype that kernels compute in, into scratch of the
/// calling thread.
class RowReader {
 public:
  RowReader(const Table& table, const Ranks& ranks);

  /// Bounds of what can be read at once.
  int64_t entries_at_once() const { return entries_at_once_; }
  int64_t cols_at_once() const { return cols_at_once_; }

  /// Columns [col, col + cols) of entries [begin, end), padding left out.
  void read(int64_t begin, int64_t end, int64_t col, int64_t cols);

  /// What was read: the row, the entry and the rank of each.
  int64_t count() const { return count_; }
  const void* const* rows() const { return rows_.data(); }
  const int64_t* entries() const { return entries_.data(); }
  const int64_t* ranks() const { return entry_ranks_.data(); }

 private:
  const Table& table_;
  const Ranks& ranks_;
  int64_t entries_at_once_, cols_at_once_, count_ = 0;
  char* scratch_;
  std::vector<const void*> rows_;
  std::vector<int64_t> entries_, entry_ranks_, places_;
  std::vector<uint32_t> virtual_rows_;
};

/// Where the gradients of looked-up rows are: that of `row[i]` from element `place[i]` of `data`
/// on.
struct RowGradients {
  std::vector<uint32_t> row;
  std::vector<int64_t> place;
  int64_t count = 0;
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<char> computed;  // storage for `data` that is not given but computed

  void add(uint32_t one_row, int64_t one_place) {
    row[count] = one_row;
    place[count++] = one_place;
  }
};

/// Fills in the gradients of columns [col, col + cols) of entries [begin, end).
using GradientSource =
    std::function<void(int64_t begin, int64_t end, int64_t col, int64_t cols, RowGradients&)>;

/// The gradients of pool and theta, given those of the rows of `num_entries` entries.
WeightGradients lookup_backward(const CheckedWeight& weight, int64_t num_entries,
                                const GradientSource& source);

/// The same where each element of a matrix comes from a row of its own: `ranks` [n, cols] as
/// `Ranks` has them, `grad` [n, cols].
WeightGradients elements_backward(const Table& table, const at::Tensor& ranks,
                                  const at::Tensor& grad);

/// Adds `factor` times a row of gradient, from element `place` on, to that of dense row `rank`.
using AddDenseRow = std::function<void(int64_t rank, int64_t place, double factor)>;

/// The gradient of the dense rows, like `pool` in dtype. `for_each(add)` calls `add` for every
/// entry in order, whatever its rank.
at::Tensor dense_backward(const Table& table, const at::Tensor& grad,
                          const std::function<void(const AddDenseRow&)>& for_each);

DType kernel_dtype(at::ScalarType dtype);

/// Refuses a negative size.
int64_t checked_size(int64_t size, const char* name);

/// Refuses a gradient that does not fit the output it belongs to.
void check_lookup_gradient(const at::Tensor& grad, at::IntArrayRef sizes, const at::Tensor& pool);

}  // namespace hfh::torch_ops
