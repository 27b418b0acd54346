"""Which implementation runs.

"cpu" is the compiled extension's, "cuda" its kernels on GPUs, "triton" runs on GPUs too, or where
TRITON_INTERPRET=1 in Triton's interpreter on the CPU, "reference" is plain PyTorch; "auto" takes
the first that can run. On GPUs it asks for each call whether the "cuda" kernels take it, else it
is Triton's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hfh_kernels import _extension, _triton

_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float64, torch.int64})
_GPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.int64})


def _cpu_reason(tensors: tuple[Tensor, ...]) -> str | None:
    if not _extension.available():
        return f"the compiled extension is not available: {_extension.reason()}"
    if _triton.interpreted():
        return "TRITON_INTERPRET=1 gives tensors on the CPU to Triton's interpreter"
    num_float64 = 0
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"it takes tensors on the CPU, received one on {tensor.device}"
        if tensor.dtype not in _CPU_DTYPES:
            return f"it does not support {tensor.dtype}"
        if tensor.dtype == torch.float64:
            num_float64 += 1
    if num_float64 not in (0, len(tensors)):
        return "it does not mix torch.float64 with other dtypes"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") not in _CPU_DTYPES:
        return f"it does not support autocast to {torch.get_autocast_dtype('cpu')}"
    return None


def _cuda_reason(tensors: tuple[Tensor, ...]) -> str | None:
    if not _extension.available():
        return f"the compiled extension is not available: {_extension.reason()}"
    if not _extension.has_cuda():
        return "the extension was built without it: it needs nvcc and a PyTorch for CUDA"
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"it takes tensors on cuda, received one on {tensor.device}"
        if tensor.dtype not in _GPU_DTYPES:
            return f"it does not support {tensor.dtype}"
    return None


def _triton_reason(tensors: tuple[Tensor, ...]) -> str | None:
    if _triton.reason() is not None:
        return _triton.reason()
    if not _extension.available():
        return f"it needs the compiled extension, which differentiates: {_extension.reason()}"
    device_type = "cpu" if _triton.interpreted() else "cuda"
    for tensor in tensors:
        if tensor.device.type != device_type:
            return f"it takes tensors on {device_type}, received one on {tensor.device}"
        if tensor.dtype not in _GPU_DTYPES:
            return f"it does not support {tensor.dtype}"
    return None


def _reference_reason(tensors: tuple[Tensor, ...]) -> str | None:
    return None


_REASONS: dict[str, Callable[[tuple[Tensor, ...]], str | None]] = {
    "cpu": _cpu_reason,
    "cuda": _cuda_reason,
    "triton": _triton_reason,
    "reference": _reference_reason,
}
"""Each backend's limits, in the order that auto tries them."""

BACKENDS = tuple(_REASONS)

ON_GPUS = ("cuda", "triton")
"""Those that one operator has on one device."""


def can_run(backend: str, *tensors: Tensor) -> str | None:
    """Why a backend cannot run on these tensors; None where it can.

    Raises:
        ValueError: there is no such backend.
    """
    if backend not in _REASONS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, received {backend!r}")
    return _REASONS[backend](tensors)


def choose(backend: str, *tensors: Tensor, lacking: str | None = None) -> str:
    """The backend that runs: the first that can for "auto", else the one asked for.

    Args:
        lacking: a backend that has not this operator.

    Raises:
        RuntimeError: the backend asked for cannot run.
        ValueError: there is no such backend.
    """
    if backend == "auto":
        for name, reason_of in _REASONS.items():
            if name != lacking and reason_of(tensors) is None:
                return name
    reason = can_run(backend, *tensors)
    if backend == lacking:
        reason = "it has no such operator"
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    return backend


def explain(*tensors: Tensor) -> str:
    """What "auto" picks for these tensors, and why it refused the backends before that."""
    lines = []
    for backend in BACKENDS:
        reason = can_run(backend, *tensors)
        lines.append(f"{backend}: {reason or 'chosen'}")
        if reason is None:
            break
    return "\n".join(lines)
