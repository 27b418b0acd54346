#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "torch/bag_sums.h"
#include "torch/bags.h"
#include "torch/lookup.h"
#include "torch/parallel.h"

// hfh::embedding_bag and its gradient on the CPU.

namespace hfh::torch_ops {

namespace {

using cpu::kernels;

/// Writes the greatest of each column of bags [begin, end), of columns [col, col + cols).
template <class Scalar>
void max_bags(const Lookup& lookup, RowReader& reader, int64_t begin, int64_t end, int64_t col,
              int64_t cols, void* out, int64_t* winners) {
  constexpr DType kDType = std::is_same_v<Scalar, double> ? DType::kFloat64 : DType::kFloat32;
  std::vector<Scalar> best(cols);
  for (int64_t bag = begin; bag < end; ++bag) {
    std::fill(best.begin(), best.end(), Scalar{0});
    const int64_t last = lookup.bags.end(bag);
    for (int64_t first = lookup.bags.begin(bag); first < last; first += reader.entries_at_once()) {
      reader.read(first, std::min(last, first + reader.entries_at_once()), col, cols);
      kernels().max_rows(kDType, reader.count(), cols, reader.rows(), reader.ranks(), best.data(),
                         winners + bag * lookup.table.cols() + col);
    }
    write_bag(lookup, bag, best.data(), col, cols, out);
  }
}

template <class Scalar>
void reduce_bags(const Lookup& lookup, int64_t begin, int64_t end, void* out, int64_t* winners) {
  const int64_t width = lookup.table.cols();
  if (lookup.mode == Mode::kMax) {
    RowReader reader(lookup.table, lookup.ranks);
    for (int64_t col = 0; col < width; col += reader.cols_at_once()) {
      const int64_t cols = std::min(reader.cols_at_once(), width - col);
      max_bags<Scalar>(lookup, reader, begin, end, col, cols, out, winners);
    }
    return;
  }
  const int64_t cols_at_once = std::min<int64_t>(512, width);
  BagSums<Scalar> sums(lookup, cols_at_once);
  for (int64_t col = 0; col < width; col += cols_at_once) {
    sums.write(begin, end, col, std::min(cols_at_once, width - col), out);
  }
}

std::tuple<at::Tensor, at::Tensor> embedding_bag(
    const at::Tensor& indices, const at::Tensor& offsets, const at::Tensor& pool,
    const at::Tensor& theta, const std::optional<at::Tensor>& dense,
    const std::optional<at::Tensor>& permutation,
    const std::optional<at::Tensor>& per_sample_weights, int64_t num_embeddings,
    int64_t embedding_dim, c10::string_view mode, bool include_last_offset, int64_t padding_idx,
    HFH_WEIGHT_PARAMETERS) {
  const Lookup lookup(indices, offsets, pool, theta, dense, permutation, per_sample_weights,
                      num_embeddings, embedding_dim, mode, include_last_offset, padding_idx,
                      {HFH_WEIGHT_ARGUMENTS});
  const int64_t num_bags = lookup.bags.count();
  at::Tensor out = at::empty({num_bags, embedding_dim}, pool.options());
  at::Tensor winners = at::full({lookup.mode == Mode::kMax ? num_bags : 0, embedding_dim},
                                Ranks::kNone, at::dtype(at::kLong));
  if (out.numel() == 0) return {out, winners};
  void* data = out.mutable_data_ptr();
  auto* winner = winners.mutable_data_ptr<int64_t>();
  // Threads take bags with about as many entries each.
  const int64_t entries = lookup.bags.end(num_bags - 1), threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const auto first_bag = [&](int64_t thread) {
      return thread == threads ? num_bags
                               : std::min(lookup.bags.bag_of(entries * thread / threads), num_bags);
    };
    const int64_t begin = first == 0 ? 0 : first_bag(first), end = first_bag(last);
    if (begin >= end) return;
    if (lookup.weight.compute_dtype() == at::kDouble) {
      reduce_bags<double>(lookup, begin, end, data, winner);
    } else {
      reduce_bags<float>(lookup, begin, end, data, winner);
    }
  });
  return {out, winners};
}

