"""``embedding`` in Triton: rows of the table are made as they are looked up.

On a GPU nobody waits to see whether an index is out of range: there it fails an assertion in the
kernel, as in torch's own embedding, and a later call raises. Nothing is read where it points. The
interpreter's tensors are looked at before the launch, and the error is an IndexError.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfh_kernels import _triton
from hfh_kernels.ops import tuning
from hfh_kernels.ops.embedding.reference import ranks_of, require_table
from hfh_kernels.ops.launch import (
    GradientSums,
    Sum,
    lead,
    on_device,
    require_inputs,
    virtual_weight,
)
from hfh_kernels.ops.library import Weight
from hfh_kernels.ops.tile import (
    VirtualWeight,
    first_col,
    hash_rows,
    load_theta,
    logical_rows,
    virtual_tile,
)
from hfh_kernels.ops.tile_gradients import Gradients, add_gradient, virtual_tile_backward
from hfh_kernels.ops.tuning import Device, Tiles

_INTERPRETED = tl.constexpr(_triton.interpreted())

ASSERTIONS = {"debug": True, "sanitize_overflow": False}
"""Options of a launch whose kernel asserts: what it says, and not that integers never overflow."""


class Table(NamedTuple):
    """A table and what is looked up in it, as a kernel receives them.

    The upper-case fields are constants.
    """

    indices: Any
    """int32 or int64 [entries]"""
    permutation: Any
    """int64 [num_embeddings]"""
    dense: Any
    """[num_dense, columns]"""
    num_embeddings: Any
    num_dense: Any
    padding_idx: Any
    PERMUTED: Any
    HAS_DENSE: Any


class DenseGradient(NamedTuple):
    """Where kernels add up that of the dense rows; see Gradients."""

    total: Any
    """float32 [num_dense, columns], or int64 where that of the pool is."""
    units: Any


@triton.jit
def assert_all(condition, message: tl.constexpr):
    """The interpreter asserts no tensors; its launchers have looked already."""
    if not _INTERPRETED:
        tl.device_assert(condition, message)


@triton.jit
def look_up(table, entries, inside):
    """What entries [N] stand for.

    Returns:
        Rows of the table, int64 [N], and which entries have one: those inside that are no padding.
    """
    ranks = tl.load(table.indices + entries, mask=inside, other=0).to(tl.int64)
    is_row = (ranks >= 0) & (ranks < table.num_embeddings)
    assert_all(is_row | ~inside, "indices must be in [0, num_embeddings)")
    kept = inside & is_row & (ranks != table.padding_idx)
    if table.PERMUTED:
        ranks = tl.load(table.permutation + ranks, mask=kept, other=0)
        is_row = (ranks >= 0) & (ranks < table.num_embeddings)
        assert_all(is_row | ~kept, "permutation must be in [0, num_embeddings)")
        kept &= is_row
    return ranks, kept


@triton.jit
def column_tile(start, cols, TILE_K: tl.constexpr):
    """The columns from start on, int32 [TILE_K], and which of them there are."""
    k = start + tl.arange(0, TILE_K)
    return k, (k >= 0) & (k < cols)


@triton.jit
def _with_dense(table, virtual, ranks, kept, start, cols, TILE_K: tl.constexpr):
    """Rows of the table, where those of the virtual weight are known; zeros where not kept."""
    rows = virtual
    if table.HAS_DENSE:
        is_dense = (kept & (ranks < table.num_dense))[:, None]
        k, inside_k = column_tile(start, cols, TILE_K)
        positions = ranks[:, None] * cols + k[None, :]
        dense = tl.load(table.dense + positions, mask=is_dense & inside_k[None, :], other=0.0)
        rows = tl.where(is_dense, dense.to(tl.float32), rows)
    return tl.where(kept[:, None], rows, 0.0)


@triton.jit
def table_tile(table, weight, theta, ranks, kept, start, cols, TILE_K: tl.constexpr):
    """Rows of the table at the columns from start on, float32 [N, TILE_K]; zeros where not kept."""
    keys, bases = hash_rows(weight, logical_rows(weight, ranks))
    virtual = virtual_tile(weight, theta, keys, bases, first_col(weight, start), TILE_K)
    return _with_dense(table, virtual, ranks, kept, start, cols, TILE_K)


@triton.jit
def table_tile_backward(
    table, weight, theta, gradients, dense_gradient, ranks, kept, start, cols,
    TILE_K: tl.constexpr, grad,
):  # fmt: skip
    """Adds to the gradients, given that of table_tile, zeros at columns that there are not.

    Returns what table_tile does; it costs nothing where it is not used.
    """
    is_virtual = kept
    if table.HAS_DENSE:
        is_virtual = kept & (ranks >= table.num_dense)
        is_dense = (kept & (ranks < table.num_dense))[:, None]
        k, inside_k = column_tile(start, cols, TILE_K)
        add_gradient(
            dense_gradient.total + ranks[:, None] * cols + k[None, :], grad,
            is_dense & inside_k[None, :], dense_gradient.units, gradients.FIXED_POINT,
        )  # fmt: skip
    keys, bases = hash_rows(weight, logical_rows(weight, ranks))
    virtual = virtual_tile_backward(
        weight, theta, gradients, keys, bases, first_col(weight, start), TILE_K,
        tl.where(is_virtual[:, None], grad, 0.0), is_virtual,
    )  # fmt: skip
    return _with_dense(table, virtual, ranks, kept, start, cols, TILE_K)


@triton.jit
def _embedding_fwd_kernel(
    table, weight, output, num_entries, cols, lead, TILE_N: tl.constexpr, TILE_K: tl.constexpr
):
    """output [num_entries, cols]"""
    num_k = tl.cdiv(cols + lead, TILE_K)
    n = (tl.program_id(0) // num_k).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    start = (tl.program_id(0) % num_k) * TILE_K - lead
    k, inside_k = column_tile(start, cols, TILE_K)
    inside = n < num_entries
    ranks, kept = look_up(table, n, inside)
    theta = load_theta(weight)
    rows = table_tile(table, weight, theta, ranks, kept, start, cols, TILE_K)
    tl.store(
        output + n[:, None] * cols + k[None, :], rows, mask=inside[:, None] & inside_k[None, :]
    )


@triton.jit
def _embedding_bwd_kernel(
    grad, table, weight, gradients, dense_gradient, num_entries, cols, lead,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients, given that of the output, grad [num_entries, cols]."""
    num_k = tl.cdiv(cols + lead, TILE_K)
    theta = load_theta(weight)
    for tile in range(tl.program_id(0), tl.cdiv(num_entries, TILE_N) * num_k, tl.num_programs(0)):
        n = (tile // num_k).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
        start = (tile % num_k) * TILE_K - lead
        k, inside_k = column_tile(start, cols, TILE_K)
        ranks, kept = look_up(table, n, n < num_entries)
        inside = kept[:, None] & inside_k[None, :]
        g = tl.load(grad + n[:, None] * cols + k[None, :], mask=inside, other=0.0)
        table_tile_backward(
            table, weight, theta, gradients, dense_gradient, ranks, kept, start, cols, TILE_K,
            g.to(tl.float32),
        )  # fmt: skip


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
    """See the reference; for an index out of range, the module."""
    table, virtual = table_and_weight(
        indices, pool, theta, dense, permutation, num_embeddings, embedding_dim, padding_idx, weight
    )
    output = pool.new_empty((*indices.shape, embedding_dim))
    num_entries = indices.numel()

    def launch(tiles: Tiles, device: Device) -> Tensor:
        tiles = narrowed(tiles, virtual, embedding_dim)
        start = lead(virtual, tiles.k)
        programs = triton.cdiv(num_entries, tiles.n) * triton.cdiv(embedding_dim + start, tiles.k)
        with on_device(pool):
            _embedding_fwd_kernel[(programs,)](
                table, virtual, output, num_entries, embedding_dim, start,
                TILE_N=tiles.n, TILE_K=tiles.k,
                **tiles.options, **ASSERTIONS,
            )  # fmt: skip
        return output

    if output.numel() == 0:
        return output
    return tuning.run("embedding", 0, virtual, pool, launch)


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
    """See the reference."""
    require_inputs(grad=grad, pool=pool, theta=theta)
    cols = grad.shape[-1]
    table, virtual = table_and_weight(
        indices, pool, theta, dense, permutation, num_embeddings, cols, padding_idx, weight
    )
    if grad.shape != (*indices.shape, cols):
        raise ValueError(
            f"grad must have the shape of indices, {list(indices.shape)}, and columns behind; "
            f"received {list(grad.shape)}"
        )
    num_entries = indices.numel()
    grad = grad.contiguous()

    def launch(tiles: Tiles, device: Device) -> tuple[Tensor, Tensor, Tensor]:
        tiles = narrowed(tiles, virtual, cols)
        start = lead(virtual, tiles.k)
        num_tiles = triton.cdiv(num_entries, tiles.n) * triton.cdiv(cols + start, tiles.k)
        programs = tuning.num_programs(num_tiles, device)
        sums = TableGradients(
            virtual, dense, programs, num_entries, cols, lambda: grad.float().abs().max()
        )
        with on_device(pool):
            _embedding_bwd_kernel[(programs,)](
                grad, table, virtual, *sums.arguments(), num_entries, cols, start,
                TILE_N=tiles.n, TILE_K=tiles.k,
                **tiles.options, **ASSERTIONS,
            )  # fmt: skip
        return sums.results()

    if grad.numel() == 0:
        return no_gradients(pool, theta, dense, cols)
    return tuning.run("embedding_backward", 0, virtual, pool, launch)


class TableGradients:
    """The gradients of pool, theta and the dense rows, while kernels add to them.

    Args:
        num_programs: along the kernel's first axis, the only one.
        num_rows: at most how many gradients of rows of the table are added up.
        bound: of their elements, see Sum.
    """

    def __init__(
        self,
        virtual: VirtualWeight,
        dense: Tensor | None,
        num_programs: int,
        num_rows: int,
        cols: int,
        bound: Callable[[], Tensor],
    ) -> None:
        bound = functools.cache(bound)
        num_terms = num_rows * cols * virtual.NUM_HASHES.value
        self._weight = GradientSums(virtual, num_programs, num_terms, bound)
        self._dense = Sum(_given(dense, virtual.pool, cols), num_rows, bound)

    def arguments(self) -> tuple[Gradients, DenseGradient]:
        """What the kernel receives."""
        return self._weight.argument(), DenseGradient(self._dense.total, self._dense.units)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of pool, theta and the dense rows, each in its dtype."""
        return *self._weight.result(), self._dense.result()


def no_gradients(
    pool: Tensor, theta: Tensor, dense: Tensor | None, cols: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for pool, theta and the dense rows."""
    given = _given(dense, pool, cols)
    return torch.zeros_like(pool), torch.zeros_like(theta), torch.zeros_like(given)


def _given(dense: Tensor | None, pool: Tensor, cols: int) -> Tensor:
    return pool.new_empty((0, cols)) if dense is None else dense


def table_and_weight(
    indices: Tensor,
    pool: Tensor,
    theta: Tensor,
    dense: Tensor | None,
    permutation: Tensor | None,
    num_embeddings: int,
    cols: int,
    padding_idx: int,
    weight: tuple[Any, ...],
) -> tuple[Table, VirtualWeight]:
    """The kernels' arguments, checked as the reference does."""
    # Rows are looked up as uint32 and not counted, so that there may be 2**32 of them.
    virtual = virtual_weight(pool, theta, 0, cols, weight)
    require_table(
        indices, pool, dense, permutation, num_embeddings, cols, padding_idx, Weight(*weight)
    )
    if indices.is_cpu:
        ranks_of(indices.reshape(-1), permutation, num_embeddings)
    num_dense = 0 if dense is None else dense.shape[0]
    return Table(
        indices.contiguous(),
        indices if permutation is None else permutation.contiguous(),
        pool if dense is None else dense.contiguous(),
        num_embeddings,
        num_dense,
        padding_idx,
        tl.constexpr(permutation is not None),
        tl.constexpr(num_dense > 0),
    ), virtual


def narrowed(tiles: Tiles, virtual: VirtualWeight, cols: int) -> Tiles:
    """The same where there are that many columns; of few, more rows at once."""
    k = min(tiles.k, triton.next_power_of_2(cols + lead(virtual, tiles.k)))
    return dataclasses.replace(tiles, n=tiles.n * (tiles.k // k), k=k)
