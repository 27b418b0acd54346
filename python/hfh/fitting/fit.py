"""Pool and reconstruction networks whose virtual weights approximate given dense ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hfh.fitting.linear import linear_round, linear_start, normalized
from hfh.fitting.nonlinear import nonlinear_round, nonlinear_start
from hfh.fitting.problem import Parameters, Problem, build_problem, rows_by_rank
from hfh.fitting.state import State, StateFile
from hfh.progress import progress_bar
from hfh.text_table import text_table
from hfh_kernels.nn.dense_rows import DenseRows
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.spec import require_int


@dataclass(frozen=True)
class LayerFit:
    """How close one layer's virtual weight V came to its dense weight W.

    Args:
        name: as given to :func:`fit`.
        rows, cols: shape of W, without the rows that the layer keeps dense.
        relative_error: ||V - W|| / ||W||.
        weighted_error: the same in the norm of the layer's importance, which makes it the relative
            error of the layer's output; equal to ``relative_error`` without.
    """

    name: str
    rows: int
    cols: int
    relative_error: float
    weighted_error: float


@dataclass(frozen=True)
class FitReport:
    """What :func:`fit` did.

    Args:
        layers: in the order of its ``weights``.
        pool_size: elements of the pool.
        linear_error, error: the minimised error after the linear rounds and at the end: a mean over
            the layers of squared ``weighted_error``, so that virtual weights of zeros have 1.
        linear_rounds, nonlinear_rounds: how many ran.
    """

    layers: tuple[LayerFit, ...]
    pool_size: int
    linear_error: float
    error: float
    linear_rounds: int
    nonlinear_rounds: int

    @property
    def expected_error(self) -> float:
        """sqrt(1 - pool_size / weights), 0 for a larger pool.

        The relative error to expect without importance: the virtual weights of a linear g, whatever
        the number of hashes, are a subspace of pool_size dimensions that knows nothing of W.
        """
        weights = sum(layer.rows * layer.cols for layer in self.layers)
        return math.sqrt(max(0.0, 1 - self.pool_size / max(1, weights)))

    def table(self) -> str:
        """A line a layer, aligned."""
        headings = ("layer", "rows", "cols", "relative error", "weighted error")
        rows = [
            (
                *(layer.name, f"{layer.rows:,}", f"{layer.cols:,}"),
                *(f"{error:.4f}" for error in (layer.relative_error, layer.weighted_error)),
            )
            for layer in self.layers
        ]
        return text_table(headings, rows)

    def to_json(self) -> str:
        """All fields as one JSON object."""
        return json.dumps({**asdict(self), "expected_error": self.expected_error})


_SMALLEST_LEARNING_RATE = 1e-3
"""Of a nonlinear round: the stage ends before one that is smaller."""


def fit(
    weights: Mapping[HFHLayer, Tensor],
    *,
    importance: Mapping[HFHLayer, Tensor] | None = None,
    names: Mapping[HFHLayer, str] | None = None,
    damping: float = 0.01,
    linear_rounds: int = 20,
    nonlinear_rounds: int = 10,
    tolerance: float = 1e-3,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> FitReport:
    """Set a pool and the theta of all its layers so that virtual weights approximate dense ones.

    Minimised is the sum over the layers of sqrt(elements of W) ||V - W||^2 / ||W||^2: between
    counting every layer alike, which spends the pool on small layers, and every weight alike, which
    neglects them. With a linear g everywhere, rounds of conjugate gradients for the pool and exact
    least squares for the thetas solve it; where some g is deeper, rounds of Adam continue from
    that solution. What pool and thetas hold before does not matter. Memory beyond the weights is
    that of a few pools and a few times 2**22 weights.

    The error of trained weights themselves stays large, see :attr:`FitReport.expected_error`. That
    of the layers' outputs can be small all the same, for their inputs are few and correlated: with
    the second moments of each layer's input (:func:`hfh.second_moments`) as importance it
    is what is minimised. Give them wherever there is data.

    Layers change once, at the end: the pool, every theta, and rows that a layer keeps dense, which
    are copied. Scale stays as it is, as checkpoints compare it; a g of depth 1 or more takes its
    role. A g of depth 0 cannot: give such layers of one pool scales in the ratio of their weights'
    before.

    Args:
        weights: the dense weight of every layer, floating [rows, cols] = ``layer.weight_shape``,
            on any device; row i is that of index i where a layer permutes its rows. All layers have
            the same pool. The row of padding_idx counts as any other.
        importance: for any of the layers, E[x^2] [cols] of its inputs x, or E[x x^T] [cols, cols].
        names: of layers, for the report; by default class and number.
        damping: added to importance, relative to its mean on the diagonal.
        linear_rounds, nonlinear_rounds: at most so many. They cost some 40 and 300 times
            materialising all weights and going back through them.
        tolerance: a linear round that lowers the error by less than this part of it is the last;
            a nonlinear one lowers the learning rate for those after it.
        progress: show progress on standard error.
        checkpoint: a file that is written, whole, after every round, and from which the same call
            continues to the same result. It stays when the fit is done. Needs safetensors.

    Raises:
        ImportError: safetensors is missing.
        OSError: the checkpoint cannot be read or written.
        TypeError: a key is not a layer, or a value not a floating-point tensor.
        ValueError: an argument is empty, out of range, not finite or of the wrong shape; the layers
            have several pools; the checkpoint is damaged or belongs to another fit.
    """
    require_int("linear_rounds", linear_rounds, 1, 2**31)
    require_int("nonlinear_rounds", nonlinear_rounds, 0, 2**31)
    for name, value in (("damping", damping), ("tolerance", tolerance)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, received {value}")
    problem = build_problem(weights, importance or {}, damping)
    limits = _Limits(linear_rounds, nonlinear_rounds, tolerance)
    file = None if checkpoint is None else StateFile(Path(checkpoint), problem, limits)
    state = None if file is None else file.load()
    if state is None:
        state = State(linear_start(problem.linear()))
    most_rounds = limits.total(problem)
    with progress_bar("fitting", most_rounds, progress) as show:
        while state.stage != "done":
            state = _advance(problem, state, limits)
            # A fit that ends early is complete all the same.
            completed = most_rounds if state.stage == "done" else state.rounds
            show(completed, f"error {state.error:.4f}")
            if file is not None:
                file.save(state)
    _set_parameters(weights, problem, state.parameters)
    return _report(weights, names or {}, problem, state)


class _Limits(NamedTuple):
    """When the rounds of each stage end."""

    linear_rounds: int
    nonlinear_rounds: int
    tolerance: float

    def total(self, problem: Problem) -> int:
        return self.linear_rounds + (self.nonlinear_rounds if problem.is_deep else 0)


def _advance(problem: Problem, state: State, limits: _Limits) -> State:
    """One round, which never raises the error, and what follows where it is a stage's last."""
    if state.stage == "linear":
        linear = problem.linear()
        parameters = linear_round(linear, state.parameters)
        state, has_gained = _better(linear, state, parameters, limits.tolerance)
        state = replace(state, linear_rounds=state.linear_rounds + 1, linear_error=state.error)
        if has_gained and state.linear_rounds < limits.linear_rounds:
            return state
        parameters = normalized(linear, state.parameters)
        if problem.is_deep:
            parameters = nonlinear_start(problem, parameters)
        stage = "nonlinear" if problem.is_deep and limits.nonlinear_rounds else "done"
        return replace(state, parameters=parameters, stage=stage, error=problem.error(parameters))
    parameters = nonlinear_round(problem, state.parameters, state.learning_rate)
    state, has_gained = _better(problem, state, parameters, limits.tolerance)
    state = replace(state, nonlinear_rounds=state.nonlinear_rounds + 1)
    if not has_gained:
        state = replace(state, learning_rate=state.learning_rate / 3)
    is_last = (
        state.nonlinear_rounds == limits.nonlinear_rounds
        or state.learning_rate < _SMALLEST_LEARNING_RATE
    )
    return replace(state, stage="done") if is_last else state


