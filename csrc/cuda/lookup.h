#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/weight.h"

// Look-ups in a table whose rows are made as they are read: row r is dense[r] where there is one,
// else row r of a virtual weight. Pointers are to the device, matrices contiguous.

namespace hfh::cuda {

/// Why the kernels here cannot run; empty where they can.
std::string why_not_lookup(const VirtualWeight& weight, int64_t cols);
/// The same of what bags do with their rows: "sum", "mean" or "max".
std::string why_not_mode(const std::string& mode);

/// int32 or int64 numbers.
struct Integers {
  const void* data;
  bool wide;

  HFH_HOST_DEVICE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

/// A table and what is looked up in it. An index out of range fails an assertion.
struct Lookup {
  DeviceWeight weight;  // its pool is aligned to 16 bytes
  int cols;
  Integers indices;  // [num_entries]
  int64_t num_entries;
  const int64_t* permutation;  // [num_embeddings], the row that each index stands for; or null
  const void* dense;           // [num_dense, cols] in pool's dtype
  int64_t num_dense;
  int64_t num_embeddings;
  int64_t padding_idx;  // the index that has no row; negative for none
};

/// output [num_entries, cols] in pool's dtype.
void embedding(const Lookup& lookup, void* output, cudaStream_t stream);

/// Which entries are in which bag. Offsets that do not begin at 0, go back or pass the indices'
/// end fail an assertion.
struct Bags {
  Integers offsets;  // [count], or [count + 1] with has_last
  int64_t count;
  bool has_last;
  bool is_mean;
  const void* factors;  // of the entries, in pool's dtype; or null
};

/// output [bags.count, cols] in pool's dtype.
void embedding_bag(const Lookup& lookup, const Bags& bags, void* output, cudaStream_t stream);

/// Writes, of the entries in bags, bag_of_entry and share [num_entries]: how much of the entry's
/// row the bag's sum has.
void shares_of_bags(const Lookup& lookup, const Bags& bags, int64_t* bag_of_entry, float* share,
                    cudaStream_t stream);

/// Writes the gradients of the entries' factors, in pool's dtype: the row times the gradient of
/// its bag, grad [bags, cols]. Entries of bag -1 are in none.
void factor_gradients(const Lookup& lookup, const int64_t* bag_of_entry, const void* grad,
                      void* grad_factors, cudaStream_t stream);

/// Where gradients are added up: in float32, or, where units are given, in int64 as so many units
/// to 1, the same in any order.
struct Total {
  void* sum;
  const float* units;
};

/// How lookup_backward is launched; fixed for a device and shapes, and with it the order in which
/// it adds up.
struct LookupPlan {
  unsigned blocks;
  int run;  // neighbouring entries that a team of lanes adds up
};
LookupPlan plan_lookup_backward(const Lookup& lookup);

struct LookupGradients {
  Total pool;
  Total dense;   // [num_dense, cols]
  float* theta;  // [plan.blocks, theta_size], written: parts of the gradient of g's parameters
                 // with the scale folded in
};

/// Adds to the gradients. Entry i's is share[i] (null for 1) times row grad_row[i] (-1 for none;
/// null for i) of grad, in pool's dtype. Entries of one index should be neighbours: the fewer sums
/// there are.
void lookup_backward(const Lookup& lookup, const LookupPlan& plan, const void* grad,
                     const int64_t* grad_row, const float* share, const LookupGradients& gradients,
                     cudaStream_t stream);

}  // namespace hfh::cuda
