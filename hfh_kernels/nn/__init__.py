"""Layers whose weights are computed from a shared pool."""

from hfh_kernels.nn.linear import HFHLinear
from hfh_kernels.nn.pool import Pool

__all__ = ["HFHLinear", "Pool"]
