"""A shared pool is saved once and loads from wherever a checkpoint has it; so are the hashes."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfh_kernels.nn import HFHLinear, Pool
from tests.models import make_model, pool_names, pools, run, seeds


class Reversed(nn.Module):
    """The layers of a model under names that a traversal meets in reverse order."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        for name in reversed(range(len(model))):
            self.add_module(str(name), model[name])

    def forward(self, input: Tensor) -> Tensor:
        for name in range(len(self._modules)):
            input = self.get_submodule(str(name))(input)
        return input


def test_round_trip() -> None:
    model, other = make_model(), make_model()
    assert not torch.equal(run(model), run(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(model), run(other))


def test_saved_file(tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(run(model), run(other))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    tensors = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    assert sum(tensor.numel() for tensor in tensors) == numbers


def test_repeatedly() -> None:
    model = make_model()
    names = list(model.state_dict())
    for _ in range(3):
        assert list(model.state_dict()) == names
        model.load_state_dict(model.state_dict())
    with torch.no_grad():
        pools(model).pop().weight.zero_()
    assert model.state_dict()["0.pool.weight"].abs().sum().item() == 0


def test_without_metadata() -> None:
    model, other = make_model(), make_model()
    other.load_state_dict(dict(model.state_dict()))
    assert torch.equal(run(model), run(other))


def test_of_a_layer() -> None:
    model, other = make_model(), make_model()
    for index in (0, 2, 4):
        state = model[index].state_dict()
        assert "pool.weight" in state
        other[index].load_state_dict(state)
    assert torch.equal(run(model), run(other))


def test_into_one_destination() -> None:
    model = make_model()
    plain: dict[str, Any] = {}
    ordered: OrderedDict[str, Any] = OrderedDict()
    ordered._metadata = OrderedDict()  # type: ignore[attr-defined]
    for destination in (plain, ordered):
        for index in (0, 2, 4):
            model[index].state_dict(destination=destination, prefix=f"{index}.")
        other = make_model()
        other.load_state_dict(destination)
        assert torch.equal(run(model), run(other))
    assert [name for name in ordered if "pool" in name] == ["0.pool.weight"]


def test_two_pools() -> None:
    model, other = (nn.ModuleList([make_model(), make_model()]) for _ in range(2))
    assert pool_names(model) == ["0.0.pool.weight", "1.0.pool.weight"]
    other.load_state_dict(model.state_dict())
    for index in range(2):
        assert torch.equal(run(model[index]), run(other[index]))


def test_a_module_under_two_names() -> None:
    layer, other = (HFHLinear(4, 4, pool=Pool(32)) for _ in range(2))
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert pool_names(model) == ["a.pool.weight"]
    nn.ModuleDict({"a": other, "b": other}).load_state_dict(model.state_dict())
    assert torch.equal(layer.materialize(), other.materialize())


@pytest.mark.parametrize("strip", [False, True], ids=["metadata", "no metadata"])
def test_another_traversal(strip: bool) -> None:
    model, other = make_model(), make_model()
    state = model.state_dict()
    target = Reversed(other)
    target.load_state_dict(dict(state) if strip else state)
    assert torch.equal(run(model), run(target))
    state = target.state_dict()
    assert pool_names(target) == ["4.pool.weight"]
    again = make_model()
    again.load_state_dict(dict(state) if strip else state)
    assert torch.equal(run(model), run(again))


def test_assign() -> None:
    model, other = make_model(), make_model()
    with torch.device("meta"):
        other = make_model()
    other.load_state_dict(model.state_dict(), assign=True)
    assert len(pools(other)) == 1
    assert torch.equal(run(model), run(other))
    assert pool_names(other) == ["0.pool.weight"]


def test_missing_pool() -> None:
    model = make_model()
    state = model.state_dict()
    model.load_state_dict(state)
    del state["0.pool.weight"]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r'Missing key.*"0\.pool\.weight"'):
            model.load_state_dict(state)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert missing == ["0.pool.weight"]
        assert unexpected == []
    with pytest.raises(RuntimeError, match=r'Missing key.*"4\.pool\.weight"'):
        Reversed(model).load_state_dict(state)


def test_unexpected_key_beside_a_shared_pool() -> None:
    model = make_model()
    state = {**model.state_dict(), "2.pool.momentum": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"2\.pool\.momentum"'):
        model.load_state_dict(state)


def test_pool_of_another_size() -> None:
    state = make_model(512).state_dict()
    with pytest.raises((RuntimeError, ValueError), match=r"pool_size=512.*pool_size=1024"):
        make_model().load_state_dict(state)


def test_adopts_seed_and_scale() -> None:
    model, other = make_model(), make_model()
    for seed, layer in enumerate(other):
        if isinstance(layer, HFHLinear):
            layer.hash_spec = dataclasses.replace(layer.hash_spec, seed=seed)
            layer.scale *= 2
    assert set(seeds(other)).isdisjoint(seeds(model))
    other.load_state_dict(model.state_dict())
    assert seeds(other) == seeds(model)
    assert torch.equal(run(model), run(other))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_hashes": 1, "depth": 0}, "has depth=1, this one has depth=0"),
        ({"width": 8}, "has width=4, this one has width=8"),
        ({"activation": "tanh"}, "has activation='relu', this one has activation='tanh'"),
        ({"block": 4}, "has block=8, this one has block=4"),
        (
            {"window": 16, "rows_per_window": 2},
            "has rows_per_window=None, this one has rows_per_window=2",
        ),
        ({"in_features": 5}, "has in_features=4, this one has in_features=5"),
        ({"out_features": 5}, "has out_features=4, this one has out_features=5"),
    ],
)
def test_any_other_difference(arguments: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {
        "in_features": 4,
        "out_features": 4,
        "bias": False,
        "depth": 1,
        "block": 8,
    }
    state = HFHLinear(pool=Pool(64), **valid).state_dict()
    other = HFHLinear(pool=Pool(64), **{**valid, **arguments})
    with pytest.raises((RuntimeError, ValueError), match=message):
        other.load_state_dict(state)


def test_another_version() -> None:
    layer = HFHLinear(4, 4, pool=Pool(64))
    state = layer.state_dict()
    state["_extra_state"] = {**state["_extra_state"], "version": 2}
    with pytest.raises(ValueError, match="has version=2, this one has version=1"):
        layer.load_state_dict(state)


def test_missing_or_foreign_hash() -> None:
    layer = HFHLinear(4, 4, pool=Pool(64))
    state = layer.state_dict()
    extra = state.pop("_extra_state")
    with pytest.raises(RuntimeError, match="_extra_state"):
        layer.load_state_dict(state)
    incomplete = {name: value for name, value in extra.items() if name != "seed"}
    wrong_states = (
        incomplete,
        {**extra, "keep_mask": 1},
        {**extra, "scale": None},
        {**extra, "scale": math.nan},
    )
    message = r"seed must be|has keep_mask=1|scale must be a finite float.* (None|nan)"
    for wrong in wrong_states:
        with pytest.raises((TypeError, ValueError), match=message):
            layer.load_state_dict({**state, "_extra_state": wrong})
