#include "torch/lookup.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "torch/parallel.h"

namespace hfh::torch_ops {

namespace {

using cpu::kernels;

// What a RowReader holds at once: little beside a second-level cache. With less, the start of each
// look-up shows.
constexpr int64_t kReaderBytes = 1 << 16;
constexpr int64_t kReaderCols = 512;
constexpr int64_t kReaderEntries = 512;

}  // namespace

Ranks::Ranks(const at::Tensor& indices, const std::optional<at::Tensor>& permutation,
             int64_t num_embeddings, int64_t padding_idx)
    : num_embeddings_(num_embeddings) {
  check_cpu(indices, "indices");
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt,
                   "indices must be int32 or int64, received ", indices.scalar_type());
  indices_ = indices.contiguous();
  if (indices_.scalar_type() == at::kLong) {
    wide_ = indices_.const_data_ptr<int64_t>();
  } else {
    narrow_ = indices_.const_data_ptr<int32_t>();
  }
  TORCH_CHECK_VALUE(padding_idx < num_embeddings,
                    "padding_idx must be below num_embeddings=", num_embeddings, ", received ",
                    padding_idx);
  if (padding_idx >= 0) padding_idx_ = padding_idx;
  if (permutation.has_value()) {
    check_cpu(*permutation, "permutation");
    TORCH_CHECK_TYPE(permutation->scalar_type() == at::kLong,
                     "permutation must be int64, received ", permutation->scalar_type());
    TORCH_CHECK_VALUE(permutation->dim() == 1 && permutation->numel() == num_embeddings,
                      "permutation must have shape [", num_embeddings, "], received ",
                      permutation->sizes());
    permutation_ = permutation->contiguous();
    permuted_ = permutation_.const_data_ptr<int64_t>();
  }
}

void Ranks::refuse(int64_t index) const {
  TORCH_CHECK_INDEX(false, "indices must be in [0, num_embeddings=", num_embeddings_,
                    "), received ", index);
  std::abort();
}

void Ranks::refuse_permutation(int64_t index, int64_t rank) const {
  TORCH_CHECK_INDEX(false, "permutation must be in [0, num_embeddings=", num_embeddings_,
                    "), received ", rank, " for index ", index);
  std::abort();
}

Table::Table(const CheckedWeight& weight, const std::optional<at::Tensor>& dense,
             const at::Tensor& pool)
    : weight_(weight), element_size_(torch_ops::element_size(pool.scalar_type())) {
  if (!dense.has_value()) return;
  check_cpu(*dense, "dense");
  TORCH_CHECK_VALUE(
      dense->dim() == 2 && dense->size(0) <= weight.rows() && dense->size(1) == weight.cols(),
      "dense must have shape [at most num_embeddings=", weight.rows(),
      ", embedding_dim=", weight.cols(), "], received ", dense->sizes());
  TORCH_CHECK_TYPE(dense->scalar_type() == pool.scalar_type(), "dense must have pool's dtype ",
                   pool.scalar_type(), ", received ", dense->scalar_type());
  dense_ = dense->contiguous();
  dense_data_ = static_cast<const char*>(dense_.const_data_ptr());
  dense_rows_ = dense_.size(0);
}

RowReader::RowReader(const Table& table, const Ranks& ranks)
    : table_(table), ranks_(ranks), cols_at_once_(std::min(kReaderCols, table.cols())) {
  const int64_t element = torch_ops::element_size(table.weight().compute_dtype());
  const int64_t row_bytes = std::max<int64_t>(1, cols_at_once_) * element;
  entries_at_once_ = std::min(kReaderEntries, kReaderBytes / row_bytes);
  scratch_ = static_cast<char*>(Scratch<Purpose::kLookup>::get(kReaderBytes));
  rows_.resize(entries_at_once_);
  entries_.resize(entries_at_once_);
  entry_ranks_.resize(entries_at_once_);
  places_.resize(entries_at_once_);
  virtual_rows_.resize(entries_at_once_);
}

void RowReader::read(int64_t begin, int64_t end, int64_t col, int64_t cols) {
  const int64_t element = torch_ops::element_size(table_.weight().compute_dtype());
  int64_t num_virtual = 0;
  count_ = 0;
  for (int64_t entry = begin; entry < end; ++entry) {
    const int64_t rank = ranks_[entry];
    if (rank == Ranks::kNone) continue;
    char* slot = scratch_ + count_ * cols_at_once_ * element;
    rows_[count_] = slot;
    entries_[count_] = entry;
    entry_ranks_[count_] = rank;
    if (!table_.is_dense(rank)) {
      virtual_rows_[num_virtual] = table_.virtual_row(rank);
      places_[num_virtual++] = count_ * cols_at_once_;
    } else if (table_.is_bfloat16()) {
      const auto* source = reinterpret_cast<const c10::BFloat16*>(table_.dense_row(rank)) + col;
      std::copy_n(source, cols, reinterpret_cast<float*>(slot));
    } else {
      rows_[count_] = table_.dense_row(rank) + col * element;
    }
    ++count_;
  }
  kernels().lookup(table_.weight().get(),
                   {virtual_rows_.data(), places_.data(), num_virtual, num_virtual}, col, cols,
                   scratch_, false);
}

at::Tensor dense_backward(const Table& table, const at::Tensor& grad,
                          const std::function<void(const AddDenseRow&)>& for_each) {
  const int64_t cols = table.cols();
  at::Tensor sums =
      at::zeros({table.dense_rows(), cols}, at::dtype(table.weight().compute_dtype()));
  if (sums.numel() == 0) return sums.to(grad.scalar_type());
  // Each thread adds to rows of its own, every few of them: the frequent ones are neighbours.
  const int64_t threads = at::get_num_threads();
  const auto add_all = [&]<class Gradient, class Sum>(const Gradient* gradient, Sum* sum) {
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for_each([&](int64_t rank, int64_t place, double factor) {
        if (rank < 0 || !table.is_dense(rank)) return;
        if (rank % threads < first || rank % threads >= last) return;
        Sum* row = sum + rank * cols;
        for (int64_t c = 0; c < cols; ++c) {
          row[c] += static_cast<Sum>(factor) * static_cast<Sum>(gradient[place + c]);
        }
      });
    });
  };
  if (sums.scalar_type() == at::kDouble) {
    add_all(grad.const_data_ptr<double>(), sums.mutable_data_ptr<double>());
  } else if (grad.scalar_type() == at::kBFloat16) {
    add_all(grad.const_data_ptr<c10::BFloat16>(), sums.mutable_data_ptr<float>());
  } else {
    add_all(grad.const_data_ptr<float>(), sums.mutable_data_ptr<float>());
  }
  return sums.to(grad.scalar_type());
}

DType kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? DType::kBFloat16
         : dtype == at::kFloat  ? DType::kFloat32
                                : DType::kFloat64;
}

int64_t checked_size(int64_t size, const char* name) {
  TORCH_CHECK_VALUE(size >= 0, name, " must not be negative, received ", size);
  return size;
}

void check_lookup_gradient(const at::Tensor& grad, at::IntArrayRef sizes, const at::Tensor& pool) {
  check_cpu(grad, "grad");
  TORCH_CHECK_VALUE(grad.sizes() == sizes, "grad must have shape ", sizes, ", received ",
                    grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == pool.scalar_type(), "grad must have pool's dtype ",
                   pool.scalar_type(), ", received ", grad.scalar_type());
}

}  // namespace hfh::torch_ops
