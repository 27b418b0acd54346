#pragma once

#include "cuda/lookup.h"
#include "cuda/numbers.h"

// Which entries are in a bag, for kernels.

namespace hfh::cuda {

struct EntryRange {
  int64_t begin, end;
};

/// None for a bag behind the last.
__device__ __forceinline__ EntryRange entries_of(const Bags& bags, int64_t bag,
                                                 int64_t num_entries) {
  if (bag >= bags.count) return {0, 0};
  const int64_t begin = bags.offsets[bag];
  const bool has_next = bags.has_last || bag + 1 < bags.count;
  const int64_t end = has_next ? bags.offsets[bag + 1] : num_entries;
  device_assert((bag == 0 ? begin == 0 : begin >= 0) && begin <= end && end <= num_entries,
                "offsets must start at 0, not decrease and not exceed the number of indices");
  return {begin, end};
}

template <class Number>
__device__ __forceinline__ float factor_of(const Bags& bags, int64_t entry) {
  if (bags.factors == nullptr) return 1.0f;
  return to_float(static_cast<const Number*>(bags.factors)[entry]);
}

}  // namespace hfh::cuda
