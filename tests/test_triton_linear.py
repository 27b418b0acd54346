"""Triton's linear, materialize and hash_index against the reference, on a GPU or interpreted."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hfh_kernels import HashSpec, Reconstruction, dispatch, functional
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
from tests.test_hash import spec_of
from tests.tolerances import TOLERANCE, relative_error
from tests.triton_device import DEVICE, needs_triton

pytestmark = needs_triton
FLOAT16 = torch.float16
DTYPES = list(itertools.product((FLOAT32, BFLOAT16, FLOAT16), repeat=2))
VECTORS = json.loads(Path(__file__).with_name("hash_v1_vectors.json").read_text())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Every number of hashes, network, block with and without a window, dtype; then every regime, with
# sums in parts and with tiles beyond each edge.
SWEEP = [
    *[sample for sample in SAMPLES if sample.dtype != FLOAT64],
    *[
        Sample(
            name=f"{num_hashes} hashes, depth {depth}",
            hash_spec=HashSpec(seed=num_hashes, num_hashes=num_hashes, pool_size=960, block=16),
            reconstruction=Reconstruction(depth, width=num_hashes),
        )
        for num_hashes, depth in ((1, 1), (1, 3), (2, 0), (5, 1), (7, 2), (16, 1))
    ],
    *[
        Sample(
            name=f"depth {depth}, width {width}, {activation}",
            hash_spec=HashSpec(seed=width, num_hashes=2, pool_size=960, block=32),
            reconstruction=Reconstruction(depth, width, activation),
        )
        for depth, width, activation in (
            (2, 1, "tanh"),
            (2, 16, "relu"),
            (3, 1, "relu"),
            (3, 6, "tanh"),
        )
    ],
    *[
        Sample(
            name=f"block {block}, {window or 'no'} window, column {col_offset}",
            hash_spec=HashSpec(
                seed=block,
                pool_size=20 * block,
                block=block,
                window=window,
                rows_per_window=window and 5,
            ),
            in_features=min(3 * block, 300) + 19,
            col_offset=col_offset,
        )
        for block in (2**i for i in range(9))
        for window, col_offset in ((None, 0), (3 * block, block // 2 + 1), (20 * block, 2**31 - 3))
    ],
    *[
        Sample(
            name=f"batch {batch}, {_short(dtype)} by {_short(pool_dtype)}",
            hash_spec=HashSpec(seed=batch, pool_size=2048, block=64),
            batch=(batch,),
            in_features=261,
            out_features=35,
            dtype=dtype,
            pool_dtype=pool_dtype,
        )
        for batch, dtypes in ((2, DTYPES), (17, DTYPES), (16, DTYPES[::4]), (257, DTYPES[::4]))
        for dtype, pool_dtype in dtypes
    ],
    *[
        Sample(
            name=f"{out_features} x {in_features}, batch {batch}",
            hash_spec=HashSpec(seed=in_features, num_hashes=2, pool_size=1280, block=block),
            reconstruction=Reconstruction(depth=1),
            batch=(batch,),
            in_features=in_features,
            out_features=out_features,
        )
        for out_features, in_features, block, batch in (
            (1, 1, 1, 1),
            (1, 1, 64, 300),
            (65, 1025, 128, 3),
            (129, 63, 16, 70),
            (300, 64, 1, 5),
        )
    ],
]


def run_with(
    sample: Sample, arguments: Arguments, backend: str, grad_output: Tensor | None = None
) -> dict[str, Tensor]:
    """Output and gradients, Triton's computed on DEVICE and brought home."""
    device = DEVICE if backend == "triton" else "cpu"
    leaves = arguments.map(lambda tensor: tensor.to(device)).require_grad()
    output = sample.linear(leaves, backend)
    given = sample.grad_output() if grad_output is None else grad_output
    results = differentiate(output, leaves, given.to(output))
    return {name: result.cpu() for name, result in results.items()}


