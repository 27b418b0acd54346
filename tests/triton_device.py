"""Where Triton's kernels are tested: on a GPU, else in Triton's interpreter on the CPU.

Tests that run them are marked gpu. ``TRITON_INTERPRET=1 pytest -m gpu`` interprets them.
"""

from __future__ import annotations

import pytest
import torch

from hfh_kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_reason = dispatch.can_run("triton", torch.ones(1, device=DEVICE))

needs_triton = [
    pytest.mark.gpu,
    pytest.mark.skipif(_reason is not None, reason=f"Triton cannot run: {_reason}"),
]
"""For a module's ``pytestmark``."""
