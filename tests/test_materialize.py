"""The compiled materialize: its values, and the hash of the vector units, element by element."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction, dispatch, functional
from hfh_kernels.ops.library import Weight
from tests.samples import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    SAMPLES,
    Arguments,
    Sample,
    assert_matches,
    differentiate,
)
from tests.sweep import BLOCKS, SWEEP

pytestmark = pytest.mark.skipif(
    dispatch.can_run("cpu", torch.ones(1)) is not None, reason="needs the compiled extension"
)
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)

GOLDEN = json.loads(Path(__file__).with_name("hash_v1_vectors.json").read_text())["cases"]


def run(sample: Sample, arguments: Arguments, backend: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(sample.out_features, sample.in_features, generator=generator)
    leaves = Arguments(arguments.input, *arguments[1:3], None).require_grad()
    leaves.input.requires_grad_(False)
    output = sample.materialize(leaves, backend)
    return differentiate(output, leaves, grad.to(sample.pool_dtype).to(output.dtype))


@pytest.mark.parametrize("sample", [*SAMPLES, *SWEEP[::5]], ids=lambda sample: sample.name)
def test_values_and_gradients(sample: Sample, poisoned_memory: None) -> None:
    arguments = sample.arguments()
    actual = run(sample, arguments)
    expected = run(sample, arguments.double(), backend="reference")
    assert actual["output"].dtype == actual["pool"].dtype == sample.pool_dtype
    assert actual["theta"].dtype == sample.theta_dtype
    assert actual["output"].is_contiguous()
    for name, result in actual.items():
        assert_matches(result, expected[name], sample.pool_dtype)


@each_sample
def test_gradcheck(sample: Sample) -> None:
    sample = sample.in_dtype(FLOAT64)
    rows, cols = min(sample.out_features, 6), min(sample.in_features, 11)
    # Off the grid of the samples: finite differences must not meet relu's kink.
    leaves = [torch.randn_like(tensor, requires_grad=True) for tensor in sample.arguments()[1:3]]

    def materialize(pool: Tensor, theta: Tensor) -> Tensor:
        output: Tensor = torch.ops.hfh.materialize(pool, theta, rows, cols, *sample.weight)
        return output

    assert torch.autograd.gradcheck(materialize, leaves, fast_mode=sample.name != "default")


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_vectors(case: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """The elements behind a weight get a number each, the rest of the pool stays zero.

    The pool is a sparse file, since one case has 2**31 elements.
    """
    num_hashes = case["num_hashes"]
    pool = torch.from_file(str(tmp_path / "pool"), shared=True, size=case["pool_size"], dtype=dtype)
    all_offsets, all_signs = torch.tensor(case["offsets"]), torch.tensor(case["signs"])
    for i, j in itertools.product(range(len(case["rows"])), range(len(case["cols"]))):
        elements, number_of = all_offsets[i, j].unique(return_inverse=True)
        pool[elements] = torch.arange(1.0, len(elements) + 1, dtype=dtype)
        weight = Weight(
            case["seed"],
            num_hashes,
            case.get("block", 1),
            case.get("window") or 0,
            case.get("rows_per_window") or 0,
            *(1, 1, "relu", 1.0),
            case["rows"][i],
            case["cols"][j],
        )
        values = [
            torch.ops.hfh.materialize(pool, picks_one, 1, 1, *weight).item()
            for picks_one in torch.eye(num_hashes)
        ]
        assert values == (all_signs[i, j] * (number_of + 1)).tolist()
        pool[elements] = torch.zeros((), dtype=dtype)


INDEX_SPECS = [
    HashSpec(seed=block, num_hashes=num_hashes, pool_size=num_slots * block, block=block, **window)
    for block in BLOCKS
    for num_hashes, num_slots, window in (
        (4, 7001, {}),
        (16, 37, {}),
        (1, 7001, {"window": 1001 * block, "rows_per_window": 3}),
        (3, 37, {"window": 30 * block, "rows_per_window": 2}),
        (5, 37, {"window": 37 * block, "rows_per_window": 1}),
    )
]


@pytest.mark.parametrize("spec", INDEX_SPECS, ids=str)
@pytest.mark.parametrize(
    ("row_offset", "col_offset"),
    [(0, 0), (2**31 - 5, 2**31 - 77), (2**32 - 9, 2**32 - 333)],
    ids=["start", "middle", "end"],
)
def test_index_is_exact(spec: HashSpec, row_offset: int, col_offset: int) -> None:
    """Elements that tell their own offset, all of them exact in float32, come out as they are."""
    rows, cols = 9, 333
    assert spec.pool_size < 2**24
    pool = torch.arange(1.0, spec.pool_size + 1)
    offsets, signs = functional.hash_index(
        range(row_offset, row_offset + rows),
        range(col_offset, col_offset + cols),
        spec,
        backend="reference",
    )
    grad = torch.arange(1.0, rows * cols + 1).view(rows, cols)
    for u, picks_one in enumerate(torch.eye(spec.num_hashes)):
        leaf = pool.clone().requires_grad_()
        weight = functional.materialize(
            leaf,
            picks_one,
            rows,
            cols,
            hash_spec=spec,
            reconstruction=Reconstruction(depth=1),
            row_offset=row_offset,
            col_offset=col_offset,
            backend="cpu",
        )
        assert torch.equal(weight, signs[..., u] * (offsets[..., u] + 1))

        # Sums of integers, so these too are exact.
        (grad_pool,) = torch.autograd.grad(weight, leaf, grad)
        expected = torch.zeros(spec.pool_size, dtype=FLOAT64)
        expected.index_add_(0, offsets[..., u].flatten(), (signs[..., u] * grad).double().flatten())
        assert torch.equal(grad_pool.double(), expected)


@each_sample
def test_is_the_weight_of_linear(sample: Sample) -> None:
    sample = dataclasses.replace(sample.in_dtype(FLOAT32), scale=-1.5)
    arguments = sample.arguments()
    weight = sample.materialize(arguments)
    dense = torch.nn.functional.linear(arguments.input.double(), weight.double())
    assert_matches(sample.linear(arguments._replace(bias=None)), dense, FLOAT32)


@pytest.mark.parametrize(
    ("row", "col", "rows", "cols"), [(0, 0, 5, 9), (30, 17, 7, 53), (36, 69, 1, 1)]
)
def test_part_of_the_whole(row: int, col: int, rows: int, cols: int) -> None:
    sample = dataclasses.replace(SAMPLES[0], row_offset=3, col_offset=5)
    arguments = sample.arguments()
    whole = sample.materialize(arguments)
    part = dataclasses.replace(
        sample,
        row_offset=sample.row_offset + row,
        col_offset=sample.col_offset + col,
        out_features=rows,
        in_features=cols,
    )
    assert torch.equal(part.materialize(arguments), whole[row : row + rows, col : col + cols])


def test_strided_gradient() -> None:
    sample = SAMPLES[0]
    arguments = sample.arguments().require_grad()
    output = sample.materialize(arguments)
    grad = torch.randn(sample.in_features, sample.out_features).T
    leaves = (arguments.pool, arguments.theta)
    strided = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    contiguous = torch.autograd.grad(output, leaves, grad.contiguous())
    assert all(map(torch.equal, strided, contiguous))
    summed = torch.autograd.grad(sample.materialize(arguments).sum(), leaves)
    ones = torch.autograd.grad(sample.materialize(arguments), leaves, torch.ones_like(output))
    assert all(map(torch.equal, summed, ones))


def test_double_backward(backend: str) -> None:
    arguments = SAMPLES[0].arguments().require_grad()
    weight = SAMPLES[0].materialize(arguments, backend)
    (grad_pool,) = torch.autograd.grad(weight.square().sum(), arguments.pool, create_graph=True)
    loss = grad_pool.square().sum()
    if backend == "reference":
        loss.backward()
    else:
        with pytest.raises(RuntimeError, match="hfh kernels are differentiable once"):
            loss.backward()


def test_autocast_changes_nothing() -> None:
    arguments = SAMPLES[0].arguments()
    with torch.autocast("cpu"):
        weight = SAMPLES[0].materialize(arguments)
    assert torch.equal(weight, SAMPLES[0].materialize(arguments))
