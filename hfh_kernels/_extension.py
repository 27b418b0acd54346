"""The compiled part, ``hfh_kernels._C``: imported once, here, and reported on.

Importing it registers the C++ kernels of ``torch.ops.hfh``.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import torch

from hfh_kernels.version import __version__


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("hfh_kernels._C"), None
    except ImportError as error:
        warnings.warn(
            f"hfh_kernels: compiled extension not available ({error}); "
            "using the plain PyTorch reference",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, str(error)


_module, _reason = _load()
_available = _module is not None
_has_cuda = _module is not None and _module.build_info()["cuda"] is not None


def available() -> bool:
    """Whether the compiled extension is loaded."""
    return _available


def has_cuda() -> bool:
    """Whether it has CUDA kernels; torch.compile can trace this, unlike build_info."""
    return _has_cuda


def reason() -> str | None:
    """Why the extension is not available; None where it is."""
    return _reason


def build_info() -> dict[str, Any]:
    """What was built and what is in use.

    Always ``version``, ``torch``, ``extension`` (bool) and ``reason`` (None, or why there is no
    extension). With the extension also ``compiler``, ``cpu_capability`` (the instruction set in
    use), ``cpu_capabilities`` (those built), ``cuda`` (None, or the toolkit's ``version`` and the
    architectures as ``code``), ``pybind11`` and ``torch_built_against``.
    """
    built = {} if _module is None else _module.build_info()
    return {
        "version": __version__,
        "torch": torch.__version__,
        "extension": _available,
        "reason": _reason,
        **built,
    }
