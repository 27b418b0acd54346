"""A small model whose layers share a pool, and questions about such models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hfh_kernels.nn import HFHLinear, Pool


def make_model(pool_size: int = 1024) -> nn.Sequential:
    pool = Pool(pool_size)
    return nn.Sequential(
        HFHLinear(12, 16, pool=pool),
        nn.ReLU(),
        HFHLinear(16, 16, pool=pool, depth=1, bias=False),
        nn.ReLU(),
        HFHLinear(16, 5, pool=pool, block=8),
    )


def run(model: nn.Module) -> Tensor:
    out: Tensor = model(torch.linspace(-1, 1, 36).view(3, 12))
    return out


def pool_names(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if name.endswith("pool.weight")]


def pools(model: nn.Module) -> set[Pool]:
    return {module for module in model.modules() if isinstance(module, Pool)}


def seeds(model: nn.Module) -> list[int]:
    return [layer.hash_spec.seed for layer in model.modules() if isinstance(layer, HFHLinear)]
