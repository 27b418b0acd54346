"""``conv1d`` and ``conv2d`` by a virtual weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfh_kernels import ops  # noqa: F401  (defines torch.ops.hfh)
from hfh_kernels.dispatch import choose
from hfh_kernels.functional.weight import require_pool_size, require_scalar, weight_fields
from hfh_kernels.ops.conv2d import reference as conv2d_reference
from hfh_kernels.ops.library import require_bias
from hfh_kernels.spec import HashSpec, Reconstruction

_CONV2D: dict[str, Callable[..., Any]] = {
    "cpu": torch.ops.hfh.conv2d.default,
    "triton": torch.ops.hfh.conv2d.default,
    "reference": conv2d_reference.conv2d,
}


def conv2d(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    out_channels: int,
    kernel_size: int | Sequence[int],
    hash_spec: HashSpec,
    reconstruction: Reconstruction,
    scale: float | Tensor = 1.0,
    row_offset: int = 0,
    col_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """torch.nn.functional.conv2d by a virtual weight.

    The weight [out_channels, in_channels / groups, kernel height, kernel width] is, flattened
    behind its first dimension, the virtual weight V. Differentiable in input, pool, theta, bias
    and scale.

    Args:
        input: floating [batch, in_channels, height, width], or without the batch.
        pool: floating [hash_spec.pool_size]
        theta: floating [reconstruction.num_parameters(hash_spec.num_hashes)], see
            :func:`materialize`.
        bias: [out_channels] in input's dtype, or None.
        stride, dilation, kernel_size: one int, or one for rows and one for columns.
        padding: likewise; or "valid" for none, or "same" for an output of the input's size.
        groups: in which input and output channels are split.
        scale: factor on every weight; a 0-d tensor where it is learnable.
        row_offset, col_offset: where V starts within a larger virtual weight.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        [batch, out_channels, out_height, out_width] in input's dtype, or in that of autocast where
        it is on; channels-last where input is.

    Raises:
        TypeError: a tensor is not floating-point, bias differs from input in dtype, or a size is
            neither an int nor two.
        ValueError: a shape, a device, a size or an offset is invalid.
        RuntimeError: the backend cannot run.
    """
    stride, dilation = ints("stride", stride, 2), ints("dilation", dilation, 2)
    kernel_size = ints("kernel_size", kernel_size, 2)
    input, is_batch = _with_batch(input, 4)
    input, padding = _pad(input, kernel_size, stride, padding, dilation)
    output = _convolve(
        input, pool, theta, bias, out_channels, (kernel_size, stride, padding, dilation, groups),
        hash_spec, reconstruction, scale, row_offset, col_offset, backend,
    )  # fmt: skip
    return output if is_batch else output.squeeze(0)


def conv1d(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    out_channels: int,
    kernel_size: int | Sequence[int],
    hash_spec: HashSpec,
    reconstruction: Reconstruction,
    scale: float | Tensor = 1.0,
    row_offset: int = 0,
    col_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """torch.nn.functional.conv1d by a virtual weight: :func:`conv2d` over images of one row.

    Args:
        input: floating [batch, in_channels, length], or without the batch.
        stride, padding, dilation, kernel_size: one int, alone or in a sequence; padding may also
            be "valid" or "same".

    Returns:
        [batch, out_channels, out_length]; all else as of :func:`conv2d`.
    """
    stride, dilation = (1, *ints("stride", stride, 1)), (1, *ints("dilation", dilation, 1))
    kernel_size = (1, *ints("kernel_size", kernel_size, 1))
    if not isinstance(padding, str):
        padding = (0, *ints("padding", padding, 1))
    input, is_batch = _with_batch(input, 3)
    input, padding = _pad(input.unsqueeze(2), kernel_size, stride, padding, dilation)
    output = _convolve(
        input, pool, theta, bias, out_channels, (kernel_size, stride, padding, dilation, groups),
        hash_spec, reconstruction, scale, row_offset, col_offset, backend,
    ).squeeze(2)  # fmt: skip
    return output if is_batch else output.squeeze(0)


def _convolve(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    out_channels: int,
    geometry: tuple[Any, ...],
    hash_spec: HashSpec,
    reconstruction: Reconstruction,
    scale: float | Tensor,
    row_offset: int,
    col_offset: int,
    backend: str,
) -> Tensor:
    require_pool_size(pool, hash_spec)
    run = _CONV2D[choose(backend, input, pool, theta, lacking="cuda")]
    if isinstance(scale, Tensor):
        require_scalar(scale)
        weight = weight_fields(hash_spec, reconstruction, 1.0, row_offset, col_offset, backend)
        output: Tensor = scale * run(input, pool, theta, None, out_channels, *geometry, *weight)
        if bias is None:
            return output
        require_bias(bias, input, out_channels)
        return output + bias.to(output.dtype).view(-1, 1, 1)
    weight = weight_fields(hash_spec, reconstruction, scale, row_offset, col_offset, backend)
    output = run(input, pool, theta, bias, out_channels, *geometry, *weight)
    return output


def ints(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` ints: the same one, or those given; else a TypeError that names the argument."""
    if isinstance(value, int):
        return (value,) * count
    try:
        values = tuple(value)
    except TypeError:
        values = ()
    if len(values) != count or not all(isinstance(item, int) for item in values):
        plural = "" if count == 1 else "s"
        raise TypeError(f"{name} must be an int or {count} int{plural}, received {value!r}")
    return values


def _with_batch(input: Tensor, dims: int) -> tuple[Tensor, bool]:
    if input.dim() == dims:
        return input, True
    if input.dim() != dims - 1:
        raise ValueError(
            f"input must have {dims} dimensions, or {dims - 1} without the batch, "
            f"received shape {list(input.shape)}"
        )
    return input.unsqueeze(0), False


def _pad(
    input: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: int | Sequence[int] | str,
    dilation: tuple[int, ...],
) -> tuple[Tensor, tuple[int, ...]]:
    """The input, and what to pad each side of it with."""
    if not isinstance(padding, str):
        return input, ints("padding", padding, 2)
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise ValueError(f"padding must be ints, 'valid' or 'same', received {padding!r}")
    if any(step != 1 for step in stride):
        raise ValueError(f"padding='same' needs a stride of 1, received {list(stride)}")
    rows, cols = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
    if rows % 2 or cols % 2:
        # The odd one goes to the end, as in PyTorch.
        input = torch.nn.functional.pad(input, (0, cols % 2, 0, rows % 2))
    return input, (rows // 2, cols // 2)
