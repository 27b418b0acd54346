from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hfh.fitting.fit import fit
from hfh.fitting.problem import Parameters
from tests.fit_samples import make_layers, parameters_of, random_weights

# The package may export the function under the same name.
fit_module = importlib.import_module("hfh.fitting.fit")

pytestmark = pytest.mark.usefixtures("one_thread")


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    """Let a round's function of hfh.fit run so often, then raise."""
    run: Callable[..., Parameters] = getattr(fit_module, name)
    calls = iter(range(count))

    def interrupted(*arguments: Any) -> Parameters:
        if next(calls, None) is None:
            raise Interrupted
        return run(*arguments)

    monkeypatch.setattr(fit_module, name, interrupted)


@pytest.mark.parametrize(("name", "count"), [("linear_round", 2), ("nonlinear_round", 1)])
def test_an_interrupted_fit_continues_to_the_same_result(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    layers = make_layers(depth=2)
    weights = random_weights(layers)
    options: dict[str, Any] = {"linear_rounds": 4, "nonlinear_rounds": 2, "names": {layers[0]: "a"}}
    expected = fit(weights, **options)
    wanted = parameters_of(layers)

    for layer in layers:
        layer.pool.reset_parameters()
        layer.reset_parameters()
    before = parameters_of(layers)
    file = tmp_path / "fit.safetensors"
    with monkeypatch.context() as context:
        interrupt_after(context, name, count)
        with pytest.raises(Interrupted):
            fit(weights, checkpoint=file, **options)
    assert all(map(torch.equal, before, parameters_of(layers)))
    with monkeypatch.context() as context:
        if name == "nonlinear_round":
            interrupt_after(context, "linear_round", 0)
        assert fit(weights, checkpoint=str(file), **options) == expected
    assert all(map(torch.equal, wanted, parameters_of(layers)))
    interrupt_after(monkeypatch, "nonlinear_round", 0)
    assert fit(weights, checkpoint=file, **options) == expected
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    layers = make_layers()
    weights = random_weights(layers)
    file = tmp_path / "fit.safetensors"
    fit(weights, checkpoint=file)
    changed = {**weights, layers[1]: weights[layers[1]].clone()}
    changed[layers[1]][3, 4] += 1e-3
    for other, linear_rounds in ((changed, 20), (weights, 7)):
        with pytest.raises(ValueError, match=r"fit\.safetensors is that of a fit of other weights"):
            fit(other, checkpoint=file, linear_rounds=linear_rounds)


@pytest.mark.parametrize("damage", ["empty", "no safetensors", "cut short", "one bit"])
def test_a_damaged_checkpoint_is_an_error(damage: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    weights = random_weights(make_layers())
    file = tmp_path / "fit.safetensors"
    fit(weights, checkpoint=file)
    content = file.read_bytes()
    damaged = {
        "empty": b"",
        "no safetensors": b"not safetensors at all",
        "cut short": content[:-5],
        "one bit": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"fit\.safetensors is not that of a fit"):
        fit(weights, checkpoint=file)


def test_a_checkpoint_without_safetensors_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hfh.files.tensor_file", None)
    monkeypatch.delattr("hfh.files.tensor_file", raising=False)
    with pytest.raises(ImportError, match="a checkpoint needs safetensors"):
        fit(random_weights(make_layers()), checkpoint="fit.safetensors")
