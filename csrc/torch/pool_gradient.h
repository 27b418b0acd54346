#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "torch/panels.h"
#include "torch/parallel.h"

// How threads share the work of adding to a pool's gradient. Where pools are small each thread adds
// to one of its own; where they are large, threads list what they would add, and then each adds
// what belongs to its stretch of the pool. Both orders depend on the number of threads alone.

namespace hfh::torch_ops {

// What each thread but the first may hold of pool gradients.
inline constexpr int64_t kReplicaBytes = 4 << 20;

/// What one thread adds up. `offsets` and `values` are empty where it has a pool gradient.
struct PoolWork {
  at::Tensor offsets, values;
  cpu::PoolContributions contributions{};
  std::vector<double> grad_theta;
};

/// Entries and values that a tile lists at most.
struct ListBounds {
  int64_t entries, values;
};

template <class Tiles>
typename Tiles::Work make_work(const CheckedWeight& weight, const Tiles& tiles, bool lists) {
  typename Tiles::Work work = tiles.make_work();
  work.grad_theta.assign(weight.theta_size(), 0.0);
  if (!lists) return work;
  const ListBounds bounds = tiles.bounds();
  work.offsets = at::empty({bounds.entries}, at::dtype(at::kInt));
  work.values = at::empty({bounds.values}, at::dtype(weight.compute_dtype()));
  work.contributions.offset =
      reinterpret_cast<uint32_t*>(work.offsets.template mutable_data_ptr<int>());
  work.contributions.values = work.values.mutable_data_ptr();
  return work;
}

inline void add_theta(std::vector<double>& sum, std::vector<double>& part) {
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += std::exchange(part[i], 0.0);
}

/// Each thread takes a stretch of each column's tiles and adds to a pool gradient of its own; these
/// are summed in the threads' order.
template <class Tiles>
void add_by_replicas(const CheckedWeight& weight, Tiles& tiles, int64_t threads,
                     WeightGradients& result) {
  std::vector<at::Tensor> replicas{result.pool};
  std::vector<typename Tiles::Work> work;
  for (int64_t i = 0; i < threads; ++i) {
    if (i > 0) replicas.push_back(at::zeros_like(result.pool));
    work.push_back(make_work(weight, tiles, false));
    work.back().contributions.sum = replicas.back().mutable_data_ptr();
  }
  const int64_t share = (tiles.count() + threads - 1) / threads;
  for (int64_t column = 0; column < tiles.num_columns(); ++column) {
    tiles.select_column(column);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t t = i * share; t < std::min(tiles.count(), (i + 1) * share); ++t) {
          tiles.run(t, work[i]);
        }
      }
    });
  }
  for (int64_t i = 0; i < threads; ++i) {
    if (i > 0) result.pool.add_(replicas[i]);
    add_theta(result.theta, work[i].grad_theta);
  }
}

/// Rounds of a tile a thread. In each, threads first work on their tiles, then add the round's
/// contributions to the stretch of the pool that each owns.
template <class Tiles>
void add_by_rounds(const CheckedWeight& weight, Tiles& tiles, int64_t threads,
                   WeightGradients& result) {
  const VirtualWeight& virtual_weight = weight.get();
  std::vector<typename Tiles::Work> round;
  for (int64_t i = 0; i < threads; ++i) round.push_back(make_work(weight, tiles, true));
  const int64_t pool_size = result.pool.numel();
  const int64_t stretch =
      round_up((pool_size + threads - 1) / threads, virtual_weight.hash.block());
  for (int64_t column = 0; column < tiles.num_columns(); ++column) {
    tiles.select_column(column);
    for (int64_t first = 0; first < tiles.count(); first += threads) {
      const int64_t count = std::min(threads, tiles.count() - first);
      at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) tiles.run(first + i, round[i]);
      });
      parallel_stretches(pool_size, stretch, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < count; ++i) {
          cpu::kernels().scatter(round[i].contributions, virtual_weight.pool_dtype,
                                 static_cast<uint32_t>(begin), static_cast<uint32_t>(end),
                                 result.pool.mutable_data_ptr());
        }
      });
    }
  }
  for (auto& work : round) add_theta(result.theta, work.grad_theta);
}

/// Adds what all tiles mean for the pool and g. `Tiles` come in columns, of which one is selected
/// at a time; `run(index, work)` works on tile `index` of its `count()`, for `make_work()`'s kind
/// of PoolWork. `list_contributions()` makes tiles list what they add, within `bounds()`.
template <class Tiles>
void add_pool_gradient(const CheckedWeight& weight, Tiles& tiles, WeightGradients& result) {
  const int64_t threads = std::clamp<int64_t>(tiles.count(), 1, at::get_num_threads());
  if (threads == 1 || static_cast<int64_t>(result.pool.nbytes()) <= kReplicaBytes) {
    add_by_replicas(weight, tiles, threads, result);
  } else {
    tiles.list_contributions();
    add_by_rounds(weight, tiles, threads, result);
  }
}

}  // namespace hfh::torch_ops
