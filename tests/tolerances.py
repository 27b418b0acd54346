"""How close counts as equal: relative error in the 2-norm against the reference in float64."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def relative_error(out: Tensor, ref64: Tensor) -> float:
    """||out - ref64|| / ||ref64||; ||out|| where the reference is zero. NaN if either has one."""
    assert out.shape == ref64.shape
    assert ref64.dtype == torch.float64
    norm = ref64.norm().item()
    return float((out.double() - ref64).norm().item() / (norm or 1.0))