def assert_matches_reference(sample: Sample) -> None:
    arguments = sample.arguments()
    actual = run_with(sample, arguments, "triton")
    expected = run_with(sample, arguments.double(), "reference")
    assert actual.keys() == expected.keys()
    dtypes = arguments._asdict() | {"output": arguments.input}
    for name, result in actual.items():
        assert result.dtype == dtypes[name].dtype, name
        assert_matches(result, expected[name], sample.dtype)


def _cost(sample: Sample) -> list[pytest.MarkDecorator]:
    """The compiler takes minutes for the largest networks."""
    network = sample.reconstruction
    terms = sum(rows * cols for rows, cols in network.layer_shapes(sample.hash_spec.num_hashes))
    return [pytest.mark.slow] if terms > 200 else []


each_sample = pytest.mark.parametrize(
    "sample", [pytest.param(sample, marks=_cost(sample), id=sample.name) for sample in SWEEP]
)


@each_sample
def test_linear(sample: Sample) -> None:
    assert_matches_reference(sample)


@each_sample
def test_deterministic_linear(sample: Sample, poisoned_memory: None) -> None:
    """Integers are summed, so that gradients come out the same whatever adds first."""
    assert torch.are_deterministic_algorithms_enabled()
    assert_matches_reference(sample)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sample", SWEEP[::3], ids=lambda sample: sample.name)
def test_materialize(sample: Sample, deterministic: bool, request: pytest.FixtureRequest) -> None:
    if deterministic:
        request.getfixturevalue("poisoned_memory")
    arguments = sample.arguments()
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(sample.out_features, sample.in_features, generator=generator)
    results = []
    for leaves, backend in (
        (arguments.map(lambda tensor: tensor.to(DEVICE)).require_grad(), "triton"),
        (arguments.double().require_grad(), "reference"),
    ):
        output = sample.materialize(leaves, backend)
        parameters = (leaves.pool, leaves.theta)
        gradients = torch.autograd.grad(output, parameters, grad.to(output), materialize_grads=True)
        results.append([result.detach().cpu() for result in (output, *gradients)])
    for actual, expected in zip(*results, strict=True):
        assert_matches(actual, expected, sample.pool_dtype)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_golden_vectors(case: dict[str, Any]) -> None:
    rows, cols = (torch.tensor(case[name], device=DEVICE) for name in ("rows", "cols"))
    offsets, signs = functional.hash_index(rows, cols, spec_of(case), backend="triton")
    assert offsets.dtype == torch.int64
    assert signs.dtype == torch.int8
    assert offsets.tolist() == case["offsets"]
    assert signs.tolist() == case["signs"]


