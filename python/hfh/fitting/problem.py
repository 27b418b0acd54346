"""What :func:`hfh.fit` was asked for, checked and put into the minimiser's terms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hfh.fitting.error import Target, squared_error
from hfh_kernels.nn.dense_rows import DenseRows
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.spec import Reconstruction


class Parameters(NamedTuple):
    """What is fitted: the pool [pool_size] and g's parameters, each [num_parameters]."""

    pool: Tensor
    thetas: list[Tensor]


class Problem(NamedTuple):
    """The targets, and the form of g and the number of its inputs behind each theta."""

    targets: Sequence[Target]
    networks: Sequence[Reconstruction]
    num_hashes: Sequence[int]

    @property
    def is_deep(self) -> bool:
        """Whether some g is not linear."""
        return any(network.depth > 1 for network in self.networks)

    def linear(self) -> Problem:
        """The same with a linear g in place of every deeper one."""
        networks = [Reconstruction(min(network.depth, 1)) for network in self.networks]
        return self._replace(networks=networks)

    def error(self, parameters: Parameters) -> float:
        """The squared error that is minimised."""
        return squared_error(self.targets, *parameters, self.networks).value


def build_problem(
    weights: Mapping[HFHLayer, Tensor], importance: Mapping[HFHLayer, Tensor], damping: float
) -> Problem:
    """The targets of these layers; the factors on their squared errors make weights of zero give 1.

    Arguments and errors are those of :func:`hfh.fit`.
    """
    if not weights:
        raise ValueError("weights must have at least one layer")
    for layer, weight in weights.items():
        _require_weight(layer, weight)
    for layer, moments in importance.items():
        if layer not in weights:
            raise ValueError(f"importance has a layer that weights has not: {layer}")
        _require_importance(layer, moments)
    num_pools = len({layer.pool for layer in weights})
    if num_pools > 1:
        raise ValueError(f"weights must be of layers of one pool, received {num_pools} pools")

    forms: dict[int, tuple[int, Reconstruction]] = {}
    targets = []
    for layer, weight in weights.items():
        form = (layer.hash_spec.num_hashes, layer.reconstruction)
        if forms.setdefault(id(layer.theta), form) != form:
            raise ValueError("layers that share theta must have the same num_hashes and g")
        offset = layer.dense_rows if isinstance(layer, DenseRows) else 0
        target = Target(
            layer=layer,
            weight=rows_by_rank(layer, weight)[offset:].detach(),
            row_offset=offset,
            importance=_damped(layer, importance.get(layer), damping),
            factor=1.0,
            theta=list(forms).index(id(layer.theta)),
        )
        targets.append(target)
    shares = [target.weight.numel() ** 0.5 for target in targets]
    return Problem(
        [
            replace(target, factor=share / (sum(shares) or 1.0) / (_squared_norm(target) or 1.0))
            for target, share in zip(targets, shares, strict=True)
        ],
        [network for _, network in forms.values()],
        [num_hashes for num_hashes, _ in forms.values()],
    )


def rows_by_rank(layer: HFHLayer, weight: Tensor) -> Tensor:
    """The rows of a dense weight in the order of the layer's virtual weight."""
    permutation = layer.permutation if isinstance(layer, DenseRows) else None
    return weight if permutation is None else weight[permutation.argsort().to(weight.device)]


def _squared_norm(target: Target) -> float:
    total = 0.0
    for _, rows in target.strips():
        matrix = rows.to(target.layer.pool.weight.device, target.dtype)
        total += float((target.weigh(matrix) * matrix).sum())
    if not math.isfinite(total):
        raise ValueError(f"weights must have squares in the range of {target.dtype}, received more")
    return total


def _damped(layer: HFHLayer, moments: Tensor | None, damping: float) -> Tensor | None:
    if moments is None:
        return None
    pool = layer.pool.weight
    dtype = torch.promote_types(pool.dtype, torch.float32)
    moments = moments.detach().to(pool.device, dtype)
    if moments.dim() == 1:
        return moments + damping * moments.mean()
    return moments + torch.diag_embed((damping * moments.diagonal().mean()).expand(len(moments)))


def _require_weight(layer: HFHLayer, weight: Tensor) -> None:
    if not isinstance(layer, HFHLayer):
        raise TypeError(f"weights must map from HFHLayers, received {type(layer).__name__}")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        received = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weights must be floating-point tensors, received {received} for {layer}")
    if weight.shape != layer.weight_shape:
        raise ValueError(
            f"weights must have shape {list(layer.weight_shape)} for {layer}, "
            f"received {list(weight.shape)}"
        )
    if not weight.isfinite().all():
        raise ValueError(f"weights must be finite, received infinite or NaN ones for {layer}")


def _require_importance(layer: HFHLayer, moments: Tensor) -> None:
    if not isinstance(moments, Tensor) or not moments.is_floating_point():
        received = moments.dtype if isinstance(moments, Tensor) else type(moments).__name__
        raise TypeError(
            f"importance must be floating-point tensors, received {received} for {layer}"
        )
    cols = layer.weight_shape[1]
    if moments.shape not in ((cols,), (cols, cols)):
        raise ValueError(
            f"importance must have shape [{cols}] or [{cols}, {cols}] for {layer}, "
            f"received {list(moments.shape)}"
        )
    diagonal = moments if moments.dim() == 1 else moments.diagonal()
    if not (moments.isfinite().all() and (diagonal >= 0).all()):
        raise ValueError(f"importance must be finite and at least 0, received others for {layer}")
    if moments.dim() == 2 and not torch.allclose(
        moments, moments.T, atol=1e-5 * float(diagonal.max())
    ):
        raise ValueError(f"importance must be a symmetric matrix for {layer}")
