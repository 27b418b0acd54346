#include <algorithm>

#include "cuda/weight_backward.h"
#include "cuda/weight_backward_lane.h"

// Counted from the code for sm_90a, bfloat16 and blocks of 64; unmeasured. Lane instructions a
// weight with the sums in shared memory and without: 110 and 100 for 4 hashes, depth 2, width 4 (77
// of them g's and its gradient's arithmetic), 45 and 35 for 4 hashes, depth 1. In shared memory
// they bind: an H200's multiprocessor takes 0.86 clocks a weight, in which its shared memory and
// first-level cache pass 58 of the 110 bytes they can. Without, the 16 bytes a weight that the
// second-level cache adds up do.

namespace hfh::cuda {

using namespace weight_backward_lane;

namespace {

/// Threads of a block, which has a processor for itself: as many as have registers for g's
/// parameters and their gradients, and for a quad's elements, their gradients and places.
template <class Shape>
constexpr int num_threads() {
  const int registers = 2 * theta_size(Shape::num_hashes(), Shape::depth(), Shape::width()) +
                        3 * kQuad * Shape::num_hashes();
  return registers < 58 ? 512 : registers < 100 ? 384 : 256;
}

/// The gradient's rows window by window; all of them at once where sums are in no window first.
struct WindowRows {
  uint64_t first_row;  // logical
  uint64_t rows_per_window;

  HFH_HOST_DEVICE WindowRows(const VirtualWeight& weight, const WeightGradient& gradient,
                             bool shares_window)
      : first_row(uint64_t{weight.row_offset} + gradient.row),
        rows_per_window(shares_window && weight.hash.rows_per_window != 0
                            ? weight.hash.rows_per_window
                            : uint64_t{1} << 32) {}

  HFH_HOST_DEVICE int64_t count(int64_t rows) const {
    return static_cast<int64_t>((first_row + rows - 1) / rows_per_window -
                                first_row / rows_per_window + 1);
  }
  /// First row of the gradient that is in group `index`, or in one behind it.
  HFH_HOST_DEVICE int begin(int64_t index, int64_t rows) const {
    const uint64_t logical = (first_row / rows_per_window + index) * rows_per_window;
    if (logical <= first_row) return 0;
    return static_cast<int>(logical - first_row < rows ? logical - first_row : rows);
  }
};

__device__ __forceinline__ void clear_window(float* window, uint32_t size) {
  for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) window[i] = 0.0f;
  __syncthreads();
}

/// Adds the window to the pool's gradient, when all of the block have added to it. Blocks begin at
/// different places of it, lest those that share it wait for each other.
__device__ __forceinline__ void flush_window(const HashParams& hash, const float* window,
                                             uint32_t size, uint32_t base, float* pool) {
  __syncthreads();
  const uint32_t pool_size = hash.num_slots << hash.log2_block;
  const uint32_t first = base << hash.log2_block;
  const uint32_t start = size / gridDim.x * blockIdx.x / kQuad * kQuad;
  const uint32_t step = takes_quads(hash.log2_block) ? kQuad : 1;
  for (uint32_t i = step * threadIdx.x; i < size; i += step * blockDim.x) {
    const uint32_t from = i + start < size ? i + start : i + start - size;
    const uint32_t to = first + from < pool_size ? first + from : first + from - pool_size;
    if (step == kQuad) {
      add_vector(pool + to, *reinterpret_cast<const float4*>(window + from));
    } else {
      atomicAdd(pool + to, window[from]);
    }
  }
  __syncthreads();
}

template <class Shape, Sums kSums, class Number>
__global__ void __launch_bounds__(num_threads<Shape>(), 1)
    weight_backward_kernel(const __grid_constant__ Arguments args) {
  const HashParams& hash = args.weight.hash;
  auto* window = reinterpret_cast<float*>(shared_memory());
  const uint32_t window_size = hash.draw_slots << hash.log2_block;
  const bool quads = takes_quads(hash.log2_block);
  const WindowRows groups(args.weight, args.gradient, kSums == Sums::kShared);
  const int parts = (args.plan.strips + args.plan.strips_of_part - 1) / args.plan.strips_of_part;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;

  Lane<Shape, kSums, Number> lane(args, window);
  for (int task = static_cast<int>(blockIdx.x); task < args.plan.tasks;
       task += static_cast<int>(gridDim.x)) {
    const int group = task / args.plan.shares;
    const int share = task % args.plan.shares;
    const int begin = groups.begin(group, args.gradient.rows);
    const int end = groups.begin(group + 1, args.gradient.rows);
    if constexpr (kSums == Sums::kShared) clear_window(window, window_size);
    const int units = (end - begin) * parts;
    for (int unit = share * warps + warp; unit < units; unit += args.plan.shares * warps) {
      lane.select_row(begin + unit / parts);
      const int first = unit % parts * args.plan.strips_of_part;
      const int last = min(first + args.plan.strips_of_part, args.plan.strips);
      for (int strip = first; strip < last; ++strip) {
        if (quads) {
          lane.take_blocks(strip);
        } else {
          lane.take_columns(strip);
        }
      }
    }
    if constexpr (kSums == Sums::kShared) {
      const uint32_t row =
          args.weight.row_offset + static_cast<uint32_t>(args.gradient.row + begin);
      flush_window(hash, window, window_size, window_base(row, hash), args.sums.pool);
    }
  }
  lane.finish_theta();
}

/// How many blocks share a window's rows: as many as end soonest, each with a window to add up.
int best_shares(int64_t windows, double rows_cost, double window_cost, int processors) {
  int best = 1;
  double best_cost = 0;
  for (int shares = 1; shares <= processors; ++shares) {
    const int64_t rounds = (windows * shares + processors - 1) / processors;
    const double cost = static_cast<double>(rounds) * (rows_cost / shares + window_cost);
    if (shares == 1 || cost < best_cost) {
      best = shares;
      best_cost = cost;
    }
  }
  return best;
}

}  // namespace

