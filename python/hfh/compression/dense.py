"""A compressed model back as a plain dense one."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from hfh.compression import fast_path, kinds
from hfh.compression.kinds import Kind
from hfh_kernels.nn import HFHEmbedding, HFHEmbeddingBag
from hfh_kernels.nn.layer import HFHLayer

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def materialize(model: ModuleType) -> ModuleType:
    """A copy of a model with layers of torch.nn, and stored weights, in place of hashed ones.

    Outputs are the same; only where there is padding does torch's transformer encoder, in
    inference, put zeros, which a compressed one does not. The model itself stays as it is. Tied
    weights stay tied, but for one case: an embedding with ``padding_idx`` and an output projection
    that share a table. There the projection has a virtual row where the embedding has zeros, and
    each gets a weight of its own.

    Raises:
        ValueError: model has a layer over a pool of a class that is not of hfh_kernels or hfh.
    """
    weights: dict[Any, nn.Parameter] = {}
    copies: dict[int, Any] = {}
    served: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in served:
            continue
        kind = kinds.of_hashed(module)
        if kind is not None:
            copies[id(module)] = _dense(module, kind, weights, copies)
            served.update(module.modules())
        elif isinstance(module, HFHLayer):
            raise ValueError(f"model has a layer of unknown class, {name}: {type(module).__name__}")
    dense = copy.deepcopy(model, copies)
    fast_path.restore(dense)
    return dense


def _dense(
    hashed: nn.Module, kind: Kind, weights: dict[Any, nn.Parameter], copies: dict[int, Any]
) -> nn.Module:
    """torch's module of the same outputs; ``copies`` are deepcopy's, for ties among biases."""
    dense = kind.dense(**kind.arguments(hashed), device="meta")
    for place, path in kind.weights(hashed).items():
        layer = hashed.get_submodule(place)
        shape = kinds.attribute(dense, path).shape
        kinds.set_attribute(dense, path, _weight(layer, shape, weights))
    for place, path in kind.others(hashed).items():
        kinds.set_attribute(dense, path, copy.deepcopy(kinds.attribute(hashed, place), copies))
    return dense.train(hashed.training)


def _weight(layer: nn.Module, shape: torch.Size, weights: dict[Any, nn.Parameter]) -> nn.Parameter:
    """The layer's weight, the same parameter for layers that share all that it is made of."""
    assert isinstance(layer, HFHLayer)
    parts = (layer.pool, layer.theta, *(getattr(layer, x, None) for x in ("dense", "permutation")))
    padding = layer.padding_idx if isinstance(layer, (HFHEmbedding, HFHEmbeddingBag)) else None
    key = (*map(id, parts), layer.hash_spec, layer.reconstruction, layer.scale, padding, shape)
    if key not in weights:
        trained = layer.pool.weight.requires_grad
        weights[key] = nn.Parameter(layer.materialize().detach(), trained)
    return weights[key]
