"""CUDA's linear by slot products against the reference, on a GPU or emulated."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction
from tests.cuda_device import DEVICE, needs_cuda
from tests.samples import BFLOAT16, Arguments, Sample, assert_matches
from tests.tolerances import relative_error

pytestmark = needs_cuda
FLOAT16 = torch.float16
LINEAR = Reconstruction(depth=1)


def spec(
    block: int,
    num_slots: int,
    *,
    num_hashes: int = 4,
    draw_slots: int | None = None,
    rows_per_window: int | None = None,
) -> HashSpec:
    return HashSpec(
        seed=block + num_hashes,
        num_hashes=num_hashes,
        pool_size=num_slots * block,
        block=block,
        window=draw_slots and draw_slots * block,
        rows_per_window=rows_per_window,
    )


def half_precision(dtype: torch.dtype = BFLOAT16, **fields: Any) -> Sample:
    sample = Sample(**{"reconstruction": LINEAR, "dtype": dtype, "pool_dtype": dtype, **fields})
    name = f"{sample.hash_spec.num_hashes} hashes, block {sample.hash_spec.block}, {sample.batch}"
    return dataclasses.replace(sample, name=f"{sample.name}: {name}")


BLOCKS = (16, 32, 64, 128, 256)
# Kernels are made for these: other batches are padded, and other numbers of hashes looped over.
BATCHES = {BFLOAT16: (1, 2, 4, 8, 16), FLOAT16: (1, 2, 4, 8)}
HASHES = (1, 2, 3, 4)

# Every block, number of hashes and batch in both dtypes; windows that wrap around the pool and
# that rows do not fill; more rows than a thread block's; ragged and misaligned columns.
SAMPLES = [
    *[
        half_precision(
            dtype,
            name="no window",
            hash_spec=spec(BLOCKS[i % len(BLOCKS)], 24, num_hashes=num_hashes),
            batch=(batch,),
            in_features=5 * 256,
            out_features=90,
        )
        for dtype, batches in BATCHES.items()
        for i, (batch, num_hashes) in enumerate(itertools.product(batches, HASHES))
    ],
    *[
        half_precision(
            name="no window",
            hash_spec=spec(BLOCKS[batch % len(BLOCKS)], 24, num_hashes=num_hashes),
            batch=(batch,),
            in_features=5 * 256,
        )
        for batch, num_hashes in zip(
            (3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15), 6 * (8, 16), strict=False
        )
    ],
    *[
        half_precision(
            name="windows",
            hash_spec=spec(64, num_slots, draw_slots=draw_slots, rows_per_window=rows_per_window),
            batch=(batch,),
            in_features=64 * 3,
            out_features=out_features,
            row_offset=row_offset,
        )
        for num_slots, draw_slots, rows_per_window, batch, out_features, row_offset in (
            (40, 33, 16, 3, 50, 5),
            (512, 512, 200, 1, 333, 130),
            (40, 33, 300, 3, 150, 140),
            (300, 17, 7, 5, 30, 2**32 - 30),
            (40, 33, 256, 16, 256 * 9 - 40, 0),
            (40, 33, 256, 8, 256 * 9 - 40, 20),
        )
    ],
    *[
        half_precision(
            name=f"columns from {col_offset}",
            hash_spec=spec(block, 20, num_hashes=2, draw_slots=9, rows_per_window=10),
            batch=(2,),
            in_features=in_features,
            col_offset=col_offset,
        )
        for block, in_features, col_offset in (
            (64, 197, 0),
            (16, 1111, 8),
            (32, 100, 2**31 - 3),
            (128, 59, 128 + 40),
            (256, 256, 255),
            (32, 40, 2**32 - 40),
            (16, 0, 3),
        )
    ],
    *[
        half_precision(
            dtype,
            name="columns in parts",
            hash_spec=spec(64, 30),
            batch=(batch,),
            in_features=64 * 32 * 12 + 10,
            out_features=9,
        )
        for dtype, batch in ((BFLOAT16, 1), (BFLOAT16, 16), (FLOAT16, 8))
    ],
    half_precision(
        name="hashednets",
        hash_spec=spec(32, 10, num_hashes=1),
        reconstruction=Reconstruction(depth=0),
        has_bias=False,
    ),
]


def slot_products(sample: Sample, arguments: Arguments) -> Tensor:
    weight = sample.weight._replace(backend="cuda:slot_products")
    on_device = arguments.map(lambda tensor: tensor.to(DEVICE))
    output: Tensor = torch.ops.hfh.linear(*on_device, sample.out_features, *weight)
    return output.cpu()


def expected(sample: Sample, arguments: Arguments) -> Tensor:
    return sample.linear(arguments.double(), backend="reference")


each_sample = pytest.mark.parametrize(
    "sample", [pytest.param(sample, id=sample.name) for sample in SAMPLES]
)


@each_sample
def test_matches_reference(sample: Sample) -> None:
    arguments = sample.arguments()
    output = slot_products(sample, arguments)
    assert output.dtype == sample.dtype
    assert_matches(output, expected(sample, arguments), sample.dtype)


@pytest.mark.parametrize(
    ("in_features", "col_offset", "poisoned"),
    [(20, 64 + 5, (*range(5), *range(25, 32))), (22, 20, range(10, 20)), (7, 32, range(7, 32))],
)
def test_numbers_outside_the_columns_do_not_count(
    in_features: int, col_offset: int, poisoned: tuple[int, ...]
) -> None:
    sample = half_precision(
        name="columns",
        hash_spec=spec(32, 20),
        in_features=in_features,
        col_offset=col_offset,
    )
    arguments = sample.arguments()
    clean = expected(sample, arguments)
    arguments.pool.view(-1, 32)[:, list(poisoned)] = torch.inf
    assert_matches(slot_products(sample, arguments), clean, sample.dtype)


each_kernel = pytest.mark.parametrize(
    ("dtype", "batch"), [(dtype, batch) for dtype in BATCHES for batch in BATCHES[dtype]]
)


@each_kernel
def test_infinite_slots_reach_the_rows_that_draw_them(dtype: torch.dtype, batch: int) -> None:
    sample = half_precision(
        dtype,
        name="infinite",
        hash_spec=spec(32, 60, num_hashes=2),
        batch=(batch,),
        in_features=5 * 32,
        out_features=200,
    )
    arguments = sample.arguments()
    arguments.pool.view(-1, 32)[7] = torch.inf
    reference = expected(sample, arguments)
    finite = reference.isfinite()
    assert 0 < finite.sum() < finite.numel()
    output = slot_products(sample, arguments)
    assert torch.equal(output.isfinite(), finite)
    assert_matches(output[finite], reference[finite], dtype)


@each_kernel
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_not_finite_stay_in_their_input(
    dtype: torch.dtype, batch: int, value: float
) -> None:
    sample = half_precision(
        dtype,
        name="infinite input",
        hash_spec=spec(32, 20, num_hashes=1),
        batch=(batch,),
        in_features=9 * 32,
        out_features=140,
    )
    arguments = sample.arguments()
    arguments.input[batch // 2, 40] = value
    reference = expected(sample, arguments)
    output = slot_products(sample, arguments).double()
    assert torch.equal(output.isnan(), reference.isnan())
    assert torch.equal(output[output.isinf()], reference[reference.isinf()])
    finite = reference.isfinite()
    assert finite.sum() == (batch - 1) * sample.out_features
    assert_matches(output[finite], reference[finite], dtype)


def test_products_may_be_larger_than_float16() -> None:
    sample = half_precision(FLOAT16, name="large", hash_spec=spec(256, 20), scale=1e-3)
    arguments = sample.arguments()
    arguments = arguments._replace(input=arguments.input * 2**13)
    output = slot_products(sample, arguments)
    assert_matches(output, expected(sample, arguments), FLOAT16)


@pytest.mark.parametrize("batch", BATCHES[FLOAT16])
def test_float16_is_rounded_once(batch: int) -> None:
    """When it is written: products that were bfloat16 would be within the tolerance, just so."""
    sample = half_precision(FLOAT16, name="precise", hash_spec=spec(64, 100), batch=(batch,))
    arguments = sample.arguments()
    error = relative_error(slot_products(sample, arguments), expected(sample, arguments))
    assert error < 5e-4


@pytest.mark.parametrize("batch", [1, 5])
def test_inputs_begin_anywhere(batch: int) -> None:
    sample = half_precision(
        name="shifted", hash_spec=spec(64, 20), batch=(batch,), in_features=64 * 9
    )
    arguments = sample.arguments()
    aligned = slot_products(sample, arguments)
    storage = arguments.input.new_empty(arguments.input.numel() + 1, device=DEVICE)
    shifted = storage[1:].view(arguments.input.shape).copy_(arguments.input)
    output = slot_products(sample, arguments._replace(input=shifted))
    assert torch.equal(output, aligned)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "of one type"),
        ({"pool_dtype": FLOAT16}, "of one type"),
        ({"reconstruction": Reconstruction(depth=2, width=4)}, "not depth 2"),
        ({"hash_spec": spec(8, 20)}, "blocks of 16 and more, not 8"),
        ({"hash_spec": spec(64, 513)}, "at most 512 blocks of 64, not 513"),
        ({"hash_spec": spec(256, 200)}, "at most 128 blocks of 256, not 200"),
        ({"batch": (17,)}, "a batch of at most 16, not 17"),
        (
            {"batch": (9,), "dtype": FLOAT16, "pool_dtype": FLOAT16},
            "a batch of at most 8, not 9",
        ),
    ],
)
def test_says_why_not(changes: dict[str, Any], reason: str) -> None:
    sample = dataclasses.replace(
        half_precision(name="refused", hash_spec=spec(64, 20)),
        **changes,
    )
    with pytest.raises(RuntimeError, match=reason):
        slot_products(sample, sample.arguments())
