"""The hash, version 1, in plain PyTorch.

uint32 arithmetic is done in int64 with a mask after each step, and no product leaves int64.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from hfh_kernels.ops.library import LIBRARY, make_hash_spec, require_same_device
from hfh_kernels.spec import HashSpec

GOLDEN = 0x9E3779B9
_MASK = 0xFFFFFFFF

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


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
    """Pool offsets and signs behind the weights at (rows x cols).

    Args:
        rows: int64 [R], each in [0, 2**32).
        cols: int64 [C], each in [0, 2**32).
        seed, num_hashes, pool_size, block, window, rows_per_window: see :class:`HashSpec`; 0 stands
            for no window.

    Returns:
        offsets int64 [R, C, num_hashes] and signs int8 [R, C, num_hashes], each sign -1 or 1.

    Raises:
        TypeError: rows or cols is not int64.
        ValueError: rows or cols is not 1-dimensional, they are on two devices, or the hash is
            invalid.
    """
    require_coordinates(rows, cols)
    spec = make_hash_spec(seed, num_hashes, pool_size, block, window, rows_per_window)
    slots, negative = slots_of(rows, cols // block, spec)
    offsets = slots * block + cols % block
    signs = 1 - 2 * negative.to(torch.int8)
    return offsets.permute(1, 2, 0).contiguous(), signs.permute(1, 2, 0).contiguous()


def require_coordinates(rows: Tensor, cols: Tensor) -> None:
    """Raise unless both are int64 vectors on one device."""
    for name, indices in (("rows", rows), ("cols", cols)):
        if indices.dtype != torch.int64:
            raise TypeError(f"{name} must have dtype torch.int64, received {indices.dtype}")
        if indices.dim() != 1:
            raise ValueError(f"{name} must be 1-d, received shape {list(indices.shape)}")
    require_same_device("cols", cols, "rows", rows)


def slots_of(rows: Tensor, col_blocks: Tensor, spec: HashSpec) -> tuple[Tensor, Tensor]:
    """Slots of the pool, in units of a block, and where the sign is negative.

    Args:
        rows: int64 [R]
        col_blocks: int64 [B], column indices divided by the block.

    Returns:
        slots int64 [num_hashes, R, B] and negative bool [num_hashes, R, B].
    """
    slots, negative = torch.ops.hfh.reference_slots.default(
        rows,
        col_blocks,
        spec.seed,
        spec.num_hashes,
        spec.pool_size // spec.block,
        (spec.window or spec.pool_size) // spec.block,
        spec.rows_per_window or 0,
    )
    return slots, negative


def reference_slots(
    rows: Tensor,
    col_blocks: Tensor,
    seed: int,
    num_hashes: int,
    num_slots: int,
    drawn_slots: int,
    rows_per_window: int,
) -> tuple[Tensor, Tensor]:
    """:func:`slots_of`, an operator so that compilers call it.

    Traced, its chain of x ^ (x >> 16) takes Inductor minutes: it inlines x at each use.
    """
    lanes = [mix(_multiply(u + 1, GOLDEN)) | 1 for u in range(num_hashes)]

    row_key = mix(mix(rows) ^ seed)
    key = mix((row_key[:, None] + _multiply(col_blocks, GOLDEN)) & _MASK)
    hashes = _multiply(key, torch.tensor(lanes, device=rows.device)[:, None, None])
    hashes = _multiply(hashes ^ (hashes >> 15), 0x2C1B3C6D)
    product = hashes * drawn_slots
    slots = product >> 32
    if rows_per_window:
        window_key = mix(seed ^ 0xC2B2AE35)
        group_key = (window_key + _multiply(rows // rows_per_window, GOLDEN)) & _MASK
        slots = slots + ((group_key * num_slots) >> 32)[:, None]
        slots = torch.where(slots >= num_slots, slots - num_slots, slots)
    return slots, (product >> 31) & 1 == 1


def fake_reference_slots(
    rows: Tensor, col_blocks: Tensor, seed: int, num_hashes: int, *slots: int
) -> tuple[Tensor, Tensor]:
    fake = rows.new_empty((num_hashes, rows.shape[0], col_blocks.shape[0]))
    return fake, torch.empty_like(fake, dtype=torch.bool)


LIBRARY.define(
    "reference_slots(Tensor rows, Tensor col_blocks, int seed, int num_hashes, int num_slots, "
    "int drawn_slots, int rows_per_window) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.impl("reference_slots", reference_slots, "CompositeExplicitAutograd")
torch.library.register_fake("hfh::reference_slots", fake_reference_slots, lib=LIBRARY)


def mix(x: IntOrTensor) -> IntOrTensor:
    """The 32-bit finaliser of the hash, a bijection on [0, 2**32)."""
    x = x ^ (x >> 16)
    x = _multiply(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = _multiply(x, 0x846CA68B)
    return x ^ (x >> 16)


def _multiply(x: IntOrTensor, factor: IntOrTensor | int) -> IntOrTensor:
    """x * factor mod 2**32; factor is taken as a signed number to keep int64 from overflowing."""
    return (x * (factor - ((factor & 0x80000000) << 1))) & _MASK
