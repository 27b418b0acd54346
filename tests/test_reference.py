"""The reference against scalar Python that shares nothing with it, and its derivatives."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction
from hfh_kernels import functional as hfh
from hfh_kernels.ops.linear import reference as linear_reference
from hfh_kernels.ops.materialize import reference as materialize_reference
from tests.tolerances import TOLERANCE, relative_error


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    hash_spec: HashSpec
    reconstruction: Reconstruction
    row_offset: int = 0
    col_offset: int = 0

    @property
    def weight(self) -> dict[str, Any]:
        fields = ("hash_spec", "reconstruction", "row_offset", "col_offset")
        return {name: getattr(self, name) for name in fields}

    def parameters(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """pool and theta."""
        num_parameters = self.reconstruction.num_parameters(self.hash_spec.num_hashes)
        pool = torch.randn(self.hash_spec.pool_size, dtype=dtype)
        return pool, torch.randn(num_parameters, dtype=dtype)


CASES = [
    Case("hashednets", HashSpec(num_hashes=1, pool_size=13), Reconstruction(depth=0)),
    Case("depth 0 of 3 hashes", HashSpec(seed=9, num_hashes=3, pool_size=64), Reconstruction(0)),
    Case("mix", HashSpec(seed=1, num_hashes=5, pool_size=24, block=2), Reconstruction(depth=1)),
    Case("relu", HashSpec(seed=2, num_hashes=4, pool_size=24, block=4), Reconstruction()),
    Case(
        "tanh with a window",
        HashSpec(seed=2**32 - 1, num_hashes=2, pool_size=40, block=4, window=16, rows_per_window=2),
        Reconstruction(depth=2, width=3, activation="tanh"),
    ),
    Case(
        "deep relu, ragged offsets",
        HashSpec(seed=4, num_hashes=3, pool_size=48, block=8),
        Reconstruction(depth=3, width=5),
        row_offset=2**32 - 3,
        col_offset=2**31 + 5,
    ),
    Case(
        "deep tanh, last column",
        HashSpec(seed=6, num_hashes=16, pool_size=31),
        Reconstruction(depth=3, width=1, activation="tanh"),
        row_offset=7,
        col_offset=2**32 - 7,
    ),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

ROWS, COLS = 3, 7


def naive_index(spec: HashSpec, row: int, col: int) -> list[tuple[int, int]]:
    """(offset, sign) of each hash function."""
    mask = 2**32 - 1

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & mask
        x ^= x >> 15
        x = x * 0x846CA68B & mask
        return x ^ x >> 16

    gold = 0x9E3779B9
    slots = spec.pool_size // spec.block
    drawn, base = slots, 0
    if spec.window is not None and spec.rows_per_window is not None:
        drawn = spec.window // spec.block
        group_key = (mix(spec.seed ^ 0xC2B2AE35) + row // spec.rows_per_window * gold) & mask
        base = group_key * slots >> 32
    key = mix((mix(mix(row) ^ spec.seed) + col // spec.block * gold) & mask)
    result = []
    for u in range(spec.num_hashes):
        h = key * (mix((u + 1) * gold & mask) | 1) & mask
        h = (h ^ h >> 15) * 0x2C1B3C6D & mask
        product = h * drawn
        slot = (base + (product >> 32)) % slots
        result.append((slot * spec.block + col % spec.block, -1 if product >> 31 & 1 else 1))
    return result


def naive_network(elements: list[float], theta: list[float], network: Reconstruction) -> float:
    if network.depth == 0:
        return elements[0]
    if network.depth == 1:
        return sum(m * a for m, a in zip(theta, elements, strict=True))
    parameters = iter(theta)
    values = elements
    for layer in range(network.depth):
        units = 1 if layer == network.depth - 1 else network.width
        weights = [[next(parameters) for _ in values] for _ in range(units)]
        biases = [next(parameters) for _ in range(units)]
        values = [
            sum(w * v for w, v in zip(row, values, strict=True)) + bias
            for row, bias in zip(weights, biases, strict=True)
        ]
        if layer < network.depth - 1:
            relu = network.activation == "relu"
            values = [max(v, 0.0) if relu else math.tanh(v) for v in values]
    assert next(parameters, None) is None
    return values[0]


def naive_weight(case: Case, pool: Tensor, theta: Tensor, scale: float) -> Tensor:
    def entry(row: int, col: int) -> float:
        index = naive_index(case.hash_spec, case.row_offset + row, case.col_offset + col)
        elements = [sign * pool[offset].item() for offset, sign in index]
        return scale * naive_network(elements, theta.tolist(), case.reconstruction)

    entries = [[entry(row, col) for col in range(COLS)] for row in range(ROWS)]
    return torch.tensor(entries, dtype=torch.float64)


@each_case
def test_materialize(case: Case) -> None:
    pool, theta = case.parameters()
    weight = hfh.materialize(pool, theta, ROWS, COLS, scale=0.3, **case.weight, backend="reference")
    expected = naive_weight(case, pool, theta, 0.3)
    assert relative_error(weight, expected) < TOLERANCE[torch.float64]


@each_case
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_linear(case: Case, has_bias: bool) -> None:
    pool, theta = case.parameters()
    input = torch.randn(2, 4, COLS, dtype=torch.float64)
    bias = torch.randn(ROWS, dtype=torch.float64) if has_bias else None
    out = hfh.linear(
        input,
        pool,
        theta,
        bias,
        out_features=ROWS,
        scale=0.3,
        **case.weight,
        backend="reference",
    )
    expected = input @ naive_weight(case, pool, theta, 0.3).T
    if bias is not None:
        expected = expected + bias
    assert relative_error(out, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("learnable_scale", [False, True], ids=["fixed scale", "learnable scale"])
@each_case
def test_derivatives(case: Case, learnable_scale: bool) -> None:
    pool, theta = case.parameters()
    scale = torch.tensor(0.7, dtype=torch.float64)
    inputs = (
        torch.randn(2, COLS, dtype=torch.float64),
        pool,
        theta,
        torch.randn(ROWS, dtype=torch.float64),
        *([scale] if learnable_scale else []),
    )
    for tensor in inputs:
        tensor.requires_grad_()

    def function(
        input: Tensor, pool: Tensor, theta: Tensor, bias: Tensor, scale: Tensor | float = 0.7
    ) -> Tensor:
        return hfh.linear(
            input,
            pool,
            theta,
            bias,
            out_features=ROWS,
            scale=scale,
            **case.weight,
            backend="reference",
        )

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@each_case
def test_derivatives_of_materialize(case: Case) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in case.parameters())

    def function(pool: Tensor, theta: Tensor) -> Tensor:
        return hfh.materialize(pool, theta, ROWS, COLS, **case.weight, backend="reference")

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@each_case
def test_backward_functions(case: Case) -> None:
    pool, theta = (tensor.requires_grad_() for tensor in case.parameters())
    input = torch.randn(2, 4, COLS, dtype=torch.float64, requires_grad=True)
    network = case.reconstruction
    weight = (
        case.hash_spec.seed,
        case.hash_spec.num_hashes,
        case.hash_spec.block,
        case.hash_spec.window or 0,
        case.hash_spec.rows_per_window or 0,
        *(network.depth, network.width, network.activation),
        *(0.3, case.row_offset, case.col_offset),
    )
    out = linear_reference.linear(input, pool, theta, None, ROWS, *weight)
    grad_output = torch.randn_like(out)
    expected = torch.autograd.grad(out, (input, pool, theta), grad_output, materialize_grads=True)
    grads = (
        linear_reference.linear_backward_input(grad_output, pool, theta, COLS, *weight),
        *linear_reference.linear_backward_weight(grad_output, input, pool, theta, *weight),
    )
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference)

    grad_weight = grad_output.flatten(0, 1).T @ input.flatten(0, 1)
    from_weight = materialize_reference.materialize_backward(grad_weight, pool, theta, *weight)
    for grad, reference in zip(from_weight, expected[1:], strict=True):
        torch.testing.assert_close(grad, reference)


@each_case
def test_part_of_a_larger_weight(case: Case) -> None:
    case = dataclasses.replace(case, row_offset=0, col_offset=0)
    pool, theta = case.parameters()
    whole = hfh.materialize(pool, theta, 20, 30, **case.weight, backend="reference")
    part = dataclasses.replace(case, row_offset=11, col_offset=13)
    weight = hfh.materialize(pool, theta, 9, 5, **part.weight, backend="reference")
    assert relative_error(weight, whole[11:, 13:18]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_case
def test_precision(case: Case, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    """Half types round the parameters and the results, not what lies between."""
    case = dataclasses.replace(case, row_offset=0, col_offset=0)
    pool, theta = case.parameters(pool_dtype)
    input = torch.randn(6, 40).to(dtype)
    out = hfh.linear(input, pool, theta, out_features=30, **case.weight, backend="reference")
    assert out.dtype == dtype
    exact = hfh.linear(
        input.double(),
        pool.double(),
        theta.double(),
        out_features=30,
        **case.weight,
        backend="reference",
    )
    assert relative_error(out, exact) < TOLERANCE[dtype]
    weight = hfh.materialize(pool, theta, 30, 40, **case.weight, backend="reference")
    assert weight.dtype == pool_dtype
    exact = hfh.materialize(
        pool.double(), theta.double(), 30, 40, **case.weight, backend="reference"
    )
    assert relative_error(weight, exact) < TOLERANCE[pool_dtype]


def test_gradient_of_a_half_pool_accumulates_in_float32() -> None:
    spec = HashSpec(num_hashes=1, pool_size=1)
    pool = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    theta = torch.zeros(0)
    signs = hfh.hash_index(range(100), range(100), spec)[1][..., 0]
    weight = hfh.materialize(
        pool, theta, 100, 100, hash_spec=spec, reconstruction=Reconstruction(0), backend="reference"
    )
    (grad,) = torch.autograd.grad(weight, pool, signs.to(torch.bfloat16))
    assert grad.dtype == torch.bfloat16
    assert grad.item() == torch.tensor(1e4).bfloat16().item()


def test_autocast() -> None:
    case = CASES[3]
    pool, theta = case.parameters(torch.float32)
    input = torch.randn(6, COLS)
    bias = torch.randn(ROWS)
    arguments = (input, pool, theta, bias)
    exact = hfh.linear(*(a.double() for a in arguments), out_features=ROWS, **case.weight)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            out = hfh.linear(*arguments, out_features=ROWS, **case.weight, backend="reference")
            weight = hfh.materialize(pool, theta, ROWS, COLS, **case.weight, backend="reference")
        assert out.dtype == dtype
        assert relative_error(out, exact) < TOLERANCE[dtype]
        assert weight.dtype == torch.float32
        whole = hfh.materialize(pool, theta, ROWS, COLS, **case.weight, backend="reference")
        assert torch.equal(weight, whole)
