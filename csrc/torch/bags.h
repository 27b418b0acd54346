#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "torch/lookup.h"

// What hfh::embedding_bag is given.

namespace hfh::torch_ops {

enum class Mode { kSum, kMean, kMax };

inline Mode checked_mode(c10::string_view mode) {
  TORCH_CHECK_VALUE(mode == "sum" || mode == "mean" || mode == "max",
                    "mode must be 'sum', 'mean' or 'max', received '", mode, "'");
  return mode == "sum" ? Mode::kSum : mode == "mean" ? Mode::kMean : Mode::kMax;
}

/// Bag b holds entries [begin(b), end(b)).
class Bags {
 public:
  Bags(const at::Tensor& offsets, bool include_last_offset, int64_t num_entries) {
    check_cpu(offsets, "offsets");
    TORCH_CHECK_TYPE(offsets.scalar_type() == at::kLong || offsets.scalar_type() == at::kInt,
                     "offsets must be int32 or int64, received ", offsets.scalar_type());
    TORCH_CHECK_VALUE(offsets.dim() == 1, "offsets must be 1-d, received shape ", offsets.sizes());
    TORCH_CHECK_VALUE(!include_last_offset || offsets.numel() > 0,
                      "offsets must not be empty with include_last_offset");
    const at::Tensor values = offsets.to(at::kLong).contiguous();
    begins_.assign(values.const_data_ptr<int64_t>(),
                   values.const_data_ptr<int64_t>() + values.numel());
    for (size_t i = 0; i < begins_.size(); ++i) {
      const int64_t least = i == 0 ? 0 : begins_[i - 1], most = i == 0 ? 0 : num_entries;
      TORCH_CHECK_VALUE(begins_[i] >= least && begins_[i] <= most,
                        "offsets must start at 0, not decrease and not exceed the ", num_entries,
                        " indices; received ", begins_[i], " at position ", i);
    }
    if (!include_last_offset) begins_.push_back(num_entries);
  }

  int64_t count() const { return static_cast<int64_t>(begins_.size()) - 1; }
  int64_t begin(int64_t bag) const { return begins_[bag]; }
  int64_t end(int64_t bag) const { return begins_[bag + 1]; }
  /// The bag that holds an entry, or count() for one behind the last.
  int64_t bag_of(int64_t entry) const {
    return std::upper_bound(begins_.begin(), begins_.end(), entry) - begins_.begin() - 1;
  }

 private:
  std::vector<int64_t> begins_;
};

/// The factors of the entries, as double; 1 where there are none.
class Factors {
 public:
  Factors(const std::optional<at::Tensor>& weights, Mode mode, const at::Tensor& indices,
          const at::Tensor& pool) {
    if (!weights.has_value()) return;
    check_cpu(*weights, "per_sample_weights");
    TORCH_CHECK_VALUE(mode == Mode::kSum, "per_sample_weights must be None unless mode is 'sum'");
    TORCH_CHECK_VALUE(weights->sizes() == indices.sizes(),
                      "per_sample_weights must have the shape of indices ", indices.sizes(),
                      ", received ", weights->sizes());
    TORCH_CHECK_TYPE(weights->scalar_type() == pool.scalar_type(),
                     "per_sample_weights must have pool's dtype ", pool.scalar_type(),
                     ", received ", weights->scalar_type());
    weights_ = weights->contiguous();
    data_ = weights_.const_data_ptr();
  }

  bool given() const { return data_ != nullptr; }
  double operator[](int64_t i) const {
    switch (weights_.scalar_type()) {
      case at::kDouble:
        return static_cast<const double*>(data_)[i];
      case at::kBFloat16:
        return static_cast<const c10::BFloat16*>(data_)[i];
      default:
        return static_cast<const float*>(data_)[i];
    }
  }

 private:
  at::Tensor weights_;
  const void* data_ = nullptr;
};

/// The arguments of a call, checked.
struct Lookup {
  Mode mode;
  CheckedWeight weight;
  Table table;
  Ranks ranks;
  Bags bags;
  Factors factors;

  Lookup(const at::Tensor& indices, const at::Tensor& offsets, const at::Tensor& pool,
         const at::Tensor& theta, const std::optional<at::Tensor>& dense,
         const std::optional<at::Tensor>& permutation,
         const std::optional<at::Tensor>& per_sample_weights, int64_t num_embeddings,
         int64_t embedding_dim, c10::string_view mode_name, bool include_last_offset,
         int64_t padding_idx, const WeightArguments& args)
      : mode(checked_mode(mode_name)),
        weight(pool, theta, checked_size(num_embeddings, "num_embeddings"),
               checked_size(embedding_dim, "embedding_dim"), args),
        table(weight, dense, pool),
        ranks(indices, permutation, num_embeddings, padding_idx),
        bags(offsets, include_last_offset, indices.numel()),
        factors(per_sample_weights, mode, indices, pool) {
    TORCH_CHECK_VALUE(indices.dim() == 1, "indices must be 1-d, received shape ", indices.sizes());
  }

  /// Entries of a bag that are no padding.
  int64_t used(int64_t bag) const {
    int64_t count = 0;
    for (int64_t i = bags.begin(bag); i < bags.end(bag); ++i) count += ranks[i] != Ranks::kNone;
    return count;
  }
};

}  // namespace hfh::torch_ops
