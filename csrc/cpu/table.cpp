#include "cpu/declarations.h"
#include "cpu/multiply.h"

namespace hfh::cpu {

#define HFH_STRINGIZE_EXPANDED(x) #x
#define HFH_STRINGIZE(x) HFH_STRINGIZE_EXPANDED(x)
#define HFH_JOIN_EXPANDED(a, b) a##b
#define HFH_JOIN(a, b) HFH_JOIN_EXPANDED(a, b)

/// The table of the instruction set that this file is compiled for: `kernels_avx512` and so on.
const Kernels& HFH_JOIN(kernels_, HFH_CAPABILITY)() {
  static constexpr Kernels table{
      HFH_STRINGIZE(HFH_CAPABILITY),
      kFloatLanes,
      BFloat16Elements::kColumns,
      reconstruct_kernel,
      linear_kernel,
      linear_backward_input_kernel,
      linear_scratch_kernel,
      linear_bfloat16_kernel,
      linear_backward_input_bfloat16_kernel,
      weight_gradient_bfloat16_kernel,
      bfloat16_scratch_kernel,
      has_slot_products_kernel,
      slot_products_kernel,
      slot_products_scratch_kernel,
      add_slot_products_kernel,
      turn_inputs_kernel,
      batch_slot_products_kernel,
      add_batch_slot_products_kernel,
      scatter_slots_kernel,
      slots_backward_input_kernel,
      slots_backward_pool_kernel,
      slots_backward_theta_kernel,
      all_finite_kernel,
      backward_kernel,
      contribution_bounds_kernel,
      scatter_kernel,
      lookup_kernel,
      add_lookups_kernel,
      lookup_backward_kernel,
      elements_backward_kernel,
      max_rows_kernel,
      round_to_bfloat16_kernel,
      gather_patches_kernel,
      scatter_positions_kernel,
      add_patches_kernel,
      pack_patches_left_kernel,
      pack_patches_right_kernel,
      pack_channels_kernel,
      pack_weight_kernel,
      multiply_packed_kernel,
      order_by_channel_kernel,
      nullptr,
  };
  return table;
}

}  // namespace hfh::cpu
