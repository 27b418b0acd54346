"""Triton's kernels compiled for GPUs that need not be there: what the shipped tiles come to."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, and the interpreter does not", allow_module_level=True)

from bench import compiled
from bench.shapes import PLAIN
from hfh_kernels.ops.library import Weight
from hfh_kernels.ops.linear import triton as linear_triton

CALLS = {name: call for name, call in compiled.all_calls().items() if PLAIN in name}
SMALLEST, LARGEST = (f"batch {rows}" for rows in (16, 256))
CASES = [
    *[(name, 90) for name in CALLS if name.endswith((SMALLEST, LARGEST)) or "linear" not in name],
    *[(name, arch) for name in CALLS if name.endswith(LARGEST) for arch in (80, 100)],
]


@pytest.mark.parametrize(("name", "arch"), CASES, ids=str)
def test_shipped_tiles(name: str, arch: int) -> None:
    for row in compiled.report({name: CALLS[name]}, (arch,)):
        assert row.registers <= 255
        assert row.spilled_bytes == 0
        assert row.shared_bytes <= compiled.DEVICES[arch].shared_memory
        if "linear" in name or "conv2d" in name:
            assert row.tensor_instructions > 0
            # The weight's gradient gathers once, after the product.
            assert row.async_copies > 0 or "backward_weight" in name


def test_a_spill_is_seen() -> None:
    """The figures come from reading machine code: a kernel that must spill has to show."""
    name = next(name for name in CALLS if name.startswith("linear ") and name.endswith(LARGEST))
    (launch,) = compiled.launches(CALLS[name], compiled.DEVICES[90])
    crowded = compiled.Launch(
        launch.kernel, launch.arguments, {**launch.keywords, "TILE_K": 128, "num_warps": 4}
    )
    assert compiled.compile_launch(crowded, name, 90).spilled_bytes > 0


@pytest.mark.parametrize(
    ("weight", "pool_size", "batch", "deterministic"),
    [
        (
            Weight(2**32 - 1, 3, 16, 160, 8, 3, 5, "tanh", 0.7, 2**31 + 3, 2**31 + 61),
            800,
            17,
            False,
        ),
        (Weight(1, 4, 64, 0, 0, 2, 4, "relu", 1.0, 1, 0), 640, 1, True),
    ],
    ids=["window, tanh, past 2**31", "ones, deterministic"],
)
def test_options_compile(
    weight: Weight, pool_size: int, batch: int, deterministic: bool, request: pytest.FixtureRequest
) -> None:
    """The interpreter takes what the compiler refuses, such as integers of two kinds."""
    if deterministic:
        request.getfixturevalue("poisoned_memory")
    rows, cols = 300, 261
    num_parameters = weight.reconstruction().num_parameters(weight.num_hashes)
    input, grad = (torch.empty(batch, size, device="meta") for size in (cols, rows))
    pool, theta, bias = (torch.empty(n, device="meta") for n in (pool_size, num_parameters, rows))
    for call in (
        lambda: linear_triton.linear(input, pool, theta, bias, rows, *weight),
        lambda: linear_triton.linear_backward_input(grad, pool, theta, cols, *weight),
        lambda: linear_triton.linear_backward_weight(grad, input, pool, theta, *weight),
    ):
        (launch,) = compiled.launches(call, compiled.DEVICES[90])
        compiled.compile_launch(launch, "", 90)
