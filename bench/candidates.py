"""What is measured against what: our layer, the dense one, and materialise-then-multiply."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bench.shapes import IN_FEATURES, OUT_FEATURES, Row
from hfh_kernels import functional
from hfh_kernels.nn import HFHLinear, Pool

Candidate = Callable[[], object]


def candidates(
    row: Row, batch: int, layers: Sequence[HFHLinear], dense_weights: Sequence[Tensor]
) -> dict[str, Candidate]:
    """One call of each candidate; from call to call it goes round the layers, or the weights."""
    input = torch.randn(batch, IN_FEATURES, dtype=row.dtype, requires_grad=row.backward)
    grad_output = torch.randn(batch, OUT_FEATURES, dtype=row.dtype)
    next_layer = itertools.cycle(layers).__next__
    next_materialized = itertools.cycle(layers).__next__
    next_weight = itertools.cycle(dense_weights).__next__

    def run(output: Tensor, *parameters: Tensor) -> object:
        return torch.autograd.grad(output, (input, *parameters), grad_output)

    def hfh() -> object:
        layer = next_layer()
        return run(layer(input), layer.pool.weight, layer.theta)

    def materialized() -> object:
        layer = next_materialized()
        return run(linear(input, layer.materialize()), layer.pool.weight, layer.theta)

    def dense() -> object:
        weight = next_weight()
        return run(linear(input, weight), weight)

    if row.backward:
        return {"dense": dense, "materialize + linear": materialized, "hfh": hfh}
    return {
        "dense": torch.no_grad()(lambda: linear(input, next_weight())),
        "materialize + linear": torch.no_grad()(
            lambda: linear(input, next_materialized().materialize())
        ),
        "hfh": torch.no_grad()(lambda: next_layer()(input)),
    }


def training_step(
    row: Row, batch: int, layer: HFHLinear, dense_weight: torch.nn.Parameter
) -> dict[str, Candidate]:
    """Forward, backward and Adam."""
    input = torch.randn(batch, IN_FEATURES, dtype=row.dtype)
    grad_output = torch.randn(batch, OUT_FEATURES, dtype=row.dtype)

    def step(forward: Callable[[], Tensor], parameters: list[torch.nn.Parameter]) -> Candidate:
        optimizer = torch.optim.Adam(parameters, lr=1e-6)

        def run() -> None:
            optimizer.zero_grad()
            forward().backward(grad_output)
            optimizer.step()

        return run

    return {
        "dense": step(lambda: linear(input, dense_weight), [dense_weight]),
        "hfh": step(lambda: layer(input), list(layer.parameters())),
    }


def overhead_candidates() -> dict[str, Candidate]:
    """One call on a 64 x 64 layer at batch 1, where little but the call itself takes time."""
    pool = Pool(256)
    layer, dense = HFHLinear(64, 64, pool=pool), nn.Linear(64, 64)
    input = torch.randn(1, 64)
    return {
        "F.linear": lambda: linear(input, dense.weight, dense.bias),
        "functional.linear": lambda: functional.linear(
            input,
            pool.weight,
            layer.theta,
            layer.bias,
            out_features=64,
            hash_spec=layer.hash_spec,
            reconstruction=layer.reconstruction,
            scale=layer.scale,
        ),
        "nn.Linear": lambda: dense(input),
        "HFHLinear": lambda: layer(input),
    }
