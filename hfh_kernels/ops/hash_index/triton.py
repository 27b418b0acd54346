"""``hash_index`` in Triton: the kernels' hash, shown as it is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfh_kernels.ops.hash_index.reference import require_coordinates
from hfh_kernels.ops.launch import fields, num_tiles, on_device
from hfh_kernels.ops.tile import VirtualWeight, draws, hash_rows


@triton.jit
def _hash_index_kernel(
    rows, cols, weight, offsets, signs, num_rows, num_cols,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """offsets and signs [num_rows, num_cols, NUM_HASHES]"""
    num_k = tl.cdiv(num_cols, TILE_K)
    n = (tl.program_id(0) // num_k) * TILE_N + tl.arange(0, TILE_N)
    k = (tl.program_id(0) % num_k) * TILE_K + tl.arange(0, TILE_K)
    row = tl.load(rows + n, mask=n < num_rows, other=0).to(tl.uint32)
    col = tl.load(cols + k, mask=k < num_cols, other=0).to(tl.uint32)
    keys, bases = hash_rows(weight, row)
    inner = (col % weight.BLOCK).to(tl.int32)[None, :, None]
    positions, negatives = draws(weight, keys, bases, col // weight.BLOCK, inner)
    inside = ((n < num_rows)[:, None] & (k < num_cols)[None, :])[:, :, None]
    first = (n[:, None].to(tl.int64) * num_cols + k[None, :])[:, :, None] * weight.NUM_HASHES
    for u in tl.static_range(weight.NUM_HASHES):
        tl.store(offsets + first + u, positions[u].to(tl.int64), mask=inside)
        tl.store(signs + first + u, 1 - 2 * negatives[u].to(tl.int8), mask=inside)


def hash_index(
    rows: Tensor,
    cols: Tensor,
    seed: int,
    num_hashes: int,
    pool_size: int,
    block: int,
    window: int,
    rows_per_window: int,
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    require_coordinates(rows, cols)
    weight = (seed, num_hashes, block, window, rows_per_window, 1, 1, "relu", 1.0, 0, 0)
    virtual = VirtualWeight(rows, rows, *fields(weight, pool_size, 0, 0))
    num_rows, num_cols = rows.shape[0], cols.shape[0]
    offsets = rows.new_empty((num_rows, num_cols, num_hashes))
    signs = torch.empty_like(offsets, dtype=torch.int8)
    if offsets.numel():
        grid = (num_tiles(num_rows, 32) * num_tiles(num_cols, 32),)
        with on_device(rows):
            _hash_index_kernel[grid](
                rows.contiguous(), cols.contiguous(), virtual, offsets, signs,
                num_rows, num_cols, TILE_N=32, TILE_K=32,
            )  # fmt: skip
    return offsets, signs
