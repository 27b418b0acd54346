#include "cuda/lookup.h"

#include <ATen/ATen.h>

#include "torch/cuda/device_weight.h"
#include "torch/cuda/gradient_sum.h"
#include "torch/cuda/operators.h"
#include "torch/cuda/stream.h"

// hfh::embedding, hfh::embedding_bag and their gradients on CUDA devices.

namespace hfh::torch_ops::cuda_ops {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Of fewer, so few can be of one index that sorting takes longer than their additions.
constexpr int64_t kEntriesToSort = 8192;

int64_t checked_size(int64_t size, const char* name) {
  TORCH_CHECK_VALUE(size >= 0, name, " must not be negative, received ", size);
  return size;
}

void check_integers(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kInt, name,
                   " must be int32 or int64, received ", tensor.scalar_type());
}

/// `tensor` must be contiguous and outlive the result.
cuda::Integers integers(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.scalar_type() == at::kLong};
}

/// The arguments of a look-up, checked, with the tensors that kernels point into.
class CheckedLookup {
 public:
  CheckedLookup(const at::Tensor& indices, const at::Tensor& pool, const at::Tensor& theta,
                const OptionalTensor& dense, const OptionalTensor& permutation,
                int64_t num_embeddings, int64_t cols, int64_t padding_idx,
                const WeightArguments& args)
      : pool(pool),
        theta(theta),
        weight_(pool, theta, checked_size(num_embeddings, "num_embeddings"),
                checked_size(cols, "embedding_dim"), args),
        indices_(indices.contiguous().view(-1)) {
    check_integers(indices, "indices");
    check_same_device(indices, "indices", pool, "pool");
    TORCH_CHECK_VALUE(padding_idx < num_embeddings,
                      "padding_idx must be below num_embeddings=", num_embeddings, ", received ",
                      padding_idx);
    if (permutation.has_value()) {
      check_same_device(*permutation, "permutation", pool, "pool");
      TORCH_CHECK_TYPE(permutation->scalar_type() == at::kLong,
                       "permutation must be int64, received ", permutation->scalar_type());
      TORCH_CHECK_VALUE(permutation->dim() == 1 && permutation->numel() == num_embeddings,
                        "permutation must have shape [", num_embeddings, "], received ",
                        permutation->sizes());
      permutation_ = permutation->contiguous();
    }
    this->dense = dense.has_value() ? dense->contiguous() : at::empty({0, cols}, pool.options());
    check_same_device(this->dense, "dense", pool, "pool");
    TORCH_CHECK_TYPE(this->dense.scalar_type() == pool.scalar_type(),
                     "dense must have pool's dtype ", pool.scalar_type(), ", received ",
                     this->dense.scalar_type());
    TORCH_CHECK_VALUE(this->dense.dim() == 2 && this->dense.size(0) <= num_embeddings &&
                          this->dense.size(1) == cols,
                      "dense must have shape [at most num_embeddings=", num_embeddings,
                      ", embedding_dim=", cols, "], received ", this->dense.sizes());
    const std::string reason = cuda::why_not_lookup(weight_.get(), cols);
    TORCH_CHECK(reason.empty(), "backend 'cuda' cannot run: ", reason);
    lookup = {weight_.get(),
              static_cast<int>(cols),
              integers(indices_),
              indices_.numel(),
              permutation_.defined() ? permutation_.const_data_ptr<int64_t>() : nullptr,
              this->dense.const_data_ptr(),
              this->dense.size(0),
              num_embeddings,
              padding_idx};
  }

  const at::Tensor& indices() const { return indices_; }

  cuda::Lookup lookup;
  at::Tensor pool, theta, dense;  // dense [0, cols] where there is none

 private:
  CheckedDeviceWeight weight_;
  at::Tensor indices_, permutation_;
};

