from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hfh.fitting.error
from hfh.fitting.error import squared_error
from hfh.fitting.fit import FitReport, fit
from hfh.fitting.linear import _conjugate_gradients, linear_round, linear_start
from hfh.fitting.nonlinear import nonlinear_start
from hfh.fitting.problem import Parameters, build_problem
from hfh_kernels.functional import hash_index, materialize
from hfh_kernels.nn import HFHEmbedding, HFHLinear, Pool
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.ops.materialize.reference import split_theta
from hfh_kernels.spec import Reconstruction
from tests.fit_samples import (
    PERMUTATION,
    dense_weights,
    make_layers,
    parameters_of,
    random_weights,
)
from tests.tolerances import relative_error

# The package may export the function under the same name.
fit_module = importlib.import_module("hfh.fitting.fit")

pytestmark = pytest.mark.usefixtures("one_thread")


def error_of(layer: HFHLayer, weight: Tensor, moments: Tensor | None = None) -> float:
    """||V - W|| / ||W|| in the norm of the moments."""
    moments = torch.eye(weight.shape[1]) if moments is None else moments
    if moments.dim() == 1:
        moments = moments.diag()

    residual = dense_weights([layer])[0] - weight
    error, norm = (torch.trace(m @ moments @ m.T) for m in (residual, weight))
    return float((error / norm).sqrt())


def second_moment(cols: int) -> Tensor:
    """Of few correlated inputs: what makes importance worth having."""
    inputs = torch.randn(200, 4) @ torch.randn(4, cols) + 0.1 * torch.randn(200, cols)
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 0, "num_hashes": 1},
        {"num_hashes": 2, "block": 1},
        {"block": 8, "window": 64, "rows_per_window": 8},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_recovers_weights_that_came_from_a_pool(options: dict[str, Any]) -> None:
    wanted = dense_weights(make_layers(**options))
    layers = make_layers(**options)
    report = fit(dict(zip(layers, wanted, strict=True)))
    for layer, weight, row in zip(layers, wanted, report.layers, strict=True):
        assert relative_error(dense_weights([layer])[0], weight.double()) < 1e-5
        assert row.relative_error < 1e-5
        assert row.weighted_error < 1e-5


def test_one_hash_gives_the_signed_mean_of_a_slots_weights() -> None:
    layer = make_layers(num_hashes=1, depth=0, block=1)[0]
    weight = torch.randn(layer.weight_shape)
    fit({layer: weight})
    offsets, signs = hash_index(range(32), range(32), layer.hash_spec)
    sums = torch.zeros(128).index_add(0, offsets.flatten(), signs.flatten() * weight.flatten())
    counts = offsets.flatten().bincount(minlength=128)
    mean = sums / counts.clamp(min=1) / layer.scale
    torch.testing.assert_close(layer.pool.weight.detach(), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [None, "diagonal", "matrix"])
def test_a_round_solves_the_least_squares_problem_of_the_pool(shape: str | None) -> None:
    """Against numpy's solver on the matrix that the kernels never make."""
    numpy = pytest.importorskip("numpy")
    layer = HFHLinear(24, 40, pool=Pool(64, dtype=torch.float64), depth=1, block=2)
    weight = torch.randn(40, 24, dtype=torch.float64)
    inputs = torch.randn(100, 24, dtype=torch.float64)
    moments = inputs.T @ inputs / 100
    importance = {None: None, "diagonal": moments.diagonal(), "matrix": moments}[shape]
    problem = build_problem({layer: weight}, {} if importance is None else {layer: importance}, 0.0)
    parameters = linear_start(problem)
    for _ in range(3):
        # Conjugate gradients start again from where they were; theta stays.
        pool = linear_round(problem, parameters).pool
        parameters = Parameters(pool, parameters.thetas)

    def column(unit: Tensor) -> Tensor:
        return materialize(
            unit,
            parameters.thetas[0],
            40,
            24,
            hash_spec=layer.hash_spec,
            reconstruction=layer.reconstruction,
            scale=layer.scale,
        )

    if importance is None:
        root = torch.eye(24, dtype=torch.float64)
    else:
        root = torch.linalg.cholesky(moments if shape == "matrix" else importance.diag())
    matrix = torch.stack([(column(unit) @ root).flatten() for unit in torch.eye(64).double()], 1)
    solution, *_ = numpy.linalg.lstsq(matrix.numpy(), (weight @ root).flatten().numpy())
    torch.testing.assert_close(pool, torch.from_numpy(solution), rtol=1e-6, atol=1e-6)


