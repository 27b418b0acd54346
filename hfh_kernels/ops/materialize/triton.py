"""``materialize`` in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfh_kernels.ops import tuning
from hfh_kernels.ops.launch import (
    GradientSums,
    lead,
    num_tiles,
    on_device,
    require_inputs,
    virtual_weight,
)
from hfh_kernels.ops.tile import first_col, hash_rows, load_theta, logical_rows, virtual_tile
from hfh_kernels.ops.tile_gradients import wide_tile_backward
from hfh_kernels.ops.tuning import Device, Tiles


@triton.jit
def _materialize_kernel(
    weight, output, rows, cols, lead, TILE_N: tl.constexpr, TILE_K: tl.constexpr
):
    """output [rows, cols] = V"""
    num_k = tl.cdiv(cols + lead, TILE_K)
    n = (tl.program_id(0) // num_k) * TILE_N + tl.arange(0, TILE_N)
    start = (tl.program_id(0) % num_k) * TILE_K - lead
    k = start + tl.arange(0, TILE_K)
    keys, bases = hash_rows(weight, logical_rows(weight, n))
    theta = load_theta(weight)
    v = virtual_tile(weight, theta, keys, bases, first_col(weight, start), TILE_K)
    inside = (n < rows)[:, None] & ((k >= 0) & (k < cols))[None, :]
    tl.store(output + n[:, None].to(tl.int64) * cols + k[None, :], v, mask=inside)


@triton.jit
def _materialize_bwd_kernel(
    grad, weight, gradients, rows, cols, lead,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    num_k = tl.cdiv(cols + lead, TILE_K)
    n = (tl.program_id(0) // num_k) * TILE_N + tl.arange(0, TILE_N)
    start = (tl.program_id(0) % num_k) * TILE_K - lead
    k = start + tl.arange(0, TILE_K)
    inside = (n < rows)[:, None] & ((k >= 0) & (k < cols))[None, :]
    g = tl.load(grad + n[:, None].to(tl.int64) * cols + k[None, :], mask=inside, other=0.0)
    keys, bases = hash_rows(weight, logical_rows(weight, n))
    theta = load_theta(weight)
    wide_tile_backward(
        weight,
        theta,
        gradients,
        keys,
        bases,
        first_col(weight, start),
        TILE_K,
        CHUNK,
        g.to(tl.float32),
    )


def materialize(pool: Tensor, theta: Tensor, rows: int, cols: int, *weight: Any) -> Tensor:
    """See the reference."""
    virtual = virtual_weight(pool, theta, rows, cols, weight)
    output = pool.new_empty((rows, cols))

    def launch(tiles: Tiles, device: Device) -> Tensor:
        start = lead(virtual, tiles.k)
        grid = (num_tiles(rows, tiles.n) * num_tiles(cols + start, tiles.k),)
        with on_device(pool):
            _materialize_kernel[grid](
                virtual, output, rows, cols, start, TILE_N=tiles.n, TILE_K=tiles.k,
                **tiles.options,
            )  # fmt: skip
        return output

    if output.numel() == 0:
        return output
    return tuning.run("materialize", 0, virtual, pool, launch)


def materialize_backward(
    grad: Tensor, pool: Tensor, theta: Tensor, *weight: Any
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    require_inputs(grad=grad, pool=pool, theta=theta)
    rows, cols = grad.shape
    virtual = virtual_weight(pool, theta, rows, cols, weight)
    grad = grad.contiguous()

    def launch(tiles: Tiles, device: Device) -> tuple[Tensor, Tensor]:
        start = lead(virtual, tiles.k)
        programs = num_tiles(rows, tiles.n) * num_tiles(cols + start, tiles.k)
        num_terms = rows * cols * virtual.NUM_HASHES.value
        sums = GradientSums(virtual, programs, num_terms, lambda: grad.float().abs().max())
        with on_device(pool):
            _materialize_bwd_kernel[(programs,)](
                grad, virtual, sums.argument(), rows, cols, start,
                TILE_N=tiles.n, TILE_K=tiles.k, CHUNK=tiles.chunk,
                **tiles.options,
            )  # fmt: skip
        return sums.result()

    if grad.numel() == 0:
        return torch.zeros_like(pool), torch.zeros_like(theta)
    return tuning.run("materialize_backward", 0, virtual, pool, launch)
