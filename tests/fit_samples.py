"""Layers over one pool and dense weights to fit them to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfh_kernels.nn import HFHConv2d, HFHEmbedding, HFHLinear, Pool
from hfh_kernels.nn.layer import HFHLayer

PERMUTATION = torch.randperm(50, generator=torch.Generator().manual_seed(1))


def make_layers(
    pool_size: int = 128, dtype: torch.dtype | None = None, **options: Any
) -> list[HFHLayer]:
    """Layers of three kinds over one pool, 1024 + 576 + 720 virtual weights."""
    arguments: dict[str, Any] = {
        "pool": Pool(pool_size, dtype=dtype),
        "dtype": dtype,
        "depth": 1,
        "block": 4,
        **options,
    }
    return [
        HFHLinear(32, 32, **arguments),
        HFHConv2d(4, 16, 3, **arguments),
        HFHEmbedding(50, 16, dense_rows=5, permutation=PERMUTATION, **arguments),
    ]


def dense_weights(layers: list[HFHLayer]) -> list[Tensor]:
    return [layer.materialize().detach().reshape(layer.weight_shape) for layer in layers]


def random_weights(layers: list[HFHLayer]) -> dict[HFHLayer, Tensor]:
    """Of sizes that differ from layer to layer."""
    return {layer: torch.randn(layer.weight_shape) / 3**index for index, layer in enumerate(layers)}


def parameters_of(layers: list[HFHLayer]) -> list[Tensor]:
    return [
        layers[0].pool.weight.detach().clone(),
        *(layer.theta.detach().clone() for layer in layers),
    ]