/// Calls `visit(entry, bag, factor)` for entries [begin, end) that are in a bag.
template <class Visit>
void for_each_entry(const Lookup& lookup, int64_t begin, int64_t end, const Visit& visit) {
  int64_t entry = begin;
  for (int64_t bag = lookup.bags.bag_of(begin); bag < lookup.bags.count() && entry < end; ++bag) {
    const int64_t stop = std::min(end, lookup.bags.end(bag));
    if (entry == stop) continue;
    const int64_t used = lookup.mode == Mode::kMean ? lookup.used(bag) : 1;
    const double share = 1.0 / static_cast<double>(std::max<int64_t>(1, used));
    for (; entry < stop; ++entry) {
      visit(entry, bag, lookup.factors.given() ? lookup.factors[entry] : share);
    }
  }
}

/// Where the gradient of each entry is: that of its bag, or a copy of it times the entry's factor.
template <class Gradient, class Scalar>
void fill_gradients(const Lookup& lookup, const at::Tensor& grad, int64_t begin, int64_t end,
                    int64_t col, int64_t cols, RowGradients& out) {
  const auto* gradient = grad.const_data_ptr<Gradient>();
  const bool scaled = lookup.factors.given() || lookup.mode == Mode::kMean;
  out.data = gradient;
  out.dtype = kernel_dtype(grad.scalar_type());
  Scalar* computed = nullptr;
  if (scaled) {
    out.computed.resize((end - begin) * cols * sizeof(Scalar));
    computed = reinterpret_cast<Scalar*>(out.computed.data());
    out.data = computed;
    out.dtype = kernel_dtype(c10::CppTypeToScalarType<Scalar>::value);
  }
  for_each_entry(lookup, begin, end, [&](int64_t entry, int64_t bag, double factor) {
    const int64_t rank = lookup.ranks[entry];
    if (rank == Ranks::kNone || lookup.table.is_dense(rank)) return;
    int64_t place = bag * lookup.table.cols() + col;
    if (scaled) {
      const Gradient* source = gradient + place;
      place = (entry - begin) * cols;
      for (int64_t c = 0; c < cols; ++c) {
        computed[place + c] = static_cast<Scalar>(factor) * static_cast<Scalar>(source[c]);
      }
    }
    out.add(lookup.table.virtual_row(rank), place);
  });
}

/// grad_weights[i] = the row of entry i times the gradient of its bag.
template <class Gradient, class Scalar>
at::Tensor factors_backward(const Lookup& lookup, const at::Tensor& grad) {
  at::Tensor result = at::zeros({lookup.ranks.size()}, at::dtype(lookup.weight.compute_dtype()));
  auto* sums = result.mutable_data_ptr<Scalar>();
  const auto* gradient = grad.const_data_ptr<Gradient>();
  const int64_t width = lookup.table.cols();
  const int64_t entries = lookup.bags.count() == 0 ? 0 : lookup.bags.end(lookup.bags.count() - 1);
  at::parallel_for(0, entries, 256, [&](int64_t begin, int64_t end) {
    RowReader reader(lookup.table, lookup.ranks);
    for (int64_t col = 0; col < width; col += reader.cols_at_once()) {
      const int64_t cols = std::min(reader.cols_at_once(), width - col);
      for (int64_t first = begin; first < end; first += reader.entries_at_once()) {
        const int64_t stop = std::min(end, first + reader.entries_at_once());
        reader.read(first, stop, col, cols);
        int64_t i = 0;
        for_each_entry(lookup, first, stop, [&](int64_t entry, int64_t bag, double) {
          if (i == reader.count() || reader.entries()[i] != entry) return;
          const auto* row = static_cast<const Scalar*>(reader.rows()[i++]);
          const Gradient* other = gradient + bag * width + col;
          Scalar sum = 0;
          for (int64_t c = 0; c < cols; ++c) sum += row[c] * static_cast<Scalar>(other[c]);
          sums[entry] += sum;
        });
      }
    }
  });
  return result.to(grad.scalar_type());
}

