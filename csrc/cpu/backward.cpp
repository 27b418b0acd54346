#include "cpu/backward.h"

#include "cpu/declarations.h"
#include "cpu/specialize.h"

HFH_NAMESPACE_BEGIN

namespace {

/// Entries longer than one element: blocks, which no boundary of a stretch divides.
template <class Scalar>
void scatter_runs(const cpu::PoolContributions& from, uint32_t begin, uint32_t end,
                  Scalar* grad_pool) {
  const auto* values = static_cast<const Scalar*>(from.values);
  for (int64_t i = 0; i < from.count; ++i) {
    const uint32_t offset = from.offset[i];
    if (offset < begin || offset >= end) continue;
    Scalar* target = grad_pool + offset;
    const Scalar* source = values + i * from.length;
    for (int j = 0; j < from.length; j += kFloatLanes) {
      store(target + j, load<FloatVector>(target + j) + load<FloatVector>(source + j));
    }
  }
}

/// Single elements: those of the stretch are picked out without a branch, which would be mispredicted
/// every other time, and added then.
template <class Scalar>
void scatter_elements(const cpu::PoolContributions& from, uint32_t begin, uint32_t end,
                      Scalar* grad_pool) {
  constexpr int kBatch = 1024;
  const auto* values = static_cast<const Scalar*>(from.values);
  uint32_t picked[kBatch];
  for (int64_t first = 0; first < from.count; first += kBatch) {
    const int count = static_cast<int>(from.count - first < kBatch ? from.count - first : kBatch);
    int num_picked = 0;
    for (int i = 0; i < count; ++i) {
      picked[num_picked] = static_cast<uint32_t>(i);
      num_picked += from.offset[first + i] - begin < end - begin;
    }
    for (int i = 0; i < num_picked; ++i) {
      grad_pool[from.offset[first + picked[i]]] += values[first + picked[i]];
    }
  }
}

}  // namespace

void backward_kernel(const VirtualWeight& weight, const cpu::TileBounds& bounds,
                     const void* gradient, DType gradient_dtype, int64_t stride,
                     double* grad_theta, cpu::PoolContributions* out) {
  specialize(weight, [&]<class W>(W) {
    using Scalar = typename W::Scalar;
    Contributions<Scalar> contributions{out->offset, static_cast<Scalar*>(out->values), 0};
    const TileGradient tile_gradient{gradient, stride, gradient_dtype == DType::kBFloat16};
    tile_backward<W>(weight, to_tile(bounds), tile_gradient, grad_theta, contributions);
    out->count = contributions.count;
    out->length = W::kByElement ? 1 : W::kLanes;
  });
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
    scatter_elements(from, begin, end, static_cast<double*>(grad_pool));
  } else if (from.length == 1) {
    scatter_elements(from, begin, end, static_cast<float*>(grad_pool));
  } else {
    scatter_runs(from, begin, end, static_cast<float*>(grad_pool));
  }
}

HFH_NAMESPACE_END
