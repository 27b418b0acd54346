#include "cpu/declarations.h"
#include "cpu/forward.h"
#include "cpu/specialize.h"

HFH_NAMESPACE_BEGIN

namespace {

/// Writes those lanes whose columns, from `col` on, are in [0, cols). Not inlined, and apart from
/// the sink: that would have to be in memory for it.
template <class Scalar, class Vector>
__attribute__((noinline)) void store_edge(Scalar* row, int64_t col, int64_t cols, Vector value) {
  constexpr int kLanes = sizeof(Vector) / sizeof(Scalar);
  Scalar lanes[kLanes];
  store(lanes, value);
  for (int i = 0; i < kLanes; ++i) {
    if (col + i >= 0 && col + i < cols) row[col + i] = lanes[i];
  }
}

/// Writes row i of the tile to `out + place[i]`, and nothing outside it; past the caches where
/// asked, which takes whole vectors at aligned places.
template <class W>
struct StoreSink {
  typename W::Scalar* out;
  const int64_t* place;
  int64_t cols;
  bool past_caches;
  cpu::Meanwhile meanwhile;

  HFH_HOST_DEVICE void begin_block() { meanwhile(); }
  HFH_HOST_DEVICE void vector(int64_t row, int64_t col, typename W::Vector value) {
    auto* target = out + place[row] + col;
    past_caches ? stream(target, value) : store(target, value);
  }
  HFH_HOST_DEVICE void edge(int64_t row, int64_t col, typename W::Vector value) {
    store_edge(out + place[row], col, cols, value);
  }
  HFH_HOST_DEVICE void row_done(int64_t) {}
};

void reconstruct_rows(const VirtualWeight& weight, const cpu::RowLookups& lookups, int64_t col,
                      int64_t cols, void* out, bool past_caches, cpu::Meanwhile meanwhile) {
  specialize(weight, [&]<class W>(W) {
    constexpr int64_t kVectorBytes = sizeof(typename W::Vector);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0 &&
                         cols % W::kLanes == 0 && (weight.col_offset + col) % W::kLanes == 0;
    StoreSink<W> sink{static_cast<typename W::Scalar*>(out), lookups.place, cols,
                      past_caches && aligned, meanwhile};
    reconstruct_tile<W>(weight, ListedRows{lookups.row, lookups.listed},
                        {0, lookups.count, col, cols}, sink);
    if (sink.past_caches) fence_streams();
  });
}

}  // namespace

void reconstruct_kernel(const VirtualWeight& weight, const cpu::TileBounds& bounds, void* out,
                        int64_t stride, cpu::Meanwhile meanwhile) {
  if (bounds.cols == 0) return;
  for_each_listed(weight, bounds, stride, [&](const cpu::RowLookups& lookups) {
    reconstruct_rows(weight, lookups, bounds.col, bounds.cols, out, false, meanwhile);
  });
}

void lookup_kernel(const VirtualWeight& weight, const cpu::RowLookups& lookups, int64_t col,
                   int64_t cols, void* out, bool past_caches) {
  if (lookups.count == 0 || cols == 0) return;
  reconstruct_rows(weight, lookups, col, cols, out, past_caches, {});
}

void round_to_bfloat16_kernel(const float* source, BFloat16* target, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + kFloatLanes <= count; i += kFloatLanes) {
    store(target + i, _mm512_cvtneps_pbh((__m512)load<FloatVector>(source + i)));
  }
#endif
  for (; i < count; ++i) target[i] = round_to_bfloat16(source[i]);
}

HFH_NAMESPACE_END
