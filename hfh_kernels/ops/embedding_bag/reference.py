"""``embedding_bag`` in a virtual table, in plain PyTorch: only the rows in bags are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfh_kernels.ops.embedding.reference import require_indices, table_rows
from hfh_kernels.ops.library import Weight, require_same_device

MODES = ("sum", "mean", "max")


def embedding_bag(
    indices: Tensor,
    offsets: Tensor,
    pool: Tensor,
    theta: Tensor,
    dense: Tensor | None,
    permutation: Tensor | None,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    mode: str,
    include_last_offset: bool,
    padding_idx: int,
    *weight: Any,
) -> tuple[Tensor, Tensor]:
    """Sums, means or maxima over bags of rows of the table.

    Args:
        indices: int32 or int64 [N], each in [0, num_embeddings).
        offsets: int32 or int64 [B], where each bag begins; the last ends with the indices, or,
            with include_last_offset, where the last of B + 1 offsets says.
        pool, theta, dense, permutation, num_embeddings, embedding_dim: see ``embedding``.
        per_sample_weights: [N] in pool's dtype, factors on the rows of a sum; or None.
        mode: "sum", "mean" or "max".
        padding_idx: the index that bags leave out; negative for none.
        weight: the fields of :class:`Weight`.

    Returns:
        [B, embedding_dim] in pool's dtype, zeros for empty bags; and int64 [B, embedding_dim] rows
        of the table, each maximum's first (-1 in empty bags), or [0, embedding_dim] in other modes.

    Raises:
        IndexError: an index, or what the permutation makes of it, is out of range. Compiled, a
            RuntimeError.
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, a device, the mode or a field of ``weight`` is invalid.
    """
    require_bags(indices, offsets, pool, per_sample_weights, mode, include_last_offset)
    require_offsets(offsets, indices.shape[0])
    rows = table_rows(
        indices, pool, theta, dense, permutation, num_embeddings, embedding_dim, padding_idx,
        Weight(*weight),
    )  # fmt: skip
    starts = offsets
    if not include_last_offset:
        starts = torch.cat((offsets, offsets.new_full((1,), indices.shape[0])))
    num_bags = starts.shape[0] - 1
    # Entries of no bag, padding among them, go to one behind the last, which is then dropped.
    entries = torch.arange(indices.shape[0], device=indices.device)
    bags = torch.searchsorted(starts.to(torch.int64), entries, right=True) - 1
    outside = bags < 0
    if padding_idx >= 0:
        outside = outside | (indices == padding_idx)
    bags = bags.masked_fill(outside, num_bags)
    no_winners = indices.new_empty((0, embedding_dim), dtype=torch.int64)
    if mode == "max":
        ranks = indices.to(torch.int64) if permutation is None else permutation[indices]
        output, winners = _max(rows, bags, num_bags, ranks)
        return output.to(pool.dtype), winners
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None].to(rows.dtype)
    sums = rows.new_zeros((num_bags + 1, embedding_dim)).index_add(0, bags, rows)[:-1]
    if mode == "mean":
        ones = torch.ones_like(bags, dtype=rows.dtype)
        counts = rows.new_zeros(num_bags + 1).index_add(0, bags, ones)[:-1]
        sums = sums / counts.clamp(min=1)[:, None]
    return sums.to(pool.dtype), no_winners


def _max(rows: Tensor, bags: Tensor, num_bags: int, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima, and the rank of the first row that has each."""
    num_entries, cols = rows.shape
    shape = (num_bags + 1, cols)
    every_bag = bags[:, None].expand(-1, cols)
    values = rows.detach()
    best = values.new_full(shape, -torch.inf).scatter_reduce(0, every_bag, values, "amax")
    entries = torch.arange(num_entries, device=rows.device)[:, None].expand(-1, cols)
    candidates = torch.where(values == best.gather(0, every_bag), entries, num_entries)
    first = torch.full(shape, num_entries, device=rows.device, dtype=torch.int64)
    first = first.scatter_reduce(0, every_bag, candidates, "amin")[:-1]
    # A row behind the last stands for that of an empty bag.
    output = torch.cat((rows, rows.new_zeros((1, cols)))).gather(0, first)
    return output, torch.cat((ranks, ranks.new_full((1,), -1)))[first]


def embedding_bag_backward(
    grad: Tensor,
    winners: Tensor,
    indices: Tensor,
    offsets: Tensor,
    pool: Tensor,
    theta: Tensor,
    dense: Tensor | None,
    permutation: Tensor | None,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    mode: str,
    include_last_offset: bool,
    padding_idx: int,
    *weight: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of pool, theta, dense ([0, dim] without) and per_sample_weights ([0] without)."""
    given = pool.new_empty((0, grad.shape[1])) if dense is None else dense
    has_factors = per_sample_weights is not None
    factors = pool.new_empty(0) if per_sample_weights is None else per_sample_weights

    def forward(pool: Tensor, theta: Tensor, dense: Tensor, factors: Tensor) -> Tensor:
        return embedding_bag(
            indices, offsets, pool, theta, dense, permutation, factors if has_factors else None,
            num_embeddings, grad.shape[1], mode, include_last_offset, padding_idx, *weight,
        )[0]  # fmt: skip

    vjp = torch.func.vjp(forward, pool, theta, given, factors)[1]
    grad_pool, grad_theta, grad_dense, grad_factors = vjp(grad)
    return grad_pool, grad_theta, grad_dense, grad_factors


def require_bags(
    indices: Tensor,
    offsets: Tensor,
    pool: Tensor,
    per_sample_weights: Tensor | None,
    mode: str,
    include_last_offset: bool,
) -> None:
    """Raise unless the arguments fit each other, as far as can be told without reading a tensor."""
    if mode not in MODES:
        raise ValueError(f"mode must be 'sum', 'mean' or 'max', received {mode!r}")
    for name, tensor in (("indices", indices), ("offsets", offsets)):
        if tensor.dim() != 1:
            raise ValueError(f"{name} must be 1-d, received shape {list(tensor.shape)}")
        require_indices(name, tensor)
    require_same_device("offsets", offsets, "indices", indices)
    if include_last_offset and offsets.shape[0] == 0:
        raise ValueError("offsets must not be empty with include_last_offset")
    if per_sample_weights is None:
        return
    require_same_device("per_sample_weights", per_sample_weights, "indices", indices)
    if mode != "sum":
        raise ValueError("per_sample_weights must be None unless mode is 'sum'")
    if per_sample_weights.shape != indices.shape:
        raise ValueError(
            f"per_sample_weights must have the shape of indices {list(indices.shape)}, "
            f"received {list(per_sample_weights.shape)}"
        )
    if per_sample_weights.dtype != pool.dtype:
        raise TypeError(
            f"per_sample_weights must have pool's dtype {pool.dtype}, "
            f"received {per_sample_weights.dtype}"
        )


def require_offsets(offsets: Tensor, num_indices: int) -> None:
    """As far as their values can be seen: neither on meta nor while compiling."""
    if offsets.is_meta or torch.compiler.is_compiling() or offsets.shape[0] == 0:
        return
    steps_back = bool((offsets.diff() < 0).any())
    if int(offsets[0]) != 0 or steps_back or int(offsets[-1]) > num_indices:
        raise ValueError(
            f"offsets must start at 0, not decrease and not exceed the {num_indices} indices; "
            f"received {offsets.tolist()}"
        )
