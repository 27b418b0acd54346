"""``embedding`` in a virtual table, in plain PyTorch: only the rows looked up are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfh_kernels.ops.library import Weight, require_same_device
from hfh_kernels.ops.materialize.reference import virtual_rows


def embedding(
    indices: Tensor,
    pool: Tensor,
    theta: Tensor,
    dense: Tensor | None,
    permutation: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    padding_idx: int,
    *weight: Any,
) -> Tensor:
    """Rows of the table by index.

    Row r of the table is ``dense[r]`` where dense has it, else row r of the virtual weight.

    Args:
        indices: int32 or int64 [...], each in [0, num_embeddings).
        pool: floating [pool_size]
        theta: floating [num_parameters]
        dense: [at most num_embeddings, embedding_dim] in pool's dtype, or None.
        permutation: int64 [num_embeddings], the row that each index stands for; None for itself.
        num_embeddings, embedding_dim: shape of the table.
        padding_idx: the index whose row is zeros; negative for none.
        weight: the fields of :class:`Weight`.

    Returns:
        [..., embedding_dim] in pool's dtype.

    Raises:
        IndexError: an index, or what the permutation makes of it, is out of range. Compiled, a
            RuntimeError.
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, a device or a field of ``weight`` is invalid.
    """
    rows = table_rows(
        indices.reshape(-1), pool, theta, dense, permutation, num_embeddings, embedding_dim,
        padding_idx, Weight(*weight),
    )  # fmt: skip
    padding = (indices.reshape(-1) == padding_idx)[:, None] & (padding_idx >= 0)
    rows = rows.masked_fill(padding, 0).to(pool.dtype)
    return rows.view(*indices.shape, embedding_dim)


def embedding_backward(
    grad: Tensor,
    indices: Tensor,
    pool: Tensor,
    theta: Tensor,
    dense: Tensor | None,
    permutation: Tensor | None,
    num_embeddings: int,
    padding_idx: int,
    *weight: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pool, theta and dense ([0, embedding_dim] without), from grad [..., dim]."""
    given = pool.new_empty((0, grad.shape[-1])) if dense is None else dense

    def forward(pool: Tensor, theta: Tensor, dense: Tensor) -> Tensor:
        return embedding(
            indices, pool, theta, dense, permutation, num_embeddings, grad.shape[-1],
            padding_idx, *weight,
        )  # fmt: skip

    vjp = torch.func.vjp(forward, pool, theta, given)[1]
    grad_pool, grad_theta, grad_dense = vjp(grad)
    return grad_pool, grad_theta, grad_dense


def table_rows(
    indices: Tensor,
    pool: Tensor,
    theta: Tensor,
    dense: Tensor | None,
    permutation: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    padding_idx: int,
    weight: Weight,
) -> Tensor:
    """Rows of the table for indices [N], before they are rounded to pool's dtype."""
    require_table(
        indices, pool, dense, permutation, num_embeddings, embedding_dim, padding_idx, weight
    )
    ranks = ranks_of(indices, permutation, num_embeddings)
    rows = virtual_rows(pool, theta, ranks, embedding_dim, weight)
    if dense is None or dense.shape[0] == 0:
        return rows
    num_dense = dense.shape[0]
    dense_rows = dense[ranks.clamp(max=num_dense - 1)].to(rows.dtype)
    return torch.where((ranks < num_dense)[:, None], dense_rows, rows)


def ranks_of(indices: Tensor, permutation: Tensor | None, num_embeddings: int) -> Tensor:
    """The rows that indices stand for, int64, in the table: an IndexError where they are not."""
    ranks = indices.to(torch.int64)
    _require_in_range("indices", ranks, num_embeddings)
    if permutation is not None:
        ranks = permutation[ranks]
        _require_in_range("permutation", ranks, num_embeddings)
    return ranks


def require_table(
    indices: Tensor,
    pool: Tensor,
    dense: Tensor | None,
    permutation: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    padding_idx: int,
    weight: Weight,
) -> None:
    """Raise unless the arguments fit each other, as far as can be told without reading a tensor."""
    require_indices("indices", indices)
    require_same_device("indices", indices, "pool", pool)
    for name, size in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
        if size < 0:
            raise ValueError(f"{name} must not be negative, received {size}")
    weight.require_coordinates(num_embeddings, embedding_dim)
    if padding_idx >= num_embeddings:
        raise ValueError(
            f"padding_idx must be below num_embeddings={num_embeddings}, received {padding_idx}"
        )
    if permutation is not None:
        _require_permutation(permutation, num_embeddings, pool)
    if dense is not None:
        _require_dense(dense, pool, num_embeddings, embedding_dim)


def require_indices(name: str, indices: Tensor) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, received {indices.dtype}")


def _require_in_range(name: str, values: Tensor, num_embeddings: int) -> None:
    if values.is_meta:
        return
    outside = (values < 0) | (values >= num_embeddings)
    if torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"{name} must be in [0, {num_embeddings})")
    elif outside.any():
        raise IndexError(
            f"{name} must be in [0, num_embeddings={num_embeddings}), "
            f"received {int(values[outside][0])}"
        )


def _require_permutation(permutation: Tensor, num_embeddings: int, pool: Tensor) -> None:
    require_same_device("permutation", permutation, "pool", pool)
    if permutation.dtype != torch.int64:
        raise TypeError(f"permutation must be int64, received {permutation.dtype}")
    if permutation.shape != (num_embeddings,):
        raise ValueError(
            f"permutation must have shape [{num_embeddings}], received {list(permutation.shape)}"
        )


def _require_dense(dense: Tensor, pool: Tensor, num_embeddings: int, embedding_dim: int) -> None:
    require_same_device("dense", dense, "pool", pool)
    if dense.dtype != pool.dtype:
        raise TypeError(f"dense must have pool's dtype {pool.dtype}, received {dense.dtype}")
    shape = list(dense.shape)
    if dense.dim() != 2 or shape[0] > num_embeddings or shape[1] != embedding_dim:
        raise ValueError(
            f"dense must have shape [at most num_embeddings={num_embeddings}, "
            f"embedding_dim={embedding_dim}], received {shape}"
        )
