"""The default hash and g, chosen here and nowhere else, for whole models.

Four hashes and a linear g. ``bench/default_hash.py`` compares it with blocks of 1, with the whole
pool for every row and with a g of one hidden layer: over three networks and five seeds the default
differs from blocks of 1 without a window by less than the standard error of the difference. A
linear g is the fastest: it takes the fewest operations a weight, and it lets a kernel multiply pool
slots by inputs instead of making weights.

Blocks of 64 neighbouring columns: a slot of the pool is 256 bytes of float32 or 128 of bfloat16, so
any part of it is whole 16-byte loads on a GPU and whole vector registers on a CPU, and the hash is
paid once for 64 weights.

Windows of 64 KiB wherever the pool is larger: then what a group of rows reads fits the shared
memory of a GPU's multiprocessor (a block of threads may have 227 KiB of it on an H100, 99 KiB on an
RTX 4090, 64 KiB on a T4). A window is part of the hash: it cannot be added to a trained network
later. Windows start at hashed places, so a pool element may lie in none and would be lost.
``rows_per_window`` therefore comes from the network: its windows hold every element ``MIN_WINDOWS``
times on average, if need be with fewer rows than ``MAX_ROWS_PER_WINDOW`` each, and a share of about
exp(-MIN_WINDOWS) is lost. A pass over the network that loads each window once then reads the pool
that many times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from hfh_kernels.spec import MAX_BLOCK, HashSpec

NUM_HASHES = 4
DEPTH = 1
WIDTH = 4
ACTIVATION = "relu"
BLOCK = 64
WINDOW_BYTES = 64 * 1024
MAX_ROWS_PER_WINDOW = 32
MIN_WINDOWS = 4

MIN_SIZE = 1024
"""Weights of a layer below which compressing it saves little beside its own g and its call."""


class Window(NamedTuple):
    """The two fields of a :class:`hfh_kernels.HashSpec`; both None for the whole pool."""

    window: int | None
    rows_per_window: int | None


def layer_block(block: int, cols: int) -> int:
    """The largest power of two up to ``block`` that a row of ``cols`` columns fills.

    Columns count from the start of a block, so a block longer than the row would leave the ends of
    slots unread by this layer.

    Raises:
        TypeError: block is not an int.
        ValueError: block is no power of two from 1 to 256.
    """
    HashSpec(pool_size=MAX_BLOCK, block=block)
    return 1 << min(block, max(cols, 1)).bit_length() - 1


def window_size(pool_size: int, dtype: torch.dtype) -> int | None:
    """Pool elements of a window; None where the whole pool fits."""
    window = WINDOW_BYTES // dtype.itemsize
    return window if pool_size > window else None


def rows_per_window(rows: Iterable[int], pool_size: int, window: int) -> int:
    """Rows that share a window: a power of two, see above.

    Args:
        rows: of each virtual weight over the pool.
        pool_size, window: in pool elements.
    """
    rows = list(rows)
    group = MAX_ROWS_PER_WINDOW
    while group > 1 and sum(-(-count // group) for count in rows) * window < (
        MIN_WINDOWS * pool_size
    ):
        group //= 2
    return group