template <class Gradient, class Scalar>
std::tuple<WeightGradients, at::Tensor, at::Tensor> gradients_of(const Lookup& lookup,
                                                                 const at::Tensor& grad,
                                                                 const at::Tensor& winners) {
  const int64_t cols = lookup.table.cols();
  const at::Tensor none = at::empty({0}, grad.options());
  if (lookup.mode == Mode::kMax) {
    const auto* ranks = winners.const_data_ptr<int64_t>();
    // Of each rank, the elements that it won.
    at::Tensor grad_dense =
        at::zeros({lookup.table.dense_rows(), cols}, at::dtype(lookup.weight.compute_dtype()));
    auto* sums = grad_dense.mutable_data_ptr<Scalar>();
    const auto* gradient = grad.const_data_ptr<Gradient>();
    for (int64_t i = 0; grad_dense.numel() > 0 && i < winners.numel(); ++i) {
      if (ranks[i] == Ranks::kNone || !lookup.table.is_dense(ranks[i])) continue;
      sums[ranks[i] * cols + i % cols] += static_cast<Scalar>(gradient[i]);
    }
    return {elements_backward(lookup.table, winners, grad), grad_dense.to(grad.scalar_type()),
            none};
  }
  const int64_t entries = lookup.bags.count() == 0 ? 0 : lookup.bags.end(lookup.bags.count() - 1);
  const auto source = [&](int64_t begin, int64_t end, int64_t col, int64_t count,
                          RowGradients& out) {
    fill_gradients<Gradient, Scalar>(lookup, grad, begin, end, col, count, out);
  };
  const at::Tensor grad_dense = dense_backward(lookup.table, grad, [&](const AddDenseRow& add) {
    for_each_entry(lookup, 0, entries, [&](int64_t entry, int64_t bag, double factor) {
      add(lookup.ranks[entry], bag * cols, factor);
    });
  });
  return {lookup_backward(lookup.weight, entries, source), grad_dense,
          lookup.factors.given() ? factors_backward<Gradient, Scalar>(lookup, grad) : none};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> embedding_bag_backward(
    const at::Tensor& grad, const at::Tensor& winners, const at::Tensor& indices,
    const at::Tensor& offsets, const at::Tensor& pool, const at::Tensor& theta,
    const std::optional<at::Tensor>& dense, const std::optional<at::Tensor>& permutation,
    const std::optional<at::Tensor>& per_sample_weights, int64_t num_embeddings,
    c10::string_view mode, bool include_last_offset, int64_t padding_idx, HFH_WEIGHT_PARAMETERS) {
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad must be 2-d, received shape ", grad.sizes());
  const Lookup lookup(indices, offsets, pool, theta, dense, permutation, per_sample_weights,
                      num_embeddings, grad.size(1), mode, include_last_offset, padding_idx,
                      {HFH_WEIGHT_ARGUMENTS});
  check_lookup_gradient(grad, {lookup.bags.count(), grad.size(1)}, pool);
  const at::Tensor gradient = grad.contiguous();
  const at::Tensor best = winners.contiguous();
  if (lookup.mode == Mode::kMax) {
    TORCH_CHECK_VALUE(best.scalar_type() == at::kLong && best.sizes() == grad.sizes(),
                      "winners must be int64 of grad's shape ", grad.sizes(), ", received ",
                      best.scalar_type(), " of shape ", best.sizes());
  }
  const auto [of_weight, of_dense, of_factors] = [&] {
    switch (pool.scalar_type()) {
      case at::kDouble:
        return gradients_of<double, double>(lookup, gradient, best);
      case at::kBFloat16:
        return gradients_of<c10::BFloat16, float>(lookup, gradient, best);
      default:
        return gradients_of<float, float>(lookup, gradient, best);
    }
  }();
  return {of_weight.pool.to(pool.scalar_type()),
          lookup.weight.theta_gradient(of_weight.theta, theta), of_dense, of_factors};
}

TORCH_LIBRARY_IMPL(hfh, CPU, m) {
  m.impl("embedding_bag", TORCH_FN(embedding_bag));
  m.impl("embedding_bag_backward", TORCH_FN(embedding_bag_backward));
}

}  // namespace

}  // namespace hfh::torch_ops
