"""``linear`` by a virtual weight, in plain PyTorch: the weight is materialised, then multiplied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfh_kernels.ops.library import Weight, require_bias, require_same_device
from hfh_kernels.ops.materialize.reference import virtual_weight


def linear(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    out_features: int,
    *weight: Any,
) -> Tensor:
    """input @ V.T + bias.

    Args:
        input: floating [..., in_features]
        pool: floating [pool_size]
        theta: floating [num_parameters]
        bias: [out_features] in input's dtype, or None.
        out_features: rows of V.
        weight: the fields of :class:`Weight`.

    Returns:
        [..., out_features] in input's dtype, or in that of autocast where it is on.

    Raises:
        TypeError: a tensor is not floating-point, or bias differs from input in dtype.
        ValueError: a shape, a device or a field of ``weight`` is invalid.
    """
    if not input.is_floating_point():
        raise TypeError(f"input must be a floating-point tensor, received {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, received shape []")
    require_same_device("pool", pool, "input", input)
    if bias is not None:
        require_bias(bias, input, out_features)
    virtual = virtual_weight(pool, theta, out_features, input.shape[-1], Weight(*weight))
    return torch.nn.functional.linear(input, virtual.to(input.dtype), bias)


def linear_backward_input(
    grad_output: Tensor, pool: Tensor, theta: Tensor, in_features: int, *weight: Any
) -> Tensor:
    """grad_output [..., out_features] @ V, as [..., in_features] in grad_output's dtype."""
    rows = grad_output.shape[-1]
    virtual = virtual_weight(pool, theta, rows, in_features, Weight(*weight))
    return grad_output @ virtual.to(grad_output.dtype)


def linear_backward_weight(
    grad_output: Tensor, input: Tensor, pool: Tensor, theta: Tensor, *weight: Any
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to pool and theta, from grad_output [..., out_features]."""

    def forward(pool: Tensor, theta: Tensor) -> Tensor:
        return linear(input, pool, theta, None, grad_output.shape[-1], *weight)

    vjp = torch.func.vjp(forward, pool, theta)[1]
    grad_pool, grad_theta = vjp(grad_output)
    return grad_pool, grad_theta