def test_conjugate_gradients_end_after_as_many_steps_as_dimensions() -> None:
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    matrix = basis @ torch.logspace(0, 4, 12, dtype=torch.float64).diag() @ basis.T
    wanted = torch.randn(12, dtype=torch.float64)
    solution = _conjugate_gradients(lambda x: matrix @ x, matrix @ wanted)
    torch.testing.assert_close(solution, wanted, rtol=1e-4, atol=1e-4)


def test_neither_pool_nor_theta_alone_can_be_improved() -> None:
    layers = make_layers(dtype=torch.float64)
    weights = {layer: weight.double() for layer, weight in random_weights(layers).items()}
    report = fit(weights, tolerance=1e-6, linear_rounds=60)
    problem = build_problem(weights, {}, 0.01)
    pool, *thetas = parameters_of(layers)
    best = problem.error(Parameters(pool, thetas))
    assert best == pytest.approx(report.error, rel=1e-9)
    for tensor in (pool, *thetas):
        direction = 1e-3 * torch.randn_like(tensor)
        for step in (direction, -direction):
            tensor += step
            assert problem.error(Parameters(pool, thetas)) > best
            tensor -= step


def test_random_weights_are_fitted_as_well_as_expected() -> None:
    """No better than a subspace of that many dimensions, and no worse."""
    layer = make_layers(pool_size=256, num_hashes=1, depth=0)[0]
    report = fit({layer: torch.randn(layer.weight_shape)})
    assert report.expected_error == pytest.approx((3 / 4) ** 0.5)
    assert report.layers[0].relative_error == pytest.approx(report.expected_error, rel=0.03)
    assert report.error == pytest.approx(report.layers[0].relative_error ** 2, rel=1e-4)


@pytest.mark.parametrize("shape", ["diagonal", "matrix"])
def test_importance_lowers_the_weighted_error(shape: str) -> None:
    layers = make_layers()
    weights = random_weights(layers)
    moments = {layer: second_moment(layer.weight_shape[1]) for layer in layers[:2]}
    if shape == "diagonal":
        # Some inputs matter thousands of times as much as others.
        moments = {layer: 10 ** (2 * torch.randn(len(m))) for layer, m in moments.items()}

    def weighted_errors(importance: dict[HFHLayer, Tensor] | None) -> tuple[FitReport, list[float]]:
        report = fit(weights, importance=importance, damping=0.0)
        return report, [error_of(layer, weights[layer], moments[layer]) for layer in moments]

    _, plain = weighted_errors(None)
    report, weighted = weighted_errors(moments)
    for row, before, after in zip(report.layers, plain, weighted, strict=False):
        assert after < 0.6 * before
        assert row.weighted_error == pytest.approx(after, rel=1e-3)
        assert row.relative_error > row.weighted_error
    assert report.layers[2].relative_error == report.layers[2].weighted_error


def test_pool_has_mean_square_one_and_scale_stays() -> None:
    layers = make_layers()
    scales = [layer.scale for layer in layers]
    fit({layer: 10 * weight for layer, weight in random_weights(layers).items()})
    assert layers[0].pool.weight.square().mean().item() == pytest.approx(1, rel=1e-4)
    assert [layer.scale for layer in layers] == scales


def test_what_parameters_were_before_does_not_matter() -> None:
    layers = make_layers(depth=2)
    weights = random_weights(layers)
    fit(weights, nonlinear_rounds=1)
    first = parameters_of(layers)
    with torch.no_grad():
        layers[0].pool.weight.fill_(3)
        layers[1].theta.fill_(-1)
    fit(weights, nonlinear_rounds=1)
    assert all(map(torch.equal, first, parameters_of(layers)))


def test_dense_rows_are_copied_and_do_not_count() -> None:
    layer = make_layers()[2]
    weight = torch.randn(layer.weight_shape)
    report = fit({layer: weight})
    kept = PERMUTATION.argsort()[:5]
    assert torch.equal(layer.materialize()[kept], weight[kept])
    assert report.layers[0].rows == 45


