"""``hfh::conv2d`` and its gradients: a convolution by a weight that never exists in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfh_kernels.ops.conv2d import reference
from hfh_kernels.ops.conv2d.reference import Geometry
from hfh_kernels.ops.library import WEIGHT, define, define_autocast, require_same_device

GEOMETRY = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups"


def fake_conv2d(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    out_channels: int,
    *arguments: Any,
) -> Tensor:
    require_same_device("pool", pool, "input", input)
    require_same_device("theta", theta, "input", input)
    if bias is not None:
        require_same_device("bias", bias, "input", input)
    geometry = Geometry(*arguments[:5])
    geometry.require_valid(input.shape, out_channels)
    size = geometry.output_size(input.shape[2:])
    return new_images(input, (input.shape[0], out_channels, *size))


def fake_conv2d_backward_input(
    grad_output: Tensor, pool: Tensor, theta: Tensor, input_size: Sequence[int], *arguments: Any
) -> Tensor:
    require_same_device("pool", pool, "grad_output", grad_output)
    require_same_device("theta", theta, "grad_output", grad_output)
    return new_images(grad_output, input_size)


def fake_conv2d_backward_weight(
    grad_output: Tensor, input: Tensor, pool: Tensor, theta: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    require_same_device("input", input, "grad_output", grad_output)
    require_same_device("pool", pool, "grad_output", grad_output)
    require_same_device("theta", theta, "grad_output", grad_output)
    return pool.new_empty(pool.shape), theta.new_empty(theta.shape)


def new_images(like: Tensor, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Channels-last where `like` is that and nothing else, in its dtype unless another is given."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.contiguous_format
    if channels_last and not like.is_contiguous():
        memory_format = torch.channels_last
    dtype = dtype or like.dtype
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=memory_format)


define(
    "conv2d",
    f"(Tensor input, Tensor pool, Tensor theta, Tensor? bias, int out_channels, {GEOMETRY}, "
    f"{WEIGHT}) -> Tensor",
    reference=reference.conv2d,
    fake=fake_conv2d,
)
define(
    "conv2d_backward_input",
    f"(Tensor grad_output, Tensor pool, Tensor theta, SymInt[] input_size, {GEOMETRY}, {WEIGHT})"
    " -> Tensor",
    reference=reference.conv2d_backward_input,
    fake=fake_conv2d_backward_input,
)
define(
    "conv2d_backward_weight",
    f"(Tensor grad_output, Tensor input, Tensor pool, Tensor theta, {GEOMETRY}, {WEIGHT})"
    " -> (Tensor, Tensor)",
    reference=reference.conv2d_backward_weight,
    fake=fake_conv2d_backward_weight,
)
define_autocast("conv2d")