def _better(
    problem: Problem, state: State, parameters: Parameters, tolerance: float
) -> tuple[State, bool]:
    """The state, with these parameters where they are better, and whether they are by enough."""
    error = problem.error(parameters)
    has_gained = error < (1 - tolerance) * state.error
    if error < state.error:
        state = replace(state, parameters=parameters, error=error)
    return state, has_gained


@torch.no_grad()
def _set_parameters(
    weights: Mapping[HFHLayer, Tensor], problem: Problem, parameters: Parameters
) -> None:
    next(iter(weights)).pool.weight.copy_(parameters.pool)
    for target in problem.targets:
        layer = target.layer
        layer.theta.copy_(parameters.thetas[target.theta])
        dense = layer.dense if isinstance(layer, DenseRows) else None
        if dense is not None:
            dense.copy_(rows_by_rank(layer, weights[layer])[: target.row_offset])


def _report(
    weights: Mapping[HFHLayer, Tensor],
    names: Mapping[HFHLayer, str],
    problem: Problem,
    state: State,
) -> FitReport:
    """The errors of what the layers hold, rounded to their dtype."""
    layers = []
    for index, target in enumerate(problem.targets):
        layer = target.layer
        pool, theta = (
            tensor.detach().to(state.parameters.pool) for tensor in (layer.pool.weight, layer.theta)
        )
        errors = target.errors(pool, theta, layer.reconstruction)
        name = names.get(layer, f"{type(layer).__name__} {index}")
        rows, cols = target.weight.shape
        layers.append(LayerFit(name, rows, cols, *errors))
    return FitReport(
        tuple(layers),
        state.parameters.pool.numel(),
        state.linear_error,
        state.error,
        state.linear_rounds,
        state.nonlinear_rounds,
    )
