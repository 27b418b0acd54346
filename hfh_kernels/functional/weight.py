"""The arguments that every function over a virtual weight takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hfh_kernels.dispatch import ON_GPUS
from hfh_kernels.spec import HashSpec, Reconstruction


def weight_fields(
    hash_spec: HashSpec,
    reconstruction: Reconstruction,
    scale: float,
    row_offset: int,
    col_offset: int,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """The fields of ops.library.Weight; a plain tuple, which takes a third of the time.

    ``backend`` matters to the operators where it names one of those on GPUs.
    """
    return (
        hash_spec.seed,
        hash_spec.num_hashes,
        hash_spec.block,
        hash_spec.window or 0,
        hash_spec.rows_per_window or 0,
        reconstruction.depth,
        reconstruction.width,
        reconstruction.activation,
        scale,
        row_offset,
        col_offset,
        backend if backend in ON_GPUS else "auto",
    )


def require_pool_size(pool: Tensor, hash_spec: HashSpec) -> None:
    if pool.numel() != hash_spec.pool_size:
        raise ValueError(
            f"pool must have hash_spec.pool_size={hash_spec.pool_size} elements, "
            f"received {pool.numel()}"
        )


def require_scalar(scale: Tensor) -> None:
    if scale.dim() != 0:
        raise ValueError(
            f"scale must be a float or a 0-d tensor, received shape {list(scale.shape)}"
        )
