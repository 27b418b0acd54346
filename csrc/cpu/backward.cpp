#include "cpu/backward.h"

#include "cpu/declarations.h"
#include "cpu/specialize.h"

HFH_NAMESPACE_BEGIN

namespace {

/// Calls `add(i)` for the entries that start in [begin, end), in their order. They are picked out
/// without a branch, which would be mispredicted every other time; `fetch(i)` sees each a little
/// ahead of its turn.
template <class Fetch, class Add>
HFH_HOST_DEVICE void for_each_in(const cpu::PoolContributions& from, uint32_t begin, uint32_t end,
                                 const Fetch& fetch, const Add& add) {
  constexpr int kBatch = 1024, kAhead = 8;
  int64_t picked[kBatch + kAhead];
  for (int64_t first = 0; first < from.count; first += kBatch) {
    const int64_t count = from.count - first < kBatch ? from.count - first : kBatch;
    int num_picked = 0;
    for (int64_t i = first; i < first + count; ++i) {
      picked[num_picked] = i;
      num_picked += from.offset[i] - begin < end - begin;
    }
    for (int i = 0; i < kAhead; ++i) picked[num_picked + i] = first;
    for (int i = 0; i < num_picked; ++i) {
      fetch(picked[i + kAhead]);
      add(picked[i]);
    }
  }
}

template <class Scalar>
void scatter(const cpu::PoolContributions& from, uint32_t begin, uint32_t end, Scalar* grad_pool) {
  const auto* values = static_cast<const Scalar*>(from.values);
  const auto fetch = [&](int64_t i) {
    __builtin_prefetch(grad_pool + from.offset[i], 1);
    __builtin_prefetch(values + i * from.length);
  };
  if (from.length == 1) {
    for_each_in(from, begin, end, fetch,
                [&](int64_t i) { grad_pool[from.offset[i]] += values[i]; });
  } else if constexpr (sizeof(Scalar) == sizeof(float)) {
    // A vector of one block, which no boundary of a stretch divides.
    for_each_in(from, begin, end, fetch, [&](int64_t i) {
      float* target = grad_pool + from.offset[i];
      store(target, load<FloatVector>(target) + load<FloatVector>(values + i * kFloatLanes));
    });
  }
}

/// Appends to the contributions.
void backward_of_rows(const VirtualWeight& weight, const cpu::RowLookups& lookups, int64_t col,
                      int64_t cols, const void* gradient, DType gradient_dtype, double* grad_theta,
                      cpu::PoolContributions* out) {
  specialize(weight, [&]<class W>(W) {
    auto contributions = contributions_to<typename W::Scalar>(*out);
    const TileGradient tile_gradient{gradient, lookups.place, gradient_dtype == DType::kBFloat16};
    tile_backward<W>(weight, ListedRows{lookups.row, lookups.listed}, {0, lookups.count, col, cols},
                     tile_gradient, grad_theta, contributions);
    out->count = contributions.count;
    out->length = W::kByElement ? 1 : W::kLanes;
  });
}

}  // namespace

void backward_kernel(const VirtualWeight& weight, const cpu::TileBounds& bounds,
                     const void* gradient, DType gradient_dtype, int64_t stride, double* grad_theta,
                     cpu::PoolContributions* out) {
  out->count = 0;
  for_each_listed(weight, bounds, stride, [&](const cpu::RowLookups& lookups) {
    backward_of_rows(weight, lookups, bounds.col, bounds.cols, gradient, gradient_dtype, grad_theta,
                     out);
  });
}

void lookup_backward_kernel(const VirtualWeight& weight, const cpu::RowLookups& lookups,
                            int64_t col, int64_t cols, const void* gradient, DType gradient_dtype,
                            double* grad_theta, cpu::PoolContributions* out) {
  out->count = 0;
  if (lookups.count == 0 || cols == 0) return;
  backward_of_rows(weight, lookups, col, cols, gradient, gradient_dtype, grad_theta, out);
}

void contribution_bounds_kernel(const VirtualWeight& weight, const cpu::TileBounds& bounds,
                                int64_t* entries, int64_t* values) {
  specialize(weight, [&]<class W>(W) {
    // A ragged tile can touch one more vector than its columns fill.
    const int64_t vectors = bounds.rows * ((bounds.cols + W::kLanes - 1) / W::kLanes + 1);
    *values = vectors * weight.hash.num_hashes * W::kLanes;
    *entries = W::kByElement ? *values : vectors * weight.hash.num_hashes;
  });
}

void scatter_kernel(const cpu::PoolContributions& from, DType pool_dtype, uint32_t begin,
                    uint32_t end, void* grad_pool) {
  if (pool_dtype == DType::kFloat64) {
    scatter(from, begin, end, static_cast<double*>(grad_pool));
  } else {
    scatter(from, begin, end, static_cast<float*>(grad_pool));
  }
}

HFH_NAMESPACE_END
