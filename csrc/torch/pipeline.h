#pragma once

#include <algorithm>

#include "cpu/kernels.h"
#include "torch/parallel.h"

namespace hfh::torch_ops {

/// Products of one thread, each in progress while the thread prepares the panel of the next.
class Pipeline {
 public:
  explicit Pipeline(size_t panel_bytes, int64_t num_floats) : panel_bytes_(panel_bytes) {
    auto* memory = static_cast<char*>(
        Scratch<Purpose::kPanels>::get(2 * panel_bytes + num_floats * sizeof(float)));
    panels_ = memory;
    floats_ = reinterpret_cast<float*>(memory + 2 * panel_bytes);
    cpu::kernels().matrix_unit->prepare();
  }
  ~Pipeline() { cpu::kernels().matrix_unit->release(); }

  /// Room for a part of a panel as the kernels write it.
  float* floats() { return floats_; }
  /// Where the next panel is to be packed.
  char* panel() { return panels_ + next_ * panel_bytes_; }

  /// What is to be called while the next panel is prepared: about `calls` times.
  cpu::Meanwhile expect(int64_t calls) {
    calls_left_ = std::max<int64_t>(1, calls);
    return {[](void* self) { static_cast<Pipeline*>(self)->step(); }, this};
  }

  /// Finishes the product in progress and starts the next panel's.
  void start(const cpu::MatrixUnit::Product& product) {
    finish();
    product_ = product;
    cpu::kernels().matrix_unit->start(product_);
    next_ = 1 - next_;
  }

  /// Returns whether all sums so far are finite.
  bool finish() {
    cpu::kernels().matrix_unit->advance(product_, product_.steps_left);
    finite_ = finite_ && product_.finite;
    return finite_;
  }

 private:
  void step() {
    if (product_.steps_left == 0) return;
    const int64_t steps = (product_.steps_left + calls_left_ - 1) / calls_left_;
    calls_left_ = std::max<int64_t>(1, calls_left_ - 1);
    cpu::kernels().matrix_unit->advance(product_, steps);
  }

  size_t panel_bytes_;
  char* panels_;
  float* floats_;
  int next_ = 0;
  cpu::MatrixUnit::Product product_{};
  int64_t calls_left_ = 1;
  bool finite_ = true;
};

inline int64_t ceil_divide(int64_t x, int64_t y) { return (x + y - 1) / y; }

/// Calls that reconstructing and packing a panel makes to `Meanwhile`.
inline int64_t calls_of_panel(const VirtualWeight& weight, int64_t rows, int64_t cols) {
  const int64_t vectors = std::max<int64_t>(weight.hash.block(), cpu::kernels().lanes);
  return rows * ceil_divide(cols, vectors) +
         ceil_divide(rows, cpu::MatrixUnit::kTile) * ceil_divide(cols, cpu::MatrixUnit::kStep);
}

}  // namespace hfh::torch_ops
