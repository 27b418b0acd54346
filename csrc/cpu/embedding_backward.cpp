#include "cpu/backward.h"
#include "cpu/declarations.h"
#include "cpu/specialize.h"

HFH_NAMESPACE_BEGIN

namespace {

/// Each lane has a row and a column of its own.
template <class W>
void elements_backward(const VirtualWeight& weight, const cpu::ElementGradients& elements,
                       double* grad_theta, Contributions<typename W::Scalar>& out) {
  using Vector = typename W::Vector;
  using Uint = typename W::Uint;
  using Scalar = typename W::Scalar;
  const HashParams params = weight.hash;
  const typename W::Shape shape(weight);
  const LocalTheta<W> theta(shape, weight);
  const auto* pool = static_cast<const typename W::Pool*>(weight.pool);
  Vector sums[kMaxTheta];
  const int size = theta_size_of(shape);
  for (int i = 0; i < size; ++i) sums[i] = Vector{};
  for (int64_t first = 0; first < elements.count; first += W::kLanes) {
    // Lanes past the last element repeat it with a gradient of zero, and with elements of zero,
    // which keep what is not finite out of the sums.
    uint32_t rows[W::kLanes], cols[W::kLanes], used[W::kLanes];
    Scalar gradients[W::kLanes];
    for (int lane = 0; lane < W::kLanes; ++lane) {
      const bool inside = first + lane < elements.count;
      const int64_t i = inside ? first + lane : elements.count - 1;
      rows[lane] = elements.row[i];
      cols[lane] = elements.col[i];
      used[lane] = inside;
      gradients[lane] = inside ? static_cast<const Scalar*>(elements.gradient)[i] : Scalar{0};
    }
    const Uint row = load<Uint>(rows), col = load<Uint>(cols);
    const Uint key = weight_key(row_key(row, params.seed), col >> params.log2_block);
    const Uint base = window_bases(row, params);
    Uint offset[W::kHashesBound], sign[W::kHashesBound];
    Vector a[W::kHashesBound], grad_a[W::kHashesBound];
    for (int u = 0; u < shape.num_hashes(); ++u) {
      const Draw<Uint> one = draw(key, hash_lane(u), base, params);
      offset[u] = (one.slot << params.log2_block) + (col & (params.block() - 1));
      sign[u] = one.sign;
      a[u] = flip_sign(gather<Vector>(pool, offset[u]), sign[u]);
      Scalar lanes[W::kLanes];
      store(lanes, a[u]);
      for (int lane = 0; lane < W::kLanes; ++lane) lanes[lane] = used[lane] ? lanes[lane] : 0;
      a[u] = load<Vector>(lanes);
    }
    reconstruct_backward(shape, theta.values, a, load<Vector>(gradients), sums, grad_a);
    for (int u = 0; u < shape.num_hashes(); ++u) {
      out.add_elements(offset[u], flip_sign(grad_a[u], sign[u]));
    }
  }
  for (int i = 0; i < size; ++i) grad_theta[i] += horizontal_sum(sums[i]);
}

}  // namespace

void elements_backward_kernel(const VirtualWeight& weight, const cpu::ElementGradients& elements,
                              double* grad_theta, cpu::PoolContributions* out) {
  out->count = 0;
  const auto run = [&]<class W>(W) {
    auto contributions = contributions_to<typename W::Scalar>(*out);
    elements_backward<W>(weight, elements, grad_theta, contributions);
    out->count = contributions.count;
    out->length = 1;
  };
  switch (weight.pool_dtype) {
    case DType::kFloat32:
      return run(With<FloatLanes, AnyShape, float, true>{});
    case DType::kBFloat16:
      return run(With<FloatLanes, AnyShape, BFloat16, true>{});
    case DType::kFloat64:
      return run(With<DoubleLane, AnyShape, double, true>{});
  }
}

HFH_NAMESPACE_END
