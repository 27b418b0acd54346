"""The benchmarks for a GPU run: every candidate of their CUDA kernels once, emulated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_cases import cuda_cases
from tests.cuda_device import EMULATED, needs_cuda

pytestmark = [
    *needs_cuda,
    pytest.mark.skipif(not EMULATED, reason="bench/gpu.sh runs them on a GPU"),
]
ROOT = Path(__file__).parents[1]


def check(*module: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-m", *module], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_every_case_runs() -> None:
    lines = check("bench.gpu", "--check", "cuda")
    for case in cuda_cases("cpu", check=True):
        assert any(line.startswith(case.what) and case.kind in line for line in lines), case.what


def test_every_launch_for_a_profiler_runs() -> None:
    check("bench.gpu_profile", "--check")
