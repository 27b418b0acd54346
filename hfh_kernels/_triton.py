"""Whether Triton's kernels can be had, without importing Triton."""

from __future__ import annotations

import importlib.util
import os

_found = importlib.util.find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"


def reason() -> str | None:
    """Why there are no Triton kernels; None where there are."""
    return None if _found else "Triton is not installed; pip install triton"


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 gave tensors on the CPU to Triton's interpreter at the start."""
    return _found and _interpreted
