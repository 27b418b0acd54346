#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "torch/lookup.h"
#include "torch/parallel.h"

// hfh::embedding and its gradient on the CPU.

namespace hfh::torch_ops {

namespace {

using cpu::kernels;

// Entries whose rows one call of the kernel makes.
constexpr int64_t kEntriesAtOnce = 1024;
// Weights that a thread should get to make before another is woken.
constexpr int64_t kGrainWeights = 1 << 13;

// Results of this size leave a second-level cache before anybody reads them.
constexpr int64_t kPastCachesBytes = 4 << 20;

/// Rows go straight to where they belong.
void look_up(const Table& table, const Ranks& ranks, int64_t begin, int64_t end, char* out) {
  const int64_t cols = table.cols(), row_bytes = cols * table.element_size();
  uint32_t rows[kEntriesAtOnce];
  int64_t places[kEntriesAtOnce];
  for (int64_t first = begin; first < end; first += kEntriesAtOnce) {
    int64_t count = 0;
    for (int64_t i = first; i < std::min(end, first + kEntriesAtOnce); ++i) {
      const int64_t rank = ranks[i];
      if (rank == Ranks::kNone) {
        std::memset(out + i * row_bytes, 0, row_bytes);
      } else if (table.is_dense(rank)) {
        std::memcpy(out + i * row_bytes, table.dense_row(rank), row_bytes);
      } else {
        rows[count] = table.virtual_row(rank);
        places[count++] = i * cols;
      }
    }
    kernels().lookup(table.weight().get(), {rows, places, count, count}, 0, cols, out,
                     ranks.size() * row_bytes >= kPastCachesBytes);
  }
}

/// Rows are made in float and rounded.
void look_up_bfloat16(const Table& table, const Ranks& ranks, int64_t begin, int64_t end,
                      BFloat16* out) {
  const int64_t cols = table.cols();
  RowReader reader(table, ranks);
  std::memset(out + begin * cols, 0, (end - begin) * cols * sizeof(BFloat16));
  for (int64_t col = 0; col < cols; col += reader.cols_at_once()) {
    const int64_t count = std::min(reader.cols_at_once(), cols - col);
    for (int64_t first = begin; first < end; first += reader.entries_at_once()) {
      reader.read(first, std::min(end, first + reader.entries_at_once()), col, count);
      for (int64_t i = 0; i < reader.count(); ++i) {
        kernels().round_to_bfloat16(static_cast<const float*>(reader.rows()[i]),
                                    out + reader.entries()[i] * cols + col, count);
      }
    }
  }
}

at::Tensor embedding(const at::Tensor& indices, const at::Tensor& pool, const at::Tensor& theta,
                     const std::optional<at::Tensor>& dense,
                     const std::optional<at::Tensor>& permutation, int64_t num_embeddings,
                     int64_t embedding_dim, int64_t padding_idx, HFH_WEIGHT_PARAMETERS) {
  const CheckedWeight weight(pool, theta, checked_size(num_embeddings, "num_embeddings"),
                             checked_size(embedding_dim, "embedding_dim"), {HFH_WEIGHT_ARGUMENTS});
  const Table table(weight, dense, pool);
  const Ranks ranks(indices, permutation, num_embeddings, padding_idx);
  auto sizes = indices.sizes().vec();
  sizes.push_back(embedding_dim);
  at::Tensor out = at::empty(sizes, pool.options());
  void* data = out.mutable_data_ptr();
  const int64_t grain = std::max<int64_t>(1, kGrainWeights / std::max<int64_t>(1, embedding_dim));
  at::parallel_for(0, ranks.size(), grain, [&](int64_t begin, int64_t end) {
    if (table.is_bfloat16()) {
      look_up_bfloat16(table, ranks, begin, end, static_cast<BFloat16*>(data));
    } else {
      look_up(table, ranks, begin, end, static_cast<char*>(data));
    }
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> embedding_backward(
    const at::Tensor& grad, const at::Tensor& indices, const at::Tensor& pool,
    const at::Tensor& theta, const std::optional<at::Tensor>& dense,
    const std::optional<at::Tensor>& permutation, int64_t num_embeddings, int64_t padding_idx,
    HFH_WEIGHT_PARAMETERS) {
  auto sizes = indices.sizes().vec();
  sizes.push_back(grad.dim() == 0 ? 0 : grad.size(-1));
  check_lookup_gradient(grad, sizes, pool);
  const CheckedWeight weight(pool, theta, checked_size(num_embeddings, "num_embeddings"),
                             sizes.back(), {HFH_WEIGHT_ARGUMENTS});
  const Table table(weight, dense, pool);
  const Ranks ranks(indices, permutation, num_embeddings, padding_idx);
  const at::Tensor gradient = grad.contiguous();
  const int64_t cols = table.cols();
  const auto source = [&](int64_t begin, int64_t end, int64_t col, int64_t, RowGradients& out) {
    out.data = gradient.const_data_ptr();
    out.dtype = kernel_dtype(gradient.scalar_type());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t rank = ranks[i];
      if (rank == Ranks::kNone || table.is_dense(rank)) continue;
      out.add(table.virtual_row(rank), i * cols + col);
    }
  };
  const WeightGradients gradients = lookup_backward(weight, ranks.size(), source);
  const at::Tensor grad_dense = dense_backward(table, gradient, [&](const AddDenseRow& add) {
    for (int64_t i = 0; i < ranks.size(); ++i) add(ranks[i], i * cols, 1.0);
  });
  return {gradients.pool.to(pool.scalar_type()), weight.theta_gradient(gradients.theta, theta),
          grad_dense};
}

TORCH_LIBRARY_IMPL(hfh, CPU, m) {
  m.impl("embedding", TORCH_FN(embedding));
  m.impl("embedding_backward", TORCH_FN(embedding_backward));
}

}  // namespace

}  // namespace hfh::torch_ops
