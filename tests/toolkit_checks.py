"""A hashed layer against torch's with the materialised weights: values and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import hfh.compression.compress
import hfh.compression.dense
from hfh.compression import kinds
from hfh.compression.report import Report
from hfh_kernels.nn.layer import HFHLayer
from tests.tolerances import relative_error

# Models whose parts are named in the tests have no type that knows those names.
compress: Callable[..., tuple[Any, Report]] = hfh.compression.compress.compress
materialize: Callable[..., Any] = hfh.compression.dense.materialize

TOLERANCE = 1e-9
"""In float64, over many products in another order."""


def beside(layer: nn.Module) -> Any:
    """A model that can be compressed whatever becomes of the layer in it."""
    model = nn.Sequential()
    model.add_module("large", nn.Linear(256, 256))
    model.add_module("layer", layer)
    return model


def assert_same_as_dense(
    hashed: nn.Module, run: Callable[[nn.Module], Any], inputs: Iterable[Tensor]
) -> None:
    """``run`` on both modules, in float64; ``inputs`` are those of its tensors that need grads."""
    dense = materialize(hashed)
    kind = kinds.of_hashed(hashed)
    assert kind is not None
    assert type(dense) is kind.dense
    inputs = list(inputs)
    outputs, expected = list(tensors(run(hashed))), list(tensors(run(dense)))
    assert outputs
    for output, reference in zip(outputs, expected, strict=True):
        assert output.dtype == torch.float64
        assert relative_error(output, reference) < TOLERANCE

    cotangents = [torch.randn_like(reference) for reference in expected]
    others = [
        (kinds.attribute(hashed, place), kinds.attribute(dense, path))
        for place, path in kind.others(hashed).items()
        if kinds.attribute(hashed, place) is not None
    ]
    layers = [hashed.get_submodule(place) for place in kind.weights(hashed)]
    weights = [kinds.attribute(dense, path) for path in kind.weights(hashed).values()]
    pool: Tensor = layers[0].pool.weight  # type: ignore[assignment, union-attr]
    thetas: list[Tensor] = [layer.theta for layer in layers]  # type: ignore[misc]
    mine = gradients(outputs, [pool, *thetas, *inputs, *(own for own, _ in others)], cotangents)
    theirs = gradients(expected, [*weights, *inputs, *(other for _, other in others)], cotangents)
    virtual = [layer.materialize() for layer in layers if isinstance(layer, HFHLayer)]
    of_weights = [grad.view_as(weight) for grad, weight in zip(theirs, virtual, strict=False)]
    reference_grads = [
        *gradients(virtual, [pool, *thetas], of_weights),
        *theirs[len(weights) :],
    ]
    for grad, reference in zip(mine, reference_grads, strict=True):
        assert relative_error(grad, reference) < TOLERANCE


def gradients(
    outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
    )


def tensors(value: Any) -> Iterator[Tensor]:
    """Those within nested tuples, PackedSequences included."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)
