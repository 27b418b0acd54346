#include "cpu/declarations.h"

HFH_NAMESPACE_BEGIN

namespace {

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

void max_rows_kernel(DType dtype, int64_t count, int64_t cols, const void* const* rows,
                     const int64_t* id, void* best, int64_t* winner) {
  if (dtype == DType::kFloat64) {
    max_rows<double>(count, cols, rows, id, best, winner);
  } else {
    max_rows<float>(count, cols, rows, id, best, winner);
  }
}

HFH_NAMESPACE_END
