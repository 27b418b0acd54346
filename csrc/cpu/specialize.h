#pragma once

#include "cpu/kernels.h"
#include "cpu/walk.h"

// From the run-time description of a virtual weight to a compile-time one. The shapes that models
// use are compiled on their own; every other shape takes one generic path.

HFH_NAMESPACE_BEGIN

template <class Lanes, class Pool, class Shape, class F>
void specialize_walk(const VirtualWeight& weight, const F& f) {
  if constexpr (Lanes::kCount > 1) {
    if (weight.hash.block() >= Lanes::kCount) return f(With<Lanes, Shape, Pool, false>{});
  }
  f(With<Lanes, Shape, Pool, true>{});
}

template <class Pool, int kHashes, Activation kActivation, class F>
bool specialize_width(const VirtualWeight& weight, const F& f) {
  switch (weight.reconstruct.width) {
    case 4:
      specialize_walk<FloatLanes, Pool, FixedShape<kHashes, 2, 4, kActivation>>(weight, f);
      return true;
    case 8:
      specialize_walk<FloatLanes, Pool, FixedShape<kHashes, 2, 8, kActivation>>(weight, f);
      return true;
    default:
      return false;
  }
}

template <class Pool, int kHashes, class F>
bool specialize_depth(const VirtualWeight& weight, const F& f) {
  const ReconstructParams& g = weight.reconstruct;
  if (g.depth == 1) {
    specialize_walk<FloatLanes, Pool, FixedShape<kHashes, 1, 0, Activation::kReLU>>(weight, f);
    return true;
  }
  if (g.depth != 2) return false;
  return g.activation == Activation::kReLU
             ? specialize_width<Pool, kHashes, Activation::kReLU>(weight, f)
             : specialize_width<Pool, kHashes, Activation::kTanh>(weight, f);
}

template <class Pool, class F>
void specialize_shape(const VirtualWeight& weight, const F& f) {
  bool done = false;
  switch (weight.hash.num_hashes) {
    case 1:
      done = specialize_depth<Pool, 1>(weight, f);
      break;
    case 2:
      done = specialize_depth<Pool, 2>(weight, f);
      break;
    case 4:
      done = specialize_depth<Pool, 4>(weight, f);
      break;
    case 8:
      done = specialize_depth<Pool, 8>(weight, f);
      break;
    default:
      break;
  }
  if (!done) specialize_walk<FloatLanes, Pool, AnyShape>(weight, f);
}

/// Calls `f(With<...>{})` with the specialisation that serves `weight`.
template <class F>
void specialize(const VirtualWeight& weight, const F& f) {
  switch (weight.pool_dtype) {
    case DType::kFloat32:
      return specialize_shape<float>(weight, f);
    case DType::kBFloat16:
      return specialize_shape<BFloat16>(weight, f);
    case DType::kFloat64:
      return specialize_walk<DoubleLane, double, AnyShape>(weight, f);
  }
}

HFH_NAMESPACE_END
