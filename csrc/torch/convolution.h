#pragma once

/// How a kernel moves over an image, in the order of the schemas in hfh_kernels/ops/conv2d.
#define HFH_GEOMETRY_PARAMETERS                                                 \
  at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, \
      at::IntArrayRef dilation, int64_t groups
#define HFH_GEOMETRY_ARGUMENTS kernel_size, stride, padding, dilation, groups
