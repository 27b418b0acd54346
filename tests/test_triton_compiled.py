"""Triton's kernels compiled for GPUs that need not be there: what the shipped tiles come to."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, and the interpreter does not", allow_module_level=True)

from bench import compiled
from bench.shapes import PLAIN

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
