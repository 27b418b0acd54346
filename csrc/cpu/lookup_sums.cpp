#include "cpu/declarations.h"
#include "cpu/forward.h"
#include "cpu/lookup.h"
#include "cpu/specialize.h"

// Sums of rows of a virtual weight.

HFH_NAMESPACE_BEGIN

namespace {

/// Adds each row of a tile, times its factor, to `sums` from its place on.
template <class W>
struct AddSink {
  using Scalar = typename W::Scalar;
  Scalar* sums;
  const int64_t* place;
  const Scalar* factor;  // or null
  int64_t cols;

  HFH_HOST_DEVICE Scalar factor_of(int64_t row) const {
    return factor == nullptr ? Scalar{1} : factor[row];
  }
  HFH_HOST_DEVICE void begin_block() {}
  HFH_HOST_DEVICE void vector(int64_t row, int64_t col, typename W::Vector value) {
    Scalar* sum = sums + place[row] + col;
    store(sum, load<typename W::Vector>(sum) + factor_of(row) * value);
  }
  __attribute__((noinline)) void edge(int64_t row, int64_t col, typename W::Vector value) {
    Scalar lanes[W::kLanes];
    store(lanes, value);
    for (int i = 0; i < W::kLanes; ++i) {
      if (col + i >= 0 && col + i < cols) sums[place[row] + col + i] += factor_of(row) * lanes[i];
    }
  }
  HFH_HOST_DEVICE void row_done(int64_t) {}
};

/// The sum over some rows of what the last layer of g takes in, kLanes columns of each: that layer
/// is linear, so it comes after the sum.
template <class W, bool kScaled>
class LastInputs {
 public:
  using Vector = typename W::Vector;
  using Shape = typename W::Shape;
  using Scalar = typename W::Scalar;

  HFH_HOST_DEVICE LastInputs(const Shape& shape, const Scalar* theta)
      : shape_(shape),
        theta_(theta),
        last_(theta + first_scaled(shape.num_hashes(), shape.depth(), shape.width())),
        size_(shape.depth() == 1 ? shape.num_hashes() : shape.width()) {
    for (int j = 0; j < size_; ++j) sum_[j] = Vector{};
  }

  template <class First>
  HFH_HOST_DEVICE void add(const First& first, const Vector* a, Scalar factor) {
    if (shape_.depth() == 1) return add_inputs(a, factor);
    Vector hidden[kBound];
    hidden_layers(shape_, first, theta_, a, hidden);
    add_inputs(hidden, factor);
    bias_ += kScaled ? factor * last_[size_] : last_[size_];
  }

  /// The sum of the rows.
  HFH_HOST_DEVICE Vector value() const {
    Vector value = splat<Vector>(bias_);
    for (int j = 0; j < size_; ++j) value += last_[j] * sum_[j];
    return value;
  }

 private:
  static constexpr int kBound =
      W::kHashesBound > Shape::kWidthBound ? W::kHashesBound : Shape::kWidthBound;

  HFH_HOST_DEVICE void add_inputs(const Vector* x, Scalar factor) {
    for (int j = 0; j < size_; ++j) {
      if constexpr (kScaled) {
        sum_[j] += factor * x[j];
      } else {
        sum_[j] += x[j];
      }
    }
  }

  const Shape& shape_;
  const Scalar *theta_, *last_;
  int size_;
  // Stays 0 at depth 1, whose only layer is `last_`, the whole of theta, and has no bias.
  Scalar bias_ = 0;
  Vector sum_[kBound];
};

/// Columns of whole blocks. Signs enter the elements: the first layer's weights then stay in
/// registers, and broadcasting them anew for each row costs more than the additional operations.
template <class W, bool kScaled>
void add_whole_blocks(const VirtualWeight& weight, const cpu::RowLookups& lookups,
                      const float* factor, int64_t col, int64_t cols, float* sums) {
  using Vector = typename W::Vector;
  using Uint = typename W::Uint;
  using Draws = RowDraws<W>;
  const typename W::Shape shape(weight);
  const LocalTheta<W> theta(shape, weight);
  constexpr bool kInRegisters = W::kFirstBound <= 16;
  Vector in_registers[kInRegisters ? W::kFirstBound : 1];
  const auto first = [&](int i) {
    if constexpr (kInRegisters)
      return in_registers[i];
    else
      return theta.values[i];
  };
  const auto* pool = static_cast<const typename W::Pool*>(weight.pool);
  const int64_t block_size = weight.hash.block();
  const auto first_block = static_cast<uint32_t>((weight.col_offset + col) / block_size);
  Draws draws(weight.hash, shape.num_hashes());
  for (int64_t begin = 0; begin < lookups.count; begin += Draws::kRows) {
    const int64_t left = lookups.count - begin;
    const int count = left < Draws::kRows ? static_cast<int>(left) : Draws::kRows;
    draws.set_rows(lookups.row + begin, count);
    for (int64_t i = 0; i < cols; i += W::kLanes) {
      const int64_t within = i % block_size;
      if (within == 0) draws.draw_block(first_block + static_cast<uint32_t>(i / block_size));
      const auto* source = pool + within;
      if constexpr (kInRegisters) {
        for (int k = 0; k < first_layer_size(shape); ++k) {
          in_registers[k] = opaque(splat<Vector>(theta.values[k]));
        }
      }
      for (int row = 0; row < count;) {
        const int64_t place = lookups.place[begin + row];
        // Of few rows at a time: the sums of what is never negative lose digits.
        constexpr int kRowsAtOnce = 32;
        const int end = count - row < kRowsAtOnce ? count : row + kRowsAtOnce;
        LastInputs<W, kScaled> inputs(shape, theta.values);
        do {
          Vector a[W::kHashesBound];
          for (int u = 0; u < shape.num_hashes(); ++u) {
            __builtin_prefetch(source + draws.offset(u, row + Draws::kRowsAhead));
            a[u] = flip_sign(load_as<Vector>(source + draws.offset(u, row)),
                             splat_uint<Uint>(draws.sign(u, row)));
          }
          inputs.add(first, a, kScaled ? factor[begin + row] : 1.0f);
        } while (++row < end && lookups.place[begin + row] == place);
        float* sum = sums + place + i;
        store(sum, load<Vector>(sum) + inputs.value());
      }
    }
  }
}

}  // namespace

void add_lookups_kernel(const VirtualWeight& weight, const cpu::RowLookups& lookups,
                        const void* factor, int64_t col, int64_t cols, void* sums) {
  if (lookups.count == 0 || cols == 0) return;
  specialize(weight, [&]<class W>(W) {
    using Scalar = typename W::Scalar;
    const auto* factors = static_cast<const Scalar*>(factor);
    auto* out = static_cast<Scalar*>(sums);
    if constexpr (!W::kByElement) {
      if (((weight.col_offset + col) | cols) % weight.hash.block() == 0) {
        return factor == nullptr
                   ? add_whole_blocks<W, false>(weight, lookups, factors, col, cols, out)
                   : add_whole_blocks<W, true>(weight, lookups, factors, col, cols, out);
      }
    }
    AddSink<W> sink{out, lookups.place, factors, cols};
    reconstruct_tile<W>(weight, ListedRows{lookups.row, lookups.listed},
                        {0, lookups.count, col, cols}, sink);
  });
}

HFH_NAMESPACE_END
