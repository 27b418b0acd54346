"""``conv2d`` by a virtual weight, in plain PyTorch: the weight is materialised, then applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from hfh_kernels.ops.library import Weight, require_bias, require_same_device
from hfh_kernels.ops.materialize.reference import virtual_weight


class Geometry(NamedTuple):
    """How the kernel moves over the image: the operators' arguments, in schema order."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def weight_shape(self, in_channels: int, out_channels: int) -> tuple[int, ...]:
        return (out_channels, in_channels // self.groups, *self.kernel_size)

    def output_size(self, size: Sequence[int]) -> list[int]:
        """Height and width of the output, from those of the input."""
        return [
            (size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        ]

    def require_valid(self, input_size: Sequence[int], out_channels: int) -> None:
        """Raise ValueError unless an input of this shape can be convolved."""
        for name, low in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            values = getattr(self, name)
            if min(values) < low:
                raise ValueError(f"{name} must be at least {low}, received {list(values)}")
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, received {self.groups}")
        if len(input_size) != 4:
            raise ValueError(
                f"input must be [batch, channels, height, width], received shape {list(input_size)}"
            )
        if min(input_size[1:]) < 1:
            raise ValueError(
                f"input must have channels, rows and columns, received shape {list(input_size)}"
            )
        if input_size[1] % self.groups:
            raise ValueError(
                f"input must have a multiple of groups={self.groups} channels, received shape "
                f"{list(input_size)}"
            )
        if out_channels < 1 or out_channels % self.groups:
            raise ValueError(
                f"out_channels must be a positive multiple of groups={self.groups}, "
                f"received {out_channels}"
            )
        if min(self.output_size(input_size[2:])) < 1:
            raise ValueError(
                f"input must be as large as the kernel once padded, received shape "
                f"{list(input_size)} for kernel_size={list(self.kernel_size)}, "
                f"padding={list(self.padding)} and dilation={list(self.dilation)}"
            )


def conv2d(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *weight: Any,
) -> Tensor:
    """torch.nn.functional.conv2d by V [out_channels, in_channels / groups * height * width].

    Args:
        input: floating [batch, in_channels, height, width]
        pool: floating [pool_size]
        theta: floating [num_parameters]
        bias: [out_channels] in input's dtype, or None.
        out_channels: rows of V; columns are (channel, kernel row, kernel column).
        kernel_size, stride, padding, dilation: of rows and columns of the image.
        groups: in which input and output channels are split.
        weight: the fields of :class:`Weight`.

    Returns:
        [batch, out_channels, out_height, out_width] in input's dtype, or in that of autocast where
        it is on.

    Raises:
        TypeError: a tensor is not floating-point, or bias differs from input in dtype.
        ValueError: a shape, a device, a size or a field of ``weight`` is invalid.
    """
    geometry = Geometry(kernel_size, stride, padding, dilation, groups)
    if not input.is_floating_point():
        raise TypeError(f"input must be a floating-point tensor, received {input.dtype}")
    geometry.require_valid(input.shape, out_channels)
    require_same_device("pool", pool, "input", input)
    if bias is not None:
        require_bias(bias, input, out_channels)
    virtual = _virtual_weight(pool, theta, input.shape[1], out_channels, geometry, weight)
    return torch.nn.functional.conv2d(
        input, virtual.to(input.dtype), bias, stride, padding, dilation, groups
    )


def conv2d_backward_input(
    grad_output: Tensor,
    pool: Tensor,
    theta: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *weight: Any,
) -> Tensor:
    """The gradient of an input of shape input_size, in grad_output's dtype."""
    geometry = Geometry(kernel_size, stride, padding, dilation, groups)
    virtual = _virtual_weight(pool, theta, input_size[1], grad_output.shape[1], geometry, weight)
    grad_input: Tensor = conv2d_input(
        input_size, virtual.to(grad_output.dtype), grad_output, stride, padding, dilation, groups
    )
    return grad_input


def conv2d_backward_weight(
    grad_output: Tensor, input: Tensor, pool: Tensor, theta: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to pool and theta, from grad_output; arguments as of conv2d."""

    def forward(pool: Tensor, theta: Tensor) -> Tensor:
        return conv2d(input, pool, theta, None, grad_output.shape[1], *arguments)

    vjp = torch.func.vjp(forward, pool, theta)[1]
    grad_pool, grad_theta = vjp(grad_output)
    return grad_pool, grad_theta


def _virtual_weight(
    pool: Tensor,
    theta: Tensor,
    in_channels: int,
    out_channels: int,
    geometry: Geometry,
    weight: Sequence[Any],
) -> Tensor:
    shape = geometry.weight_shape(in_channels, out_channels)
    cols = math.prod(shape[1:])
    return virtual_weight(pool, theta, out_channels, cols, Weight(*weight)).view(shape)
