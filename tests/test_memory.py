"""What the compiled kernels touch, and how much they take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.shapes import CONVOLUTIONS, Images
from hfh_kernels import dispatch

pytestmark = [
    pytest.mark.skipif(
        dispatch.can_run("cpu", torch.ones(1)) is not None, reason="needs the compiled extension"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux"),
]

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("batch", "dtype", "block", "mebibytes"),
    [
        (128, "float32", 64, 8),
        (1, "float32", 64, 8),
        (32, "float32", 1, 8),
        # The float32 form of the pool's gradient, of each thread.
        (128, "bfloat16", 64, 12),
    ],
)
def test_peak_of_a_large_layer(batch: int, dtype: str, block: int, mebibytes: int) -> None:
    """Over arguments, outputs and gradients; the virtual weight would take 64 MiB."""
    result = run_python("-m", "bench.peak_memory", str(batch), dtype, str(block))
    assert result.returncode == 0, result.stderr
    forward, backward = map(int, result.stdout.split())
    assert max(forward, backward) <= mebibytes * 2**20


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=lambda shape: shape.name)
def test_peak_of_a_convolution(shape: Images) -> None:
    """Over arguments, outputs and gradients, whatever the weight's and the patches' sizes."""
    result = run_python("-m", "bench.convolution", "--memory", str(CONVOLUTIONS.index(shape)))
    assert result.returncode == 0, result.stderr
    forward, backward = map(int, result.stdout.split())
    assert max(forward, backward) <= 8 * 2**20


CHECKED_HEAP = {
    "LD_PRELOAD": "libc_malloc_debug.so.0",
    "GLIBC_TUNABLES": "glibc.malloc.check=3",
}


@pytest.mark.parametrize("guards", ["end", "begin"])
def test_nothing_outside_the_tensors_is_touched(guards: str) -> None:
    caught = run_python("-m", "tests.memory_guards", "touch")
    assert caught.returncode == -signal.SIGSEGV
    heap_is_checked = (
        run_python("-m", "tests.memory_guards", "overrun", **CHECKED_HEAP).returncode
        == -signal.SIGABRT
    )
    result = run_python(
        "-m", "tests.memory_guards", guards, **(CHECKED_HEAP if heap_is_checked else {})
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "survived\n"
