#pragma once

#include "cpu/kernels.h"
#include "hfh/config.h"

// The kernels that each instruction set defines; `cpu::Kernels` documents them.

HFH_NAMESPACE_BEGIN

void reconstruct_kernel(const VirtualWeight&, const cpu::TileBounds&, void* out, int64_t stride,
                        cpu::Meanwhile meanwhile = {});
void linear_kernel(const VirtualWeight&, const cpu::LinearBatch&, int64_t row_begin,
                   int64_t row_end, float* scratch);
size_t linear_scratch_kernel();
void linear_bfloat16_kernel(const VirtualWeight&, const cpu::BFloat16Batch&, int64_t row_begin,
                            int64_t row_end, void* scratch);
void linear_backward_input_bfloat16_kernel(const VirtualWeight&, const cpu::BFloat16Batch&,
                                           int64_t col_begin, int64_t col_end, void* scratch);
void weight_gradient_bfloat16_kernel(const cpu::BFloat16Gradient&, const cpu::TileBounds&,
                                     float* gradient, int64_t stride, void* scratch);
size_t bfloat16_scratch_kernel();
void linear_backward_input_kernel(const VirtualWeight&, const cpu::LinearBatch&, int64_t col_begin,
                                  int64_t col_end, float* scratch);
bool has_slot_products_kernel(const VirtualWeight&);
void slot_products_kernel(const VirtualWeight&, const cpu::SlotProducts&, const cpu::LinearBatch&,
                          int64_t slot_begin, int64_t slot_end, float* scratch);
size_t slot_products_scratch_kernel(int64_t num_products);
void add_slot_products_kernel(const VirtualWeight&, const cpu::SlotProducts&,
                              const cpu::LinearBatch&, int64_t row_begin, int64_t row_end);
void turn_inputs_kernel(const float* input, int64_t stride, int64_t batch, int64_t cols,
                        float* turned);
void batch_slot_products_kernel(const VirtualWeight&, const cpu::BatchSlotProducts&,
                                const float* inputs, int64_t slot_begin, int64_t slot_end);
void add_batch_slot_products_kernel(const VirtualWeight&, const cpu::BatchSlotProducts&,
                                    float* output, int64_t stride, int64_t batch, int64_t row_begin,
                                    int64_t row_end);
void scatter_slots_kernel(const VirtualWeight&, const cpu::BatchSlotProducts& sums,
                          const float* grad_turned, int64_t row_begin, int64_t row_end,
                          int64_t block_begin, int64_t block_end);
void slots_backward_input_kernel(const VirtualWeight&, const cpu::BatchSlotProducts& sums,
                                 int64_t block_begin, int64_t block_end, float* grad_input,
                                 int64_t stride, int64_t batch);
void slots_backward_pool_kernel(const VirtualWeight&, const cpu::BatchSlotProducts& sums,
                                const float* input, int64_t stride, int64_t batch,
                                int64_t slot_begin, int64_t slot_end, float* grad_pool);
void slots_backward_theta_kernel(const VirtualWeight&, const cpu::BatchSlotProducts& products,
                                 const float* grad_turned, int64_t row_begin, int64_t row_end,
                                 double* grad_theta);
bool all_finite_kernel(const float* values, int64_t count);
void backward_kernel(const VirtualWeight&, const cpu::TileBounds&, const void* gradient,
                     DType gradient_dtype, int64_t stride, double* grad_theta,
                     cpu::PoolContributions*);
void contribution_bounds_kernel(const VirtualWeight&, const cpu::TileBounds&, int64_t* entries,
                                int64_t* values);
void scatter_kernel(const cpu::PoolContributions&, DType pool_dtype, uint32_t begin, uint32_t end,
                    void* grad_pool);
void lookup_kernel(const VirtualWeight&, const cpu::RowLookups&, int64_t col, int64_t cols,
                   void* out, bool past_caches);
void add_lookups_kernel(const VirtualWeight&, const cpu::RowLookups&, const void* factor,
                        int64_t col, int64_t cols, void* sums);
void lookup_backward_kernel(const VirtualWeight&, const cpu::RowLookups&, int64_t col, int64_t cols,
                            const void* gradient, DType gradient_dtype, double* grad_theta,
                            cpu::PoolContributions*);
void elements_backward_kernel(const VirtualWeight&, const cpu::ElementGradients&,
                              double* grad_theta, cpu::PoolContributions*);
void max_rows_kernel(DType, int64_t count, int64_t cols, const void* const* rows, const int64_t* id,
                     void* best, int64_t* winner);
void round_to_bfloat16_kernel(const float* source, BFloat16* target, int64_t count);
void gather_patches_kernel(const cpu::Patches&, const void* images, int element_size,
                           const cpu::PatchBlock&);
void scatter_positions_kernel(const cpu::Patches&, const cpu::PatchBlock&, int element_size,
                              void* images);
void pack_patches_left_kernel(const cpu::Patches&, const float* images, const cpu::PatchPart&,
                              const int64_t* place, float* packed, float* scratch);
void pack_patches_right_kernel(const cpu::Patches&, const float* images, const cpu::PatchPart&,
                               int64_t first_row, int64_t depth, float* packed, float* scratch);
void pack_channels_kernel(const cpu::Patches& pixels, const float* images, const cpu::PatchPart&,
                          float* packed);
void pack_weight_kernel(const VirtualWeight&, const cpu::WeightPart&, float* packed,
                        float* scratch);
void multiply_packed_kernel(const cpu::RowGroup* groups, int64_t num_groups, int64_t cols,
                            int64_t depth, int64_t unit, const float* left, const float* right,
                            float* out, const int64_t* out_row, int64_t stride);
void order_by_channel_kernel(int64_t rows, int64_t channels, int64_t taps, float* data);
void add_patches_kernel(const cpu::Patches&, const cpu::PatchBlock&, DType, void* images);

HFH_NAMESPACE_END
