#pragma once

#include "cpu/kernels.h"
#include "hfh/config.h"

// The kernels that each instruction set defines; `cpu::Kernels` documents them.

HFH_NAMESPACE_BEGIN

void reconstruct_kernel(const VirtualWeight&, const cpu::TileBounds&, void* out, int64_t stride);
void linear_small_kernel(const VirtualWeight&, const cpu::SmallBatch&, int64_t row_begin,
                         int64_t row_end, float* scratch);
size_t small_batch_scratch_kernel(int64_t batch);
void backward_kernel(const VirtualWeight&, const cpu::TileBounds&, const void* gradient,
                     DType gradient_dtype, int64_t stride, double* grad_theta,
                     cpu::PoolContributions*);
void contribution_bounds_kernel(const VirtualWeight&, const cpu::TileBounds&, int64_t* entries,
                                int64_t* values);
void scatter_kernel(const cpu::PoolContributions&, DType pool_dtype, uint32_t begin, uint32_t end,
                    void* grad_pool);
void round_to_bfloat16_kernel(const float* source, BFloat16* target, int64_t count);

HFH_NAMESPACE_END