void check_gradient(const at::Tensor& grad, at::IntArrayRef sizes, const at::Tensor& pool) {
  check_same_device(grad, "grad", pool, "pool");
  TORCH_CHECK_VALUE(grad.sizes() == sizes, "grad must have shape ", sizes, ", received ",
                    grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == pool.scalar_type(), "grad must have pool's dtype ",
                   pool.scalar_type(), ", received ", grad.scalar_type());
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// Of pool, theta and the dense rows. Entry i's gradient is share[i] times row row_of_entry[i] of
/// `grad`, or where they are not defined row i.
Gradients gradients_of(const CheckedLookup& checked, const at::Tensor& grad,
                       const at::Tensor& row_of_entry, const at::Tensor& share,
                       cudaStream_t stream) {
  const at::Tensor &pool = checked.pool, &theta = checked.theta, &dense = checked.dense;
  if (grad.numel() == 0 || checked.indices().numel() == 0) {
    return {at::zeros_like(pool), at::zeros_like(theta), at::zeros_like(dense)};
  }
  cuda::Lookup lookup = checked.lookup;
  const int64_t num_entries = lookup.num_entries;
  at::Tensor sorted, rows = row_of_entry, shares = share;
  if (num_entries >= kEntriesToSort) {
    at::Tensor keys = checked.indices();
    if (keys.scalar_type() == at::kLong && lookup.num_embeddings <= INT32_MAX) {
      // Half the digits to sort by. What is out of range stays so.
      keys = keys.clamp(-1, lookup.num_embeddings).to(at::kInt);
    }
    at::Tensor order;
    std::tie(sorted, order) = at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    lookup.indices = integers(sorted);
    rows = rows.defined() ? rows.index_select(0, order) : order;
    if (shares.defined()) shares = shares.index_select(0, order);
  }

  const auto largest = [&] {
    const at::Tensor of_grad = grad.abs().max().to(at::kFloat);
    return share.defined() ? of_grad * share.abs().max() : of_grad;
  };
  const int64_t num_terms = num_entries * lookup.cols * lookup.weight.hash.num_hashes;
  const GradientSum of_pool(pool, num_terms,
                            [&] { return largest() * slope_bound(theta, lookup.weight); });
  const GradientSum of_dense(dense, num_entries, largest);
  const cuda::LookupPlan plan = cuda::plan_lookup_backward(lookup);
  const ReconstructParams& g = lookup.weight.reconstruct;
  const at::Tensor of_theta =
      at::empty({plan.blocks, theta_size(lookup.weight.hash.num_hashes, g.depth, g.width)},
                pool.options().dtype(at::kFloat));
  cuda::lookup_backward(lookup, plan, grad.const_data_ptr(),
                        rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr,
                        shares.defined() ? shares.const_data_ptr<float>() : nullptr,
                        {{of_pool.data(), of_pool.units()},
                         {of_dense.data(), of_dense.units()},
                         of_theta.mutable_data_ptr<float>()},
                        stream);
  return {of_pool.result(of_theta), theta_gradient(of_theta, theta, lookup.weight),
          of_dense.result()};
}

/// The arguments that embedding_bag has beside a look-up's, checked.
class CheckedBags {
 public:
  CheckedBags(const at::Tensor& indices, const at::Tensor& offsets, const at::Tensor& pool,
              const OptionalTensor& per_sample_weights, c10::string_view mode,
              bool include_last_offset) {
    TORCH_CHECK_VALUE(mode == "sum" || mode == "mean" || mode == "max",
                      "mode must be 'sum', 'mean' or 'max', received '", mode, "'");
    TORCH_CHECK_VALUE(indices.dim() == 1, "indices must be 1-d, received shape ", indices.sizes());
    check_same_device(offsets, "offsets", pool, "pool");
    check_integers(offsets, "offsets");
    TORCH_CHECK_VALUE(offsets.dim() == 1, "offsets must be 1-d, received shape ", offsets.sizes());
    TORCH_CHECK_VALUE(!include_last_offset || offsets.numel() > 0,
                      "offsets must not be empty with include_last_offset");
    if (per_sample_weights.has_value()) {
      check_same_device(*per_sample_weights, "per_sample_weights", pool, "pool");
      TORCH_CHECK_VALUE(mode == "sum", "per_sample_weights must be None unless mode is 'sum'");
      TORCH_CHECK_VALUE(per_sample_weights->sizes() == indices.sizes(),
                        "per_sample_weights must have the shape of indices ", indices.sizes(),
                        ", received ", per_sample_weights->sizes());
      TORCH_CHECK_TYPE(per_sample_weights->scalar_type() == pool.scalar_type(),
                       "per_sample_weights must have pool's dtype ", pool.scalar_type(),
                       ", received ", per_sample_weights->scalar_type());
      factors_ = per_sample_weights->contiguous();
    }
    const std::string reason = cuda::why_not_mode(std::string(mode));
    TORCH_CHECK(reason.empty(), "backend 'cuda' cannot run: ", reason);
    offsets_ = offsets.contiguous();
    bags = {integers(offsets_), offsets.numel() - (include_last_offset ? 1 : 0),
            include_last_offset, mode == "mean",
            has_factors() ? factors_.const_data_ptr() : nullptr};
  }

  bool has_factors() const { return factors_.defined(); }

  cuda::Bags bags;

 private:
  at::Tensor offsets_, factors_;
};

}  // namespace

std::string why_not_embedding(const at::Tensor& pool, const at::Tensor& theta,
                              int64_t num_embeddings, int64_t embedding_dim,
                              HFH_WEIGHT_PARAMETERS) {
  const VirtualWeight weight =
      checked_coordinates(pool, theta, num_embeddings, embedding_dim, {HFH_WEIGHT_ARGUMENTS});
  return cuda::why_not_lookup(weight, embedding_dim);
}

std::string why_not_embedding_bag(const at::Tensor& pool, const at::Tensor& theta,
                                  int64_t num_embeddings, int64_t embedding_dim,
                                  c10::string_view mode, HFH_WEIGHT_PARAMETERS) {
  const std::string reason = cuda::why_not_mode(std::string(mode));
  return reason.empty()
             ? why_not_embedding(pool, theta, num_embeddings, embedding_dim, HFH_WEIGHT_ARGUMENTS)
             : reason;
}

