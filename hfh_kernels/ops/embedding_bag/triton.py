"""``embedding_bag`` in Triton: rows of the table are made and added up in registers.

Indices out of range are treated as in ``embedding``, and so are offsets that do not begin at 0, go
back or pass the indices' end: an assertion on a GPU, a ValueError in the interpreter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfh_kernels.ops import tuning
from hfh_kernels.ops.embedding.triton import (
    ASSERTIONS,
    TableGradients,
    assert_all,
    column_tile,
    look_up,
    narrowed,
    no_gradients,
    table_and_weight,
    table_tile,
    table_tile_backward,
)
from hfh_kernels.ops.embedding_bag.reference import require_bags, require_offsets
from hfh_kernels.ops.launch import lead, on_device, require_inputs
from hfh_kernels.ops.library import require_same_device
from hfh_kernels.ops.tile import first_col, hash_rows, load_theta, logical_rows
from hfh_kernels.ops.tile_gradients import add_gradient, virtual_elements_backward
from hfh_kernels.ops.tuning import Device, Tiles


class Bags(NamedTuple):
    """Which entries are in which bag, as a kernel receives it; upper-case fields are constants."""

    offsets: Any
    """int32 or int64 [num_bags], or [num_bags + 1] with HAS_LAST."""
    factors: Any
    """Of the entries, [num_entries]."""
    num_bags: Any
    num_entries: Any
    HAS_LAST: Any
    WEIGHTED: Any


@triton.jit
def _range_of(bags, bag):
    """Where bags [N] begin and end, int64 [N]; those behind the last are empty."""
    inside = bag < bags.num_bags
    begins = tl.load(bags.offsets + bag, mask=inside, other=0).to(tl.int64)
    has_next = inside if bags.HAS_LAST else bag + 1 < bags.num_bags
    ends = tl.load(bags.offsets + bag + 1, mask=has_next, other=0).to(tl.int64)
    ends = tl.where(has_next, ends, bags.num_entries)
    assert_all(
        ((begins <= ends) & (ends <= bags.num_entries) & ((bag > 0) | (begins == 0))) | ~inside,
        "offsets must start at 0, not decrease and not exceed the number of indices",
    )
    begins = tl.maximum(begins, 0)
    return begins, tl.where(inside, tl.minimum(ends, bags.num_entries), begins)


@triton.jit
def _bag_of(bags, entries):
    """The bags that hold entries, int64 [N], and which entries are in one."""
    # How many bags begin at the entry or before: the last of them holds it, if it ends behind it.
    count = tl.zeros_like(entries)
    step = tl.full((), 1, tl.int64)
    while step <= bags.num_bags // 2:
        step *= 2
    while step > 0:
        further = count + step
        exists = further <= bags.num_bags
        begins = tl.load(bags.offsets + further - 1, mask=exists, other=0)
        count = tl.where(exists & (begins <= entries), further, count)
        step //= 2
    end = bags.num_entries
    if bags.HAS_LAST:
        end = tl.minimum(tl.load(bags.offsets + bags.num_bags).to(tl.int64), bags.num_entries)
    return count - 1, (count > 0) & (entries < end)


@triton.jit
def _embedding_bag_fwd_kernel(
    table, bags, weight, output, winners, cols, lead,
    MODE: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """output [num_bags, cols], and for the mode "max" the rows of the table that won each."""
    num_k = tl.cdiv(cols + lead, TILE_K)
    bag = (tl.program_id(0) // num_k).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    start = (tl.program_id(0) % num_k) * TILE_K - lead
    k, inside_k = column_tile(start, cols, TILE_K)
    theta = load_theta(weight)
    begins, ends = _range_of(bags, bag)
    total = tl.zeros((TILE_N, TILE_K), tl.float32)
    winner = tl.full((TILE_N, TILE_K), -1, tl.int64)
    count = tl.zeros((TILE_N,), tl.float32)
    for i in range(tl.max(ends - begins)):
        entries = begins + i
        ranks, kept = look_up(table, entries, entries < ends)
        rows = table_tile(table, weight, theta, ranks, kept, start, cols, TILE_K)
        if MODE == "max":
            wins = kept[:, None] & ((rows > total) | (winner < 0))
            total = tl.where(wins, rows, total)
            winner = tl.where(wins, ranks[:, None], winner)
        else:
            if bags.WEIGHTED:
                factors = tl.load(bags.factors + entries, mask=kept, other=0.0)
                rows *= factors.to(tl.float32)[:, None]
            total += rows
            count += kept.to(tl.float32)
    if MODE == "mean":
        total /= tl.maximum(count, 1.0)[:, None]
    inside = (bag < bags.num_bags)[:, None] & inside_k[None, :]
    positions = bag[:, None] * cols + k[None, :]
    tl.store(output + positions, total, mask=inside)
    if MODE == "max":
        tl.store(winners + positions, winner, mask=inside)


@triton.jit
def _embedding_bag_bwd_kernel(
    grad, table, bags, counts, weight, gradients, dense_gradient, grad_factors, cols, lead,
    MODE: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients, given that of sums or means, grad [num_bags, cols].

    counts [num_bags] is what means divide by; grad_factors [num_entries] is written.
    """
    num_n, num_k = tl.cdiv(bags.num_entries, TILE_N), tl.cdiv(cols + lead, TILE_K)
    # A factor's gradient is a sum over all columns.
    parts = 1 if bags.WEIGHTED else num_k
    theta = load_theta(weight)
    for tile in range(tl.program_id(0), num_n * parts, tl.num_programs(0)):
        entries = tl.cast(tile // parts, tl.int64) * TILE_N + tl.arange(0, TILE_N)
        inside_n = entries < bags.num_entries
        bag, in_bag = _bag_of(bags, entries)
        ranks, kept = look_up(table, entries, inside_n & in_bag)
        factors = tl.full((TILE_N,), 1.0, tl.float32)
        if bags.WEIGHTED:
            factors = tl.load(bags.factors + entries, mask=kept, other=0.0).to(tl.float32)
        if MODE == "mean":
            factors /= tl.load(counts + bag, mask=kept, other=1.0).to(tl.float32)
        grad_factor = tl.zeros((TILE_N,), tl.float32)
        for tile_k in range(tile % parts, num_k, parts):
            start = tile_k * TILE_K - lead
            k, inside_k = column_tile(start, cols, TILE_K)
            inside = kept[:, None] & inside_k[None, :]
            g = tl.load(grad + bag[:, None] * cols + k[None, :], mask=inside, other=0.0)
            g = g.to(tl.float32)
            rows = table_tile_backward(
                table, weight, theta, gradients, dense_gradient, ranks, kept, start, cols, TILE_K,
                g * factors[:, None],
            )  # fmt: skip
            if bags.WEIGHTED:
                grad_factor += tl.sum(rows * g, 1)
        if bags.WEIGHTED:
            tl.store(grad_factors + entries, grad_factor, mask=inside_n)


@triton.jit
def _embedding_bag_bwd_max_kernel(
    grad, winners, table, weight, gradients, dense_gradient, num_bags, cols,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients, given that of maxima, grad [num_bags, cols], and their rows."""
    num_k = tl.cdiv(cols, TILE_K)
    theta = load_theta(weight)
    for tile in range(tl.program_id(0), tl.cdiv(num_bags, TILE_N) * num_k, tl.num_programs(0)):
        bag = (tile // num_k).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
        start = (tile % num_k) * TILE_K
        k, inside_k = column_tile(start, cols, TILE_K)
        inside = (bag < num_bags)[:, None] & inside_k[None, :]
        positions = bag[:, None] * cols + k[None, :]
        ranks = tl.load(winners + positions, mask=inside, other=-1)
        kept = ranks >= 0
        g = tl.load(grad + positions, mask=kept, other=0.0).to(tl.float32)
        if table.HAS_DENSE:
            is_dense = kept & (ranks < table.num_dense)
            add_gradient(
                dense_gradient.total + ranks * cols + k[None, :], g, is_dense,
                dense_gradient.units, gradients.FIXED_POINT,
            )  # fmt: skip
            kept &= ~is_dense
        keys, bases = hash_rows(weight, logical_rows(weight, ranks))
        virtual_elements_backward(
            weight, theta, gradients, keys, bases, first_col(weight, start),
            tl.where(kept, g, 0.0), kept,
        )  # fmt: skip


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
    """See the reference; for what is out of range, the module."""
    bags = _bags(indices, offsets, pool, per_sample_weights, mode, include_last_offset)
    table, virtual = table_and_weight(
        indices, pool, theta, dense, permutation, num_embeddings, embedding_dim, padding_idx, weight
    )
    output = pool.new_empty((bags.num_bags, embedding_dim))
    winners = indices.new_empty(
        (bags.num_bags if mode == "max" else 0, embedding_dim), dtype=torch.int64
    )

    def launch(tiles: Tiles, device: Device) -> tuple[Tensor, Tensor]:
        tiles = narrowed(tiles, virtual, embedding_dim)
        start = lead(virtual, tiles.k)
        programs = triton.cdiv(bags.num_bags, tiles.n) * triton.cdiv(embedding_dim + start, tiles.k)
        with on_device(pool):
            _embedding_bag_fwd_kernel[(programs,)](
                table, bags, virtual, output, winners, embedding_dim, start,
                MODE=mode, TILE_N=tiles.n, TILE_K=tiles.k,
                **tiles.options, **ASSERTIONS,
            )  # fmt: skip
        return output, winners

    if output.numel() == 0:
        return output, winners
    return tuning.run("embedding_bag", 0, virtual, pool, launch)


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
    """See the reference."""
    require_inputs(grad=grad, pool=pool, theta=theta)
    bags = _bags(indices, offsets, pool, per_sample_weights, mode, include_last_offset)
    if grad.dim() != 2 or grad.shape[0] != bags.num_bags:
        raise ValueError(
            f"grad must have shape [{bags.num_bags}, columns], received {list(grad.shape)}"
        )
    cols = grad.shape[1]
    table, virtual = table_and_weight(
        indices, pool, theta, dense, permutation, num_embeddings, cols, padding_idx, weight
    )
    grad = grad.contiguous()
    grad_factors = pool.new_zeros(0 if per_sample_weights is None else indices.shape[0])
    if mode == "max":
        _require_winners(winners, grad)
        winners = winners.contiguous()

    def bound() -> Tensor:
        largest = grad.float().abs().max()
        if per_sample_weights is None:
            return largest
        return largest * per_sample_weights.float().abs().max()

    def launch_max(tiles: Tiles, device: Device) -> tuple[Tensor, Tensor, Tensor]:
        tiles = narrowed(tiles, virtual, cols)
        num_tiles = triton.cdiv(bags.num_bags, tiles.n) * triton.cdiv(cols, tiles.k)
        programs = tuning.num_programs(num_tiles, device)
        sums = TableGradients(virtual, dense, programs, bags.num_bags, cols, bound)
        with on_device(pool):
            _embedding_bag_bwd_max_kernel[(programs,)](
                grad, winners, table, virtual, *sums.arguments(), bags.num_bags, cols,
                TILE_N=tiles.n, TILE_K=tiles.k, **tiles.options,
            )  # fmt: skip
        return sums.results()

    def launch(tiles: Tiles, device: Device) -> tuple[Tensor, Tensor, Tensor]:
        tiles = narrowed(tiles, virtual, cols)
        start = lead(virtual, tiles.k)
        num_tiles = triton.cdiv(bags.num_entries, tiles.n)
        if per_sample_weights is None:
            num_tiles *= triton.cdiv(cols + start, tiles.k)
        programs = tuning.num_programs(num_tiles, device)
        sums = TableGradients(virtual, dense, programs, bags.num_entries, cols, bound)
        counts = grad
        if mode == "mean":
            counts = _counts(indices, offsets, include_last_offset, padding_idx)
        with on_device(pool):
            _embedding_bag_bwd_kernel[(programs,)](
                grad, table, bags, counts, virtual, *sums.arguments(), grad_factors, cols, start,
                MODE=mode, TILE_N=tiles.n, TILE_K=tiles.k,
                **tiles.options, **ASSERTIONS,
            )  # fmt: skip
        return sums.results()

    if grad.numel() == 0 or indices.numel() == 0:
        return *no_gradients(pool, theta, dense, cols), grad_factors
    if mode == "max":
        results = tuning.run("embedding_bag_backward_max", 0, virtual, pool, launch_max)
    else:
        results = tuning.run("embedding_bag_backward", 0, virtual, pool, launch)
    return *results, grad_factors


def _bags(
    indices: Tensor,
    offsets: Tensor,
    pool: Tensor,
    per_sample_weights: Tensor | None,
    mode: str,
    include_last_offset: bool,
) -> Bags:
    require_bags(indices, offsets, pool, per_sample_weights, mode, include_last_offset)
    if offsets.is_cpu:
        require_offsets(offsets, indices.shape[0])
    return Bags(
        offsets.contiguous(),
        pool if per_sample_weights is None else per_sample_weights.contiguous(),
        offsets.shape[0] - include_last_offset,
        indices.shape[0],
        tl.constexpr(include_last_offset),
        tl.constexpr(per_sample_weights is not None),
    )


def _counts(
    indices: Tensor, offsets: Tensor, include_last_offset: bool, padding_idx: int
) -> Tensor:
    """How many entries of each bag are no padding, int64 [num_bags]."""
    if not include_last_offset:
        offsets = torch.cat((offsets, offsets.new_full((1,), indices.shape[0])))
    if padding_idx < 0:
        return offsets.diff().long()
    used = torch.nn.functional.pad((indices != padding_idx).cumsum(0), (1, 0))
    return used[offsets.long()].diff()


def _require_winners(winners: Tensor, grad: Tensor) -> None:
    require_same_device("winners", winners, "grad", grad)
    if winners.shape != grad.shape or winners.dtype != torch.int64:
        raise ValueError(
            f"winners must be int64 of grad's shape {list(grad.shape)}, "
            f"received {winners.dtype} {list(winners.shape)}"
        )
