"""The virtual weight in plain PyTorch: hash, gather, sign, reconstruct.

Any floating dtype, any device, any number of derivatives.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from hfh_kernels.ops.hash_index.reference import slots_of
from hfh_kernels.ops.library import Weight, require_same_device
from hfh_kernels.spec import Reconstruction


def materialize(pool: Tensor, theta: Tensor, rows: int, cols: int, *weight: Any) -> Tensor:
    """The virtual weight, V = scale * g(a).

    Args:
        pool: floating [pool_size]
        theta: floating [num_parameters], g's parameters, see :func:`split_theta`.
        rows, cols: shape of the part that starts at (row_offset, col_offset).
        weight: the fields of :class:`Weight`.

    Returns:
        [rows, cols] in pool's dtype.

    Raises:
        TypeError: pool or theta is not floating-point.
        ValueError: a shape, a device or a field of ``weight`` is invalid.
    """
    return virtual_weight(pool, theta, rows, cols, Weight(*weight)).to(pool.dtype)


def materialize_backward(
    grad: Tensor, pool: Tensor, theta: Tensor, *weight: Any
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to pool and theta, from grad [rows, cols] of :func:`materialize`."""

    def forward(pool: Tensor, theta: Tensor) -> Tensor:
        return materialize(pool, theta, *grad.shape, *weight)

    vjp = torch.func.vjp(forward, pool, theta)[1]
    grad_pool, grad_theta = vjp(grad)
    return grad_pool, grad_theta


def virtual_weight(pool: Tensor, theta: Tensor, rows: int, cols: int, weight: Weight) -> Tensor:
    """:func:`materialize` before the result is rounded to the pool's dtype."""
    weight.require_coordinates(rows, cols)
    every_row = torch.arange(rows, device=pool.device)
    return virtual_rows(pool, theta, every_row, cols, weight)


def virtual_rows(pool: Tensor, theta: Tensor, rows: Tensor, cols: int, weight: Weight) -> Tensor:
    """Some rows of :func:`virtual_weight`: rows int64 [R], as [R, cols]."""
    spec = weight.hash_spec(pool.numel())
    reconstruction = weight.reconstruction()
    require_parameters(pool, theta, reconstruction, spec.num_hashes)

    dtype = torch.promote_types(pool.dtype, theta.dtype)
    if dtype.itemsize < torch.float32.itemsize:
        dtype = torch.float32
    first_block, first_col = divmod(weight.col_offset, spec.block)
    last_block = -(-(weight.col_offset + cols) // spec.block)
    slots, negative = slots_of(
        rows + weight.row_offset,
        torch.arange(first_block, last_block, device=pool.device),
        spec,
    )
    blocks = torch.nn.functional.embedding(slots, pool.to(dtype).reshape(-1, spec.block))
    signed = torch.where(negative[..., None], -blocks, blocks).flatten(2)
    elements = signed[:, :, first_col : first_col + cols].reshape(spec.num_hashes, -1)
    with _no_autocast(pool.device):
        values = reconstruct(elements, theta.to(dtype), reconstruction)
    return weight.scale * values.view(rows.shape[0], cols)


def reconstruct(elements: Tensor, theta: Tensor, reconstruction: Reconstruction) -> Tensor:
    """g of every column of elements [num_hashes, N], as [N]."""
    activation = torch.relu if reconstruction.activation == "relu" else torch.tanh
    values = elements
    for layer, (weight, bias) in enumerate(split_theta(theta, len(elements), reconstruction)):
        if layer > 0:
            values = activation(values)
        values = weight @ values
        if bias is not None:
            values = values + bias[:, None]
    return values[0]


def split_theta(
    theta: Tensor, num_hashes: int, reconstruction: Reconstruction
) -> list[tuple[Tensor, Tensor | None]]:
    """Views of theta: each layer's weight [outputs, inputs] and its bias [outputs] or None."""
    layers: list[tuple[Tensor, Tensor | None]] = []
    start = 0
    for outputs, inputs in reconstruction.layer_shapes(num_hashes):
        weight = theta[start : start + outputs * inputs].view(outputs, inputs)
        start += outputs * inputs
        bias = None
        if reconstruction.depth > 1:
            bias = theta[start : start + outputs]
            start += outputs
        layers.append((weight, bias))
    return layers


def require_parameters(
    pool: Tensor, theta: Tensor, reconstruction: Reconstruction, num_hashes: int
) -> None:
    for name, tensor in (("pool", pool), ("theta", theta)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, received {tensor.dtype}")
    if pool.dim() != 1:
        raise ValueError(f"pool must be 1-d, received shape {list(pool.shape)}")
    if theta.shape != (reconstruction.num_parameters(num_hashes),):
        raise ValueError(
            f"theta must have shape [{reconstruction.num_parameters(num_hashes)}] for "
            f"num_hashes={num_hashes} and {reconstruction}, received shape {list(theta.shape)}"
        )
    require_same_device("theta", theta, "pool", pool)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """g is computed in its own precision, whatever precision autocast gives the matmul."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