at::Tensor embedding(const at::Tensor& indices, const at::Tensor& pool, const at::Tensor& theta,
                     const OptionalTensor& dense, const OptionalTensor& permutation,
                     int64_t num_embeddings, int64_t embedding_dim, int64_t padding_idx,
                     HFH_WEIGHT_PARAMETERS) {
  const StreamScope scope(pool);
  const CheckedLookup checked(indices, pool, theta, dense, permutation, num_embeddings,
                              embedding_dim, padding_idx, {HFH_WEIGHT_ARGUMENTS});
  auto sizes = indices.sizes().vec();
  sizes.push_back(embedding_dim);
  const at::Tensor output = at::empty(sizes, pool.options());
  if (output.numel() == 0) return output;
  cuda::embedding(checked.lookup, output.mutable_data_ptr(), scope.stream());
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> embedding_backward(
    const at::Tensor& grad, const at::Tensor& indices, const at::Tensor& pool,
    const at::Tensor& theta, const OptionalTensor& dense, const OptionalTensor& permutation,
    int64_t num_embeddings, int64_t padding_idx, HFH_WEIGHT_PARAMETERS) {
  const StreamScope scope(pool);
  auto sizes = indices.sizes().vec();
  sizes.push_back(grad.dim() == 0 ? 0 : grad.size(-1));
  check_gradient(grad, sizes, pool);
  const CheckedLookup checked(indices, pool, theta, dense, permutation, num_embeddings,
                              sizes.back(), padding_idx, {HFH_WEIGHT_ARGUMENTS});
  return gradients_of(checked, grad.contiguous(), {}, {}, scope.stream());
}

std::tuple<at::Tensor, at::Tensor> embedding_bag(
    const at::Tensor& indices, const at::Tensor& offsets, const at::Tensor& pool,
    const at::Tensor& theta, const OptionalTensor& dense, const OptionalTensor& permutation,
    const OptionalTensor& per_sample_weights, int64_t num_embeddings, int64_t embedding_dim,
    c10::string_view mode, bool include_last_offset, int64_t padding_idx, HFH_WEIGHT_PARAMETERS) {
  const StreamScope scope(pool);
  const CheckedBags checked_bags(indices, offsets, pool, per_sample_weights, mode,
                                 include_last_offset);
  const CheckedLookup checked(indices, pool, theta, dense, permutation, num_embeddings,
                              embedding_dim, padding_idx, {HFH_WEIGHT_ARGUMENTS});
  const cuda::Bags& bags = checked_bags.bags;
  const at::Tensor output = at::empty({bags.count, embedding_dim}, pool.options());
  const at::Tensor winners = at::empty({0, embedding_dim}, pool.options().dtype(at::kLong));
  if (output.numel() == 0) return {output, winners};
  cuda::embedding_bag(checked.lookup, bags, output.mutable_data_ptr(), scope.stream());
  return {output, winners};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> embedding_bag_backward(
    const at::Tensor& grad, const at::Tensor& winners, const at::Tensor& indices,
    const at::Tensor& offsets, const at::Tensor& pool, const at::Tensor& theta,
    const OptionalTensor& dense, const OptionalTensor& permutation,
    const OptionalTensor& per_sample_weights, int64_t num_embeddings, c10::string_view mode,
    bool include_last_offset, int64_t padding_idx, HFH_WEIGHT_PARAMETERS) {
  const StreamScope scope(pool);
  const CheckedBags checked_bags(indices, offsets, pool, per_sample_weights, mode,
                                 include_last_offset);
  const cuda::Bags& bags = checked_bags.bags;
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad must be 2-d, received shape ", grad.sizes());
  check_gradient(grad, {bags.count, grad.size(1)}, pool);
  const CheckedLookup checked(indices, pool, theta, dense, permutation, num_embeddings,
                              grad.size(1), padding_idx, {HFH_WEIGHT_ARGUMENTS});
  const at::Tensor gradient = grad.contiguous();
  const int64_t num_entries = indices.numel();
  const at::Tensor of_factors =
      at::zeros({checked_bags.has_factors() ? num_entries : 0}, pool.options());
  at::Tensor bag_of_entry, share;
  if (gradient.numel() > 0 && num_entries > 0) {
    bag_of_entry = at::full({num_entries}, -1, pool.options().dtype(at::kLong));
    share = at::zeros({num_entries}, pool.options().dtype(at::kFloat));
    cuda::shares_of_bags(checked.lookup, bags, bag_of_entry.mutable_data_ptr<int64_t>(),
                         share.mutable_data_ptr<float>(), scope.stream());
    if (checked_bags.has_factors()) {
      cuda::factor_gradients(checked.lookup, bag_of_entry.const_data_ptr<int64_t>(),
                             gradient.const_data_ptr(), of_factors.mutable_data_ptr(),
                             scope.stream());
    }
  }
  const auto [of_pool, of_theta, of_dense] =
      gradients_of(checked, gradient, bag_of_entry, share, scope.stream());
  return {of_pool, of_theta, of_dense, of_factors};
}

}  // namespace hfh::torch_ops::cuda_ops
