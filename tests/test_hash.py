from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hfh_kernels import HashSpec
from hfh_kernels.functional import hash_index
from hfh_kernels.ops.hash_index.reference import GOLDEN, mix

VECTORS = json.loads(Path(__file__).with_name("hash_v1_vectors.json").read_text())
SPEC = HashSpec(seed=3, num_hashes=4, pool_size=2**12, block=8)
WINDOWED = HashSpec(seed=5, num_hashes=4, pool_size=1600, block=16, window=160, rows_per_window=8)


def spec_of(case: dict[str, Any]) -> HashSpec:
    names = {field.name for field in dataclasses.fields(HashSpec)}
    return HashSpec(**{name: value for name, value in case.items() if name in names})


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_golden_vectors(case: dict[str, Any], backend: str) -> None:
    offsets, signs = hash_index(case["rows"], case["cols"], spec_of(case), backend=backend)
    assert offsets.dtype == torch.int64
    assert signs.dtype == torch.int8
    assert offsets.is_contiguous()
    assert signs.is_contiguous()
    assert offsets.tolist() == case["offsets"]
    assert signs.tolist() == case["signs"]


def test_mix_and_lanes() -> None:
    inputs = [int(x) for x in VECTORS["mix"]]
    outputs = list(VECTORS["mix"].values())
    assert [mix(x) for x in inputs] == outputs
    assert mix(torch.tensor(inputs)).tolist() == outputs
    assert [mix((u + 1) * GOLDEN % 2**32) | 1 for u in range(16)] == VECTORS["lane"]


def test_every_field_of_the_key_matters(backend: str) -> None:
    spec = HashSpec(seed=1000, num_hashes=2, pool_size=2**31 - 1)
    here = hash_index([1000], [1000], spec, backend=backend)[0]
    for bit in range(32):
        other = 1000 ^ (1 << bit)
        moved = (
            hash_index([other], [1000], spec, backend=backend)[0],
            hash_index([1000], [other], spec, backend=backend)[0],
            hash_index([1000], [1000], dataclasses.replace(spec, seed=other), backend=backend)[0],
        )
        for offsets in moved:
            assert not torch.equal(here, offsets)


def test_signs_and_slots_are_uniform(backend: str) -> None:
    spec = HashSpec(seed=11, num_hashes=16, pool_size=64)
    offsets, signs = hash_index(range(256), range(256), spec, backend=backend)
    expected = offsets.numel() / (2 * 64)
    counts = torch.bincount((offsets + 64 * (signs > 0)).flatten(), minlength=128).double()
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 127 + 4 * (2 * 127) ** 0.5


@pytest.mark.parametrize("spec", [SPEC, WINDOWED], ids=["blocks", "window"])
def test_block_reads_consecutive_elements(spec: HashSpec, backend: str) -> None:
    offsets, signs = hash_index(range(20), range(spec.block * 3), spec, backend=backend)
    blocks = offsets.view(20, 3, spec.block, -1)
    steps = torch.arange(spec.block)[:, None]
    assert torch.equal(blocks, blocks[:, :, :1] + steps)
    assert torch.equal(blocks[:, :, 0] % spec.block, torch.zeros_like(blocks[:, :, 0]))
    sign_blocks = signs.view(20, 3, spec.block, -1)
    assert torch.equal(sign_blocks, sign_blocks[:, :, :1].expand_as(sign_blocks))


def test_window_bounds_a_group_of_rows(backend: str) -> None:
    assert WINDOWED.window is not None
    assert WINDOWED.rows_per_window is not None
    offsets, _ = hash_index(range(64), range(512), WINDOWED, backend=backend)
    groups = offsets.view(64 // WINDOWED.rows_per_window, -1)
    for group in groups:
        used = torch.zeros(WINDOWED.pool_size, dtype=torch.bool)
        used[group] = True
        # Some rotation of the pool puts all that is used into its first `window` elements.
        starts = torch.arange(0, WINDOWED.pool_size, WINDOWED.block)
        rotated = (torch.arange(WINDOWED.pool_size) - starts[:, None]) % WINDOWED.pool_size
        fits = ~((rotated >= WINDOWED.window) & used).any(dim=1)
        assert fits.any()
    assert len(set(groups.flatten().tolist())) > WINDOWED.window


def test_depends_on_logical_coordinates_only(backend: str) -> None:
    offsets, signs = hash_index(range(40), range(70), WINDOWED, backend=backend)
    part_offsets, part_signs = hash_index([39, 7], range(5, 70, 13), WINDOWED, backend=backend)
    assert torch.equal(part_offsets, offsets[[39, 7], 5::13])
    assert torch.equal(part_signs, signs[[39, 7], 5::13])


@pytest.mark.parametrize(
    "rows",
    [
        [4, 5],
        (4, 5),
        range(4, 6),
        torch.tensor([4, 5]),
        torch.tensor([4, 5], dtype=torch.uint8),
        torch.tensor([4, 5], dtype=torch.uint32),
        torch.tensor([4, 9, 5, 9])[::2],
    ],
    ids=["list", "tuple", "range", "int64", "uint8", "uint32", "strided"],
)
def test_kinds_of_coordinates(rows: Any, backend: str) -> None:
    expected, _ = hash_index(torch.tensor([4, 5]), [2**32 - 1], SPEC)
    assert torch.equal(hash_index(rows, [2**32 - 1], SPEC, backend=backend)[0], expected)


def test_no_coordinates(backend: str) -> None:
    offsets, signs = hash_index([], range(3), SPEC, backend=backend)
    assert offsets.shape == signs.shape == (0, 3, 4)
    offsets, signs = hash_index(range(2), torch.zeros(0, dtype=torch.int64), SPEC, backend=backend)
    assert offsets.shape == signs.shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("cols", "error", "message"),
    [
        ([-1], ValueError, r"cols must be in \[0, 2\*\*32\), received values from -1 to -1"),
        ([0, 2**32], ValueError, "cols .* received values from 0 to 4294967296"),
        ([2**70], ValueError, "cols must be integers in"),
        ([0.5], TypeError, "cols must be integers, received torch.float32"),
        ([True], TypeError, "cols must be integers, received torch.bool"),
        (torch.tensor(3), ValueError, "cols must be 1-d"),
        (torch.tensor([[3]]), ValueError, "cols must be 1-d"),
    ],
)
def test_bad_coordinates(cols: Any, error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=message):
        hash_index([0], cols, SPEC, backend=backend)
    with pytest.raises(error, match=message.replace("cols", "rows")):
        hash_index(cols, [0], SPEC, backend=backend)
