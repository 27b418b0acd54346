"""Where the CUDA kernels are tested: on a GPU, else on the CPU by tests/cuda_emulator.

Tests that run them are marked cuda. ``HFH_EMULATE_CUDA=1 pytest -m cuda`` emulates them: the
emulator's operators then take the place of the CPU's, in the whole process.
"""

from __future__ import annotations

import os

import pytest
import torch

import hfh_kernels  # noqa: F401  The operators must be defined before they are replaced.
from tests.cuda_emulator import build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMULATED = DEVICE == "cpu" and os.environ.get("HFH_EMULATE_CUDA") == "1"

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        DEVICE == "cpu" and not EMULATED, reason="no GPU, and HFH_EMULATE_CUDA=1 is not set"
    ),
]
"""For a module's ``pytestmark``."""

if EMULATED:
    torch.ops.load_library(build.build())
