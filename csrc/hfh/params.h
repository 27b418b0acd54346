#pragma once

#include <cstdint>

#include "hfh/config.h"

// Plain descriptions of a virtual weight, shared by every kernel. They hold no code that depends on
// the instruction set, so they live outside the namespace of one.
namespace hfh {

inline constexpr int kMaxHashes = 16;
inline constexpr int kMaxWidth = 16;
inline constexpr int kMaxDepth = 3;
inline constexpr int kMaxBlock = 256;

enum class Activation : int32_t { kReLU = 0, kTanh = 1 };

enum class DType : int32_t { kFloat32, kBFloat16, kFloat64, kFloat16 };

struct BFloat16 {
  static constexpr int kExponentBits = 8;
  uint16_t bits;
};

struct Float16 {
  static constexpr int kExponentBits = 5;
  uint16_t bits;
};

/// Hash version 1, with the derived slot counts of its definition.
struct HashParams {
  uint32_t seed;
  uint32_t num_slots;        // pool_size / block
  uint32_t draw_slots;       // slots a row draws from: num_slots, or window / block
  uint32_t rows_per_window;  // 0: no window
  int32_t num_hashes;
  int32_t log2_block;

  HFH_HOST_DEVICE uint32_t block() const { return uint32_t{1} << log2_block; }
};

/// The reconstruction network g: depth 1 is linear, depth d has d - 1 hidden layers.
/// (Depth 0 is depth 1 with one hash and a mixing weight of 1, so no kernel knows of it.)
struct ReconstructParams {
  int32_t depth;
  int32_t width;
  Activation activation;
};

/// A virtual weight V[row, col] and the storage behind it. `theta` holds g's parameters layer by
/// layer, each a row-major weight and then its bias, with the layer's scale folded into the last.
struct VirtualWeight {
  HashParams hash;
  ReconstructParams reconstruct;
  const void* pool;
  DType pool_dtype;
  const void* theta;  // double where the pool is double, else float
  uint32_t row_offset;
  uint32_t col_offset;
};

/// Number of g's parameters, in the order of `VirtualWeight::theta`.
HFH_HOST_DEVICE constexpr int theta_size(int num_hashes, int depth, int width) {
  if (depth <= 1) return num_hashes * depth;
  const int hidden_to_hidden = (depth - 2) * (width * width + width);
  return num_hashes * width + width + hidden_to_hidden + width + 1;
}

/// The first of g's parameters that the layer's scale is folded into: those of the last layer.
HFH_HOST_DEVICE constexpr int first_scaled(int num_hashes, int depth, int width) {
  return depth <= 1 ? 0 : theta_size(num_hashes, depth, width) - width - 1;
}

inline constexpr int kMaxTheta = theta_size(kMaxHashes, kMaxDepth, kMaxWidth);

}  // namespace hfh
