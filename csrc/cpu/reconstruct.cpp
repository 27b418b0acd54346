#include "cpu/declarations.h"
#include "cpu/forward.h"
#include "cpu/specialize.h"

HFH_NAMESPACE_BEGIN

void reconstruct_kernel(const VirtualWeight& weight, const cpu::TileBounds& bounds, void* out,
                        int64_t stride, cpu::Meanwhile meanwhile) {
  if (bounds.rows == 0 || bounds.cols == 0) return;
  specialize(weight, [&]<class W>(W) {
    StoreSink<W> sink{{static_cast<typename W::Scalar*>(out), stride}, bounds.cols, meanwhile};
    reconstruct_tile<W>(weight, bounds, sink);
  });
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