def test_terms_of_very_different_size() -> None:
    """Integers must not round small gradients away where one bound serves all."""
    sample = SAMPLES[0]
    arguments = sample.arguments()
    arguments.input[0] *= 1e4
    arguments.input[1] *= 1e-4
    expected = run_with(sample, arguments.double(), "reference")
    torch.use_deterministic_algorithms(True)
    try:
        actual = run_with(sample, arguments, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert relative_error(actual["pool"], expected["pool"]) < TOLERANCE[FLOAT32]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_deterministic_gradient_of_what_is_not_finite(bad: float, poisoned_memory: None) -> None:
    sample = SAMPLES[0]
    arguments = sample.arguments()
    arguments.input[0, 0] = bad
    assert run_with(sample, arguments, "triton")["pool"].isnan().all()


@pytest.mark.parametrize("of", ["input", "grad_output"])
def test_nan_reaches_the_pool_through_the_weights_that_meet_it_only(of: str) -> None:
    """And not through what lies beyond the edges of tiles."""
    spec = HashSpec(num_hashes=1, pool_size=2**16)
    sample = dataclasses.replace(SAMPLES[0], hash_spec=spec, reconstruction=Reconstruction(1))
    arguments, grad_output = sample.arguments(), sample.grad_output()
    if of == "input":
        arguments.input[1, 2] = torch.nan
    else:
        grad_output[1, 2] = torch.nan
    actual = run_with(sample, arguments, "triton", grad_output)["pool"]
    expected = run_with(sample, arguments.double(), "reference", grad_output)["pool"]
    assert expected.isnan().any()
    assert torch.equal(actual.isnan(), expected.isnan())


class _NoProducts(TorchDispatchMode):
    """Raises as cuBLAS does where algorithms have to be deterministic."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        assert func not in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.mv.default)
        return func(*args, **(kwargs or {}))


def test_deterministic_gradient_needs_no_cublas(poisoned_memory: None) -> None:
    sample = SAMPLES[0]
    arguments = sample.arguments().map(lambda tensor: tensor.to(DEVICE))
    launcher = importlib.import_module("hfh_kernels.ops.linear.triton").linear_backward_weight
    with _NoProducts():  # type: ignore[no-untyped-call]
        launcher(sample.grad_output().to(DEVICE), *arguments[:3], *sample.weight)


@pytest.fixture
def _restored_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("_restored_precision")
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("fp32_precision", "tf32", "tf32"),
        ("fp32_precision", "ieee", "tf32x3"),
        ("allow_tf32", True, "tf32"),
        ("allow_tf32", False, "tf32x3"),
    ],
)
def test_precision_by_either_of_its_names(name: str, value: str | bool, expected: str) -> None:
    setattr(torch.backends.cuda.matmul, name, value)
    triton_linear = importlib.import_module("hfh_kernels.ops.linear.triton")
    assert triton_linear._precision(torch.ones(1)) == expected


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:1, :1].expand_as(x),
        lambda x: torch.cat((x, x), dim=-1)[..., : x.shape[-1]],
    ],
    ids=["strided", "transposed", "expanded", "slice"],
)
def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    sample = dataclasses.replace(SAMPLES[0], batch=(2, 3))
    arguments = sample.arguments()
    arguments = arguments._replace(input=layout(arguments.input))
    grad_output = layout(sample.grad_output())
    actual = run_with(sample, arguments, "triton", grad_output)
    expected = run_with(sample, arguments.double(), "reference", grad_output)
    for name, result in actual.items():
        assert_matches(result, expected[name], sample.dtype)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(FLOAT64, "does not support torch.float64")],
)
def test_refused_dtypes(dtype: torch.dtype, message: str) -> None:
    sample = SAMPLES[0].in_dtype(dtype)
    arguments = sample.arguments().map(lambda tensor: tensor.to(DEVICE))
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run: .*{message}"):
        sample.linear(arguments, "triton")
    assert dispatch.choose("auto", *arguments[:3]) == "reference"
    with pytest.raises(TypeError, match=r"input must have one of the dtypes .*torch\.float64"):
        torch.ops.hfh.linear(*arguments, sample.out_features, *sample.weight)


def test_bad_weights() -> None:
    sample = SAMPLES[0]
    input, pool, theta, bias = sample.arguments().map(lambda tensor: tensor.to(DEVICE))
    assert bias is not None
    call = torch.ops.hfh.linear.default
    size, weight = sample.out_features, sample.weight
    for arguments, message in (
        ((input, pool, theta[1:], bias, size, *weight), "theta must have shape"),
        ((input, pool[1:], theta, bias, size, *weight), "pool_size must be a multiple of block"),
        ((input, pool, theta, bias[1:], size, *weight), "bias must have shape"),
        ((input[0, 0], pool, theta, bias, size, *weight), "input must have at least one dim"),
        (
            (input[:1].expand(2**31, -1), pool, theta, bias, size, *weight),
            "input must have at most 2147418112 rows here, received 2147483648",
        ),
        (
            (input, pool, theta, bias, size, *weight._replace(row_offset=2**32 - 1)),
            r"rows must be in .*row_offset=4294967295",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
