"""``hfh::hash_index``: which pool elements, with which signs, are behind each weight."""

from __future__ import annotations

import torch
from torch import Tensor

from hfh_kernels.ops.hash_index import reference
from hfh_kernels.ops.library import define, require_same_device


def fake_hash_index(
    rows: Tensor, cols: Tensor, seed: int, num_hashes: int, *pool: int
) -> tuple[Tensor, Tensor]:
    require_same_device("cols", cols, "rows", rows)
    offsets = rows.new_empty((rows.shape[0], cols.shape[0], num_hashes))
    return offsets, torch.empty_like(offsets, dtype=torch.int8)


define(
    "hash_index",
    "(Tensor rows, Tensor cols, int seed, int num_hashes, int pool_size, int block, int window, "
    "int rows_per_window) -> (Tensor, Tensor)",
    reference=reference.hash_index,
    fake=fake_hash_index,
)
