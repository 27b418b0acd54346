"""The hash and the virtual weight themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfh_kernels import ops  # noqa: F401  (defines torch.ops.hfh)
from hfh_kernels.dispatch import choose
from hfh_kernels.functional.weight import require_pool_size, require_scalar, weight_fields
from hfh_kernels.ops.hash_index import reference as hash_index_reference
from hfh_kernels.ops.materialize import reference as materialize_reference
from hfh_kernels.spec import COORDINATES, HashSpec, Reconstruction

_HASH_INDEX: dict[str, Callable[..., Any]] = {
    "cpu": torch.ops.hfh.hash_index.default,
    "triton": torch.ops.hfh.hash_index.default,
    "reference": hash_index_reference.hash_index,
}
_MATERIALIZE: dict[str, Callable[..., Any]] = {
    "cpu": torch.ops.hfh.materialize.default,
    "cuda": torch.ops.hfh.materialize.default,
    "triton": torch.ops.hfh.materialize.default,
    "reference": materialize_reference.materialize,
}


def hash_index(
    rows: Tensor | Sequence[int],
    cols: Tensor | Sequence[int],
    spec: HashSpec,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Pool offsets and signs behind the weights at every (row, col).

    Args:
        rows: [R] integers in [0, 2**32).
        cols: [C] integers in [0, 2**32).
        spec: the hash.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        offsets int64 [R, C, num_hashes] into the pool, and signs int8 [R, C, num_hashes] of -1, 1.

    Raises:
        TypeError: rows or cols are not integers.
        ValueError: rows or cols is not 1-dimensional or is out of range.
        RuntimeError: the backend cannot run.
    """
    rows = _coordinates("rows", rows, cols)
    cols = _coordinates("cols", cols, rows)
    run = _HASH_INDEX[choose(backend, rows, cols, lacking="cuda")]
    offsets, signs = run(
        rows,
        cols,
        spec.seed,
        spec.num_hashes,
        spec.pool_size,
        spec.block,
        spec.window or 0,
        spec.rows_per_window or 0,
    )
    return offsets, signs


def materialize(
    pool: Tensor,
    theta: Tensor,
    rows: int,
    cols: int,
    *,
    hash_spec: HashSpec,
    reconstruction: Reconstruction,
    scale: float | Tensor = 1.0,
    row_offset: int = 0,
    col_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The virtual weight, differentiable in pool, theta and scale.

    Args:
        pool: floating [hash_spec.pool_size]
        theta: floating [reconstruction.num_parameters(hash_spec.num_hashes)], each layer's weight,
            row-major, followed by its bias.
        rows, cols: shape of the part that starts at (row_offset, col_offset).
        scale: factor on every weight; a 0-d tensor where it is learnable.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        [rows, cols] in pool's dtype.

    Raises:
        TypeError: a tensor is not floating-point.
        ValueError: a shape, a device, a size or an offset is invalid.
        RuntimeError: the backend cannot run.
    """
    require_pool_size(pool, hash_spec)
    run = _MATERIALIZE[choose(backend, pool, theta)]
    if isinstance(scale, Tensor):
        require_scalar(scale)
        weight = weight_fields(hash_spec, reconstruction, 1.0, row_offset, col_offset, backend)
        output: Tensor = scale * run(pool, theta, rows, cols, *weight)
        return output
    weight = weight_fields(hash_spec, reconstruction, scale, row_offset, col_offset, backend)
    output = run(pool, theta, rows, cols, *weight)
    return output


def _coordinates(name: str, values: Tensor | Sequence[int], other: object) -> Tensor:
    """Validated int64 coordinates; a sequence goes to the other argument's device."""
    if not isinstance(values, Tensor):
        device = other.device if isinstance(other, Tensor) else None
        dtype = None if len(values) else torch.int64
        try:
            values = torch.as_tensor(values, dtype=dtype, device=device)
        except (OverflowError, RuntimeError, ValueError) as error:
            raise ValueError(f"{name} must be integers in [0, 2**32): {error}") from error
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, received {values.dtype}")
    values = values.to(torch.int64)
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= COORDINATES):
        raise ValueError(
            f"{name} must be in [0, 2**32), received values from {values.min()} to {values.max()}"
        )
    return values
