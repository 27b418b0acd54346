"""Homologically functional hashing: layers whose weights are computed from one small pool."""

from hfh_kernels import functional, nn
from hfh_kernels._extension import build_info
from hfh_kernels.spec import HashSpec, Reconstruction
from hfh_kernels.version import __version__

__all__ = [
    "HashSpec",
    "Reconstruction",
    "__version__",
    "build_info",
    "functional",
    "nn",
]
