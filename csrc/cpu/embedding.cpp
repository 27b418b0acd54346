#include "cpu/declarations.h"
#include "cpu/lanes.h"

HFH_NAMESPACE_BEGIN

namespace {

/// kVectors vectors of columns, summed in registers.
template <class Lanes, int kVectors, class Scalar>
HFH_HOST_DEVICE void add_vectors(int64_t count, int64_t col, const void* const* rows,
                                 const Scalar* factor, Scalar* sum) {
  using Vector = typename Lanes::Vector;
  Vector sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = load<Vector>(sum + col + v * Lanes::kCount);
  for (int64_t i = 0; i < count; ++i) {
    const Scalar* row = static_cast<const Scalar*>(rows[i]) + col;
    const Vector scale = splat<Vector>(factor == nullptr ? Scalar{1} : factor[i]);
    for (int v = 0; v < kVectors; ++v) sums[v] += scale * load<Vector>(row + v * Lanes::kCount);
  }
  for (int v = 0; v < kVectors; ++v) store(sum + col + v * Lanes::kCount, sums[v]);
}

template <class Lanes>
void add_rows(int64_t count, int64_t cols, const void* const* rows, const void* factor,
              void* target) {
  using Scalar = typename Lanes::Scalar;
  constexpr int kVectors = 4;
  const auto* factors = static_cast<const Scalar*>(factor);
  auto* sum = static_cast<Scalar*>(target);
  int64_t col = 0;
  for (; col + kVectors * Lanes::kCount <= cols; col += kVectors * Lanes::kCount) {
    add_vectors<Lanes, kVectors>(count, col, rows, factors, sum);
  }
  for (; col + Lanes::kCount <= cols; col += Lanes::kCount) {
    add_vectors<Lanes, 1>(count, col, rows, factors, sum);
  }
  for (; col < cols; ++col) {
    for (int64_t i = 0; i < count; ++i) {
      const Scalar scale = factors == nullptr ? Scalar{1} : factors[i];
      sum[col] += scale * static_cast<const Scalar*>(rows[i])[col];
    }
  }
}

template <class Scalar>
void max_rows(int64_t count, int64_t cols, const void* const* rows, const int64_t* id, void* target,
              int64_t* winner) {
  auto* best = static_cast<Scalar*>(target);
  for (int64_t i = 0; i < count; ++i) {
    const auto* row = static_cast<const Scalar*>(rows[i]);
    for (int64_t col = 0; col < cols; ++col) {
      const bool wins = winner[col] < 0 || row[col] > best[col];
      best[col] = wins ? row[col] : best[col];
      winner[col] = wins ? id[i] : winner[col];
    }
  }
}

}  // namespace

void add_rows_kernel(DType dtype, int64_t count, int64_t cols, const void* const* rows,
                     const void* factor, void* sum) {
  if (dtype == DType::kFloat64) {
    add_rows<DoubleLane>(count, cols, rows, factor, sum);
  } else {
    add_rows<FloatLanes>(count, cols, rows, factor, sum);
  }
}

void max_rows_kernel(DType dtype, int64_t count, int64_t cols, const void* const* rows,
                     const int64_t* id, void* best, int64_t* winner) {
  if (dtype == DType::kFloat64) {
    max_rows<double>(count, cols, rows, id, best, winner);
  } else {
    max_rows<float>(count, cols, rows, id, best, winner);
  }
}

HFH_NAMESPACE_END
