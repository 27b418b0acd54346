"""Where the CUDA kernels are tested: on a GPU, else on the CPU by tests/cuda_emulator.

Tests that run them are marked cuda. ``HFH_EMULATE_CUDA=1 pytest -m cuda`` emulates them: the
emulator's operators then take the place of the CPU's, in the whole process.
"""

from __future__ import annotations

import os

import pytest
import torch

import hfh_kernels
from tests.cuda_emulator import build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# cuBLAS refuses without it where algorithms have to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
EMULATED = DEVICE == "cpu" and os.environ.get("HFH_EMULATE_CUDA") == "1"


def _reason() -> str | None:
    """Why the kernels cannot run; None where they can."""
    if not hfh_kernels.build_info()["extension"]:
        return "the compiled extension is not available"
    if DEVICE == "cuda" and hfh_kernels.build_info()["cuda"] is None:
        return "the extension is built without CUDA kernels"
    if DEVICE == "cpu" and not EMULATED:
        return "no GPU, and HFH_EMULATE_CUDA=1 is not set"
    return None


needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(_reason() is not None, reason=f"CUDA kernels cannot run: {_reason()}"),
]
"""For a module's ``pytestmark``."""

if EMULATED and _reason() is None:
    torch.ops.load_library(build.build())
