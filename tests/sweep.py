"""Samples for values and gradients: every option, every regime of batch and shape."""

from __future__ import annotations

import itertools

import torch

from hfh_kernels import HashSpec, Reconstruction
from tests.samples import BFLOAT16, FLOAT32, FLOAT64, Sample

DTYPES = [
    (FLOAT32, FLOAT32),
    (FLOAT32, BFLOAT16),
    (BFLOAT16, FLOAT32),
    (BFLOAT16, BFLOAT16),
    (FLOAT64, FLOAT64),
]
"""Activations and pool."""

BLOCKS = [2**i for i in range(9)]


def _theta_dtype(pool_dtype: torch.dtype) -> torch.dtype:
    return FLOAT64 if pool_dtype == FLOAT64 else FLOAT32


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


HASHES = [
    Sample(
        name=f"{num_hashes} hashes, depth {depth}, block {block}",
        hash_spec=HashSpec(seed=num_hashes, num_hashes=num_hashes, pool_size=960, block=block),
        reconstruction=Reconstruction(depth),
    )
    for num_hashes, depth, block in itertools.product(range(1, 17), range(4), (1, 64))
]

NETWORKS = [
    Sample(
        name=f"depth {depth}, width {width}, {activation}, {num_hashes} hashes",
        hash_spec=HashSpec(seed=width, num_hashes=num_hashes, pool_size=960, block=32),
        reconstruction=Reconstruction(depth, width, activation),
    )
    for depth, width, activation, num_hashes in itertools.product(
        (2, 3), range(1, 17), ("relu", "tanh"), (2, 3)
    )
]

HASH_SPECS = [
    Sample(
        name=f"block {block}, {window or 'no'} window, {_short(dtype)} by {_short(pool_dtype)}",
        hash_spec=HashSpec(
            seed=block,
            pool_size=20 * block,
            block=block,
            window=window,
            rows_per_window=window and 5,
        ),
        dtype=dtype,
        pool_dtype=pool_dtype,
        theta_dtype=_theta_dtype(pool_dtype),
        in_features=3 * block + 19,
        col_offset=col_offset,
    )
    for block in BLOCKS
    for window, col_offset in ((None, 0), (3 * block, block // 2 + 1), (20 * block, 2**31 - 3))
    for dtype, pool_dtype in DTYPES
]

REGIMES = [
    Sample(
        name=f"batch {batch}, block {block}, {_short(dtype)} by {_short(pool_dtype)}",
        hash_spec=HashSpec(seed=batch, pool_size=2048, block=block),
        reconstruction=Reconstruction(depth),
        batch=(batch,),
        in_features=261,
        out_features=35,
        dtype=dtype,
        pool_dtype=pool_dtype,
        theta_dtype=_theta_dtype(pool_dtype),
    )
    for block, depth in ((1, 1), (64, 2))
    for dtype, pool_dtype in DTYPES
    for batch in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 32, 33, 47, 48, 49, 63, 64, 65, 129, 300)
]

SHAPES = [
    Sample(
        name=f"{out_features} x {in_features}, batch {batch}, {_short(dtype)}",
        hash_spec=HashSpec(seed=in_features, num_hashes=2, pool_size=1280, block=block),
        reconstruction=Reconstruction(depth=1),
        batch=(batch,),
        in_features=in_features,
        out_features=out_features,
        dtype=dtype,
    )
    for dtype, batch in ((FLOAT32, 1), (FLOAT32, 6), (FLOAT32, 64), (BFLOAT16, 6))
    for out_features, in_features, block in (
        (1, 1, 1),
        (1, 1, 64),
        (7, 15, 64),
        (8, 16, 16),
        (9, 17, 1),
        (17, 31, 32),
        (127, 511, 64),
        (128, 512, 64),
        (129, 513, 16),
        (65, 1025, 128),
        (511, 33, 64),
        (513, 129, 1),
        # Beyond the columns, or the rows, that any panel takes at once.
        (3, 33000, 64),
        (8300, 9, 8),
    )
]

# Linear g, whole blocks and a small pool: where csrc/torch/panels.cpp prefers slot products. With
# three columns less it must not.
FEW_SLOTS = [
    Sample(
        name=f"{num_slots} slots of {block}, depth {depth}, {cols} columns, batch {batch}, "
        f"{_short(dtype)} by {_short(pool_dtype)}{', window' if window else ''}",
        hash_spec=HashSpec(
            seed=5,
            num_hashes=3,
            pool_size=num_slots * block,
            block=block,
            window=window,
            rows_per_window=window and 50,
        ),
        reconstruction=Reconstruction(depth),
        batch=(batch,),
        in_features=cols,
        out_features=301,
        dtype=dtype,
        pool_dtype=pool_dtype,
        row_offset=2**32 - 400,
        col_offset=2**31 + 256,
    )
    for num_slots, block in ((1, 64), (64, 16), (16, 64), (67, 32), (4, 256))
    for window in (None, block)
    for cols in (4 * block, 4 * block - 3)
    for depth, batch, dtype, pool_dtype in (
        (0, 1, FLOAT32, FLOAT32),
        (1, 1, FLOAT32, BFLOAT16),
        (1, 3, BFLOAT16, BFLOAT16),
        (1, 32, FLOAT32, FLOAT32),
        (0, 33, FLOAT32, BFLOAT16),
    )
]

# More rows than have their gradients side by side at once, or more blocks than have their products.
MANY_SLOT_PRODUCTS = [
    Sample(
        name=f"{rows} rows, {cols} columns, batch {batch}, {_short(pool_dtype)} pool",
        hash_spec=HashSpec(seed=6, num_hashes=3, pool_size=40 * 64, block=64),
        reconstruction=Reconstruction(depth=1),
        batch=(batch,),
        in_features=cols,
        out_features=rows,
        pool_dtype=pool_dtype,
        row_offset=5,
        col_offset=2**31 + 64,
    )
    for rows, cols in ((4103, 64), (301, 20 * 64))
    for batch, pool_dtype in ((32, FLOAT32), (70, BFLOAT16))
]

SWEEP = [*HASHES, *NETWORKS, *HASH_SPECS, *REGIMES, *SHAPES, *FEW_SLOTS, *MANY_SLOT_PRODUCTS]
