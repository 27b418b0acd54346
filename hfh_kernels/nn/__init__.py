"""Layers whose weights are computed from a shared pool."""

from hfh_kernels.nn.convolution import HFHConv1d, HFHConv2d
from hfh_kernels.nn.embedding import HFHEmbedding, HFHEmbeddingBag
from hfh_kernels.nn.linear import HFHLinear
from hfh_kernels.nn.pool import Pool

__all__ = ["HFHConv1d", "HFHConv2d", "HFHEmbedding", "HFHEmbeddingBag", "HFHLinear", "Pool"]
