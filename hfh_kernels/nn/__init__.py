"""Layers whose weights are computed from a shared pool."""

from hfh_kernels.nn.embedding import HFHEmbedding, HFHEmbeddingBag
from hfh_kernels.nn.linear import HFHLinear
from hfh_kernels.nn.pool import Pool

__all__ = ["HFHEmbedding", "HFHEmbeddingBag", "HFHLinear", "Pool"]