def test_tied_layers_are_fitted_together() -> None:
    embedding = HFHEmbedding(50, 16, pool=Pool(256), depth=1, block=4)
    projection = HFHLinear.tied_to(embedding)
    weight = torch.randn(50, 16)
    report = fit({embedding: weight, projection: weight})
    assert report.layers[0].relative_error == report.layers[1].relative_error < 1
    assert torch.equal(embedding.materialize(), projection.materialize())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_of_pool_and_weights_may_differ(dtype: torch.dtype) -> None:
    layers = make_layers(dtype=dtype)
    weights = random_weights(layers)
    report = fit(weights)
    for row, (layer, weight) in zip(report.layers, weights.items(), strict=True):
        if layer is not layers[2]:
            actual = relative_error(dense_weights([layer])[0], weight.double())
            assert row.relative_error == pytest.approx(actual, rel=1e-2)
        assert row.relative_error < 0.999


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_deeper_networks_start_as_linear_ones(activation: str, depth: int, width: int) -> None:
    layers = make_layers(depth=depth, width=width, activation=activation)
    problem = build_problem(random_weights(layers), {}, 0.0)
    linear = Parameters(torch.randn(128), [torch.randn(4) for _ in layers])
    deep = nonlinear_start(problem, linear)
    for target in problem.targets:
        rows, index = len(target.weight), target.theta
        wanted = target.virtual_rows(0, rows, linear.pool, linear.thetas[index], Reconstruction(1))
        network = target.layer.reconstruction
        actual = target.virtual_rows(0, rows, deep.pool, deep.thetas[index], network)
        tolerance = 1e-5 if activation == "relu" else 0.05
        assert relative_error(actual, wanted.double()) < tolerance


@pytest.mark.parametrize("depth", [2, 3])
def test_an_odd_unit_starts_with_a_gradient(depth: int) -> None:
    layers = make_layers(depth=depth, width=3)[:1]
    problem = build_problem(random_weights(layers), {}, 0.0)
    deep = nonlinear_start(problem, Parameters(torch.randn(128), [torch.randn(4)]))
    gradient = squared_error(problem.targets, *deep, problem.networks).thetas[0]
    network = layers[0].reconstruction
    output, of_output = (
        split_theta(theta, 4, network)[-1][0] for theta in (deep.thetas[0], gradient)
    )
    assert output[0, -1] == 0
    assert of_output[0, -1] != 0


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(("depth", "width"), [(2, 4), (2, 3), (3, 2)])
def test_deeper_networks_end_better_than_linear_ones(
    activation: str, depth: int, width: int
) -> None:
    layers = make_layers(depth=depth, width=width, activation=activation)
    report = fit(random_weights(layers), nonlinear_rounds=2)
    assert report.nonlinear_rounds == 2
    assert report.error < report.linear_error < 1


def test_a_round_that_makes_it_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(problem: Any, parameters: Parameters, learning_rate: float) -> Parameters:
        return Parameters(parameters.pool + 1, parameters.thetas)

    monkeypatch.setattr(fit_module, "nonlinear_round", spoil)
    layers = make_layers(depth=2)
    report = fit(random_weights(layers))
    assert report.error == pytest.approx(report.linear_error, rel=1e-4)