std::string why_not_weight_backward(const VirtualWeight& weight, int64_t rows, int64_t cols) {
  const ReconstructParams& g = weight.reconstruct;
  if (!with_shape(weight, [](const auto&) {})) {
    return "there is no kernel for num_hashes " + std::to_string(weight.hash.num_hashes) +
           ", depth " + std::to_string(g.depth) + ", width " + std::to_string(g.width) +
           " and activation '" + (g.activation == Activation::kReLU ? "relu" : "tanh") + "'";
  }
  for (const int64_t extent : {rows, cols}) {
    if (extent > kMaxExtent) {
      return "rows and columns must be at most " + std::to_string(kMaxExtent) + ", received " +
             std::to_string(extent);
    }
  }
  return "";
}

BackwardPlan plan_weight_backward(const DeviceWeight& weight, const WeightGradient& gradient,
                                  bool in_units, const Device& device) {
  // Units of work a warp gets at least where there are as many: the last ones end together.
  constexpr int64_t kUnitsOfWarp = 4;
  // To clear an element of a window and to add it to the pool's gradient, in weights.
  constexpr double kFlushCost = 0.5;
  const HashParams& hash = weight.hash;
  BackwardPlan plan{};
  with_shape(weight, [&]<class Shape>(const Shape&) { plan.threads = num_threads<Shape>(); });
  const int warps = plan.threads / kWarpSize;

  const size_t window_size = size_t{hash.draw_slots} << hash.log2_block;
  const size_t window_bytes = window_size * sizeof(float);
  int64_t windows = WindowRows(weight, gradient, true).count(gradient.rows);
  const double weights = static_cast<double>(gradient.rows) * static_cast<double>(gradient.cols);
  // Not for a window of which less is drawn than it has.
  plan.shares_window = !in_units && window_bytes <= device.shared_bytes &&
                       window_size * windows < weights * hash.num_hashes;
  if (!plan.shares_window) windows = 1;
  const size_t theta_bytes = block_sum_bytes(
      theta_size(hash.num_hashes, weight.reconstruct.depth, weight.reconstruct.width),
      plan.threads);
  plan.shared_bytes = std::max(plan.shares_window ? window_bytes : 0, theta_bytes);
  plan.shares = best_shares(windows, weights / windows,
                            plan.shares_window ? kFlushCost * window_size : 0.0, device.processors);
  plan.tasks = windows * plan.shares;
  plan.blocks = static_cast<unsigned>(std::min<int64_t>(plan.tasks, device.processors));

  const bool quads = takes_quads(hash.log2_block);
  const int64_t strip_cols =
      quads ? kWarpSize << (hash.log2_block - log2_lanes(hash.log2_block)) : kWarpSize;
  const int64_t lead = quads ? weight.col_offset & (hash.block() - 1) : 0;
  const int64_t strips = (lead + gradient.cols + strip_cols - 1) / strip_cols;
  const int64_t units = kUnitsOfWarp * warps * plan.tasks;
  plan.strips = static_cast<int>(strips);
  plan.strips_of_part =
      static_cast<int>(std::clamp<int64_t>(strips * gradient.rows / units, 1, strips));
  return plan;
}

void weight_backward(const DeviceWeight& weight, const WeightGradient& gradient,
                     const PoolGradient& sums, const BackwardPlan& plan, cudaStream_t stream) {
  const Grid grid{plan.blocks, plan.threads, plan.shared_bytes};
  const Arguments args{weight, gradient, sums, plan};
  const bool bfloat16 = gradient.dtype == DType::kBFloat16 && weight.pool_dtype == DType::kBFloat16;
  with_shape(weight, [&]<class Shape>(const Shape&) {
    const auto run = [&]<Sums kSums>() {
      launch("weight_backward",
             bfloat16 ? weight_backward_kernel<Shape, kSums, BFloat16>
                      : weight_backward_kernel<Shape, kSums, AnyNumber>,
             grid, stream, args);
    };
    if (plan.shares_window) {
      run.template operator()<Sums::kShared>();
    } else if (sums.pool_units == nullptr) {
      run.template operator()<Sums::kGlobal>();
    } else {
      launch("weight_backward", weight_backward_kernel<Shape, Sums::kUnits, AnyNumber>, grid,
             stream, args);
    }
  });
}

}  // namespace hfh::cuda
