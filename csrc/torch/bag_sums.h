#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "torch/bags.h"

namespace hfh::torch_ops {

/// Writes columns [col, col + cols) of a bag, rounded where the table is bfloat16.
template <class Scalar>
void write_bag(const Lookup& lookup, int64_t bag, const Scalar* values, int64_t col, int64_t cols,
               void* out) {
  const int64_t place = bag * lookup.table.cols() + col;
  if (!lookup.table.is_bfloat16()) {
    std::copy_n(values, cols, static_cast<Scalar*>(out) + place);
  } else if constexpr (std::is_same_v<Scalar, float>) {
    cpu::kernels().round_to_bfloat16(values, static_cast<BFloat16*>(out) + place, cols);
  }
}

/// Adds up bags in scratch, some at a time.
template <class Scalar>
class BagSums {
 public:
  BagSums(const Lookup& lookup, int64_t cols)
      : lookup_(lookup),
        stride_(cols),
        bags_at_once_(std::max<int64_t>(1, kSums / cols)),
        sums_(bags_at_once_ * cols) {}

  /// Writes columns [col, col + cols) of bags [begin, end).
  void write(int64_t begin, int64_t end, int64_t col, int64_t cols, void* out) {
    for (int64_t first = begin; first < end; first += bags_at_once_) {
      const int64_t last = std::min(end, first + bags_at_once_);
      std::fill(sums_.begin(), sums_.end(), Scalar{0});
      for (int64_t bag = first; bag < last; ++bag) add(bag, (bag - first) * stride_, col, cols);
      add_pending(col, cols);
      for (int64_t bag = first; bag < last; ++bag) {
        finish(bag, sums_.data() + (bag - first) * stride_, col, cols, out);
      }
    }
  }

 private:
  // Sums stay in the first-level cache, and so do the rows that are still to be added.
  static constexpr int64_t kSums = 4096, kPending = 512;

  void add(int64_t bag, int64_t place, int64_t col, int64_t cols) {
    const Table& table = lookup_.table;
    for (int64_t i = lookup_.bags.begin(bag); i < lookup_.bags.end(bag); ++i) {
      const int64_t rank = lookup_.ranks[i];
      if (rank == Ranks::kNone) continue;
      const Scalar factor =
          lookup_.factors.given() ? static_cast<Scalar>(lookup_.factors[i]) : Scalar{1};
      if (!table.is_dense(rank)) {
        row_[pending_] = table.virtual_row(rank);
        place_[pending_] = place;
        factor_[pending_++] = factor;
        if (pending_ == kPending) add_pending(col, cols);
      } else if (table.is_bfloat16()) {
        add_dense(reinterpret_cast<const c10::BFloat16*>(table.dense_row(rank)) + col, cols, factor,
                  place);
      } else {
        add_dense(reinterpret_cast<const Scalar*>(table.dense_row(rank)) + col, cols, factor,
                  place);
      }
    }
  }

  template <class Element>
  void add_dense(const Element* row, int64_t cols, Scalar factor, int64_t place) {
    for (int64_t c = 0; c < cols; ++c) sums_[place + c] += factor * static_cast<Scalar>(row[c]);
  }

  void add_pending(int64_t col, int64_t cols) {
    cpu::kernels().add_lookups(lookup_.weight.get(), {row_, place_, pending_, pending_},
                               lookup_.factors.given() ? factor_ : nullptr, col, cols,
                               sums_.data());
    pending_ = 0;
  }

  void finish(int64_t bag, Scalar* sum, int64_t col, int64_t cols, void* out) {
    if (lookup_.mode == Mode::kMean) {
      const auto used = static_cast<Scalar>(std::max<int64_t>(1, lookup_.used(bag)));
      for (int64_t c = 0; c < cols; ++c) sum[c] /= used;
    }
    write_bag(lookup_, bag, sum, col, cols, out);
  }

  const Lookup& lookup_;
  int64_t stride_, bags_at_once_, pending_ = 0;
  std::vector<Scalar> sums_;
  uint32_t row_[kPending];
  int64_t place_[kPending];
  Scalar factor_[kPending];
};

}  // namespace hfh::torch_ops