@pytest.mark.parametrize("depth", [1, 2])
def test_strips_of_rows_give_the_same(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = make_layers(depth=depth, dtype=torch.float64, window=64, rows_per_window=8)
    weights = random_weights(layers)
    moments = {layers[0]: second_moment(32)}
    fit(weights, importance=moments, linear_rounds=3, nonlinear_rounds=0)
    whole = parameters_of(layers)
    monkeypatch.setattr(hfh.fitting.error, "STRIP_ELEMENTS", 300)
    fit(weights, importance=moments, linear_rounds=3, nonlinear_rounds=0)
    for actual, expected in zip(parameters_of(layers), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def test_memory_is_that_of_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(pool: Tensor, theta: Tensor, rows: int, cols: int, **options: Any) -> Tensor:
        sizes.append(rows * cols)
        return materialize(pool, theta, rows, cols, **options)

    monkeypatch.setattr(hfh.fitting.error, "materialize", spy)
    monkeypatch.setattr(hfh.fitting.error, "STRIP_ELEMENTS", 320)
    fit(random_weights(make_layers()), linear_rounds=1)
    assert max(sizes) == 320


def test_report() -> None:
    layers = make_layers()
    report = fit(random_weights(layers), names={layers[1]: "features.0"})
    assert [row.name for row in report.layers] == ["HFHLinear 0", "features.0", "HFHEmbedding 2"]
    head, *lines = report.table().splitlines()
    assert head.split("  ")[0] == "layer"
    for line, row in zip(lines, report.layers, strict=True):
        assert line.startswith(row.name)
        assert line.endswith(f"{row.weighted_error:.4f}")
    fields = json.loads(report.to_json())
    assert fields["layers"][1]["relative_error"] == report.layers[1].relative_error
    assert fields["pool_size"] == 128


def test_progress_of_a_fit_that_ends_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    report = fit(random_weights(make_layers()), tolerance=0.9, progress=True)
    assert report.linear_rounds < 20
    assert capsys.readouterr().err.splitlines()[-1].startswith("fitting 20/20 ")


@pytest.mark.parametrize("has_rich", [True, False])
def test_progress_goes_to_standard_error(
    has_rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if has_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    fit(random_weights(make_layers()), linear_rounds=1, progress=True)
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(r"fitting.*error 0\.\d+", output.err)
    fit(random_weights(make_layers()), linear_rounds=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": {}}, ValueError, "at least one layer"),
        ({"weights": lambda x: {nn.Linear(3, 3): torch.ones(3, 3)}}, TypeError, "received Linear"),
        ({"weights": lambda x: {x[0]: torch.ones(32, 32).int()}}, TypeError, "torch.int32"),
        ({"weights": lambda x: {x[0]: [1.0]}}, TypeError, "received list"),
        ({"weights": lambda x: {x[0]: torch.ones(32, 31)}}, ValueError, r"\[32, 31\]"),
        ({"weights": lambda x: {x[1]: torch.ones(16, 4, 3, 3)}}, ValueError, r"shape \[16, 36\]"),
        ({"weights": lambda x: {x[0]: torch.full((32, 32), torch.nan)}}, ValueError, "finite"),
        ({"weights": lambda x: random_weights([x[0], *make_layers()])}, ValueError, "2 pools"),
        (
            {"importance": lambda x: {make_layers()[0]: torch.ones(32)}},
            ValueError,
            "weights has not",
        ),
        ({"importance": lambda x: {x[0]: torch.ones(31)}}, ValueError, r"received \[31\]"),
        ({"importance": lambda x: {x[0]: torch.ones(32).int()}}, TypeError, "torch.int32"),
        ({"importance": lambda x: {x[0]: -torch.ones(32)}}, ValueError, "at least 0"),
        ({"importance": lambda x: {x[0]: torch.ones(32, 32).triu()}}, ValueError, "symmetric"),
        ({"damping": -0.1}, ValueError, "damping must be at least 0.*-0.1"),
        ({"tolerance": float("nan")}, ValueError, "tolerance"),
        ({"linear_rounds": 0}, ValueError, "linear_rounds"),
        ({"nonlinear_rounds": 1.5}, TypeError, "nonlinear_rounds must be an int"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    layers = make_layers()
    arguments: dict[str, Any] = {"weights": random_weights(layers)}
    for name, value in changes.items():
        arguments[name] = value(layers) if callable(value) else value
    before = parameters_of(layers)
    with pytest.raises(error, match=message):
        fit(**arguments)
    assert all(map(torch.equal, before, parameters_of(layers)))


def test_layers_that_share_theta_need_the_same_network() -> None:
    pool = Pool(64)
    first = HFHLinear(8, 8, pool=pool, depth=2, width=3, num_hashes=2)
    second = HFHLinear(8, 8, pool=pool, depth=2, width=2, num_hashes=4, theta=first.theta)
    with pytest.raises(ValueError, match="share theta"):
        fit({first: torch.ones(8, 8), second: torch.ones(8, 8)})


def test_runs_without_gradients() -> None:
    layers = make_layers(depth=0, num_hashes=1)
    with torch.no_grad():
        report = fit(random_weights(layers), linear_rounds=1)
    assert report.error < 1


def test_weights_of_zeros_are_fitted_exactly() -> None:
    layers = make_layers()
    report = fit({layer: torch.zeros(layer.weight_shape) for layer in layers})
    assert report.error == 0
    assert all(not weight.any() for weight in dense_weights(layers))
