"""What ``compress`` takes, what it leaves and why, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from hfh.compression import defaults
from hfh_kernels.nn import HFHLinear, Pool
from hfh_kernels.nn.layer import HFHLayer
from tests.toolkit_checks import beside, compress


def reason_of(layer: nn.Module, **options: Any) -> str | None:
    """Why it stays dense, after a check that it does; None where it does not."""
    model = beside(layer)
    compressed, report = compress(model, 0.6, **options)
    (row,) = [row for row in report.rows if row.name.partition(".")[0] == "layer"]
    assert isinstance(compressed.large, HFHLinear)
    if row.skipped is not None:
        assert type(compressed.layer) is type(layer)
        assert row.regime == "dense"
        assert not any(isinstance(module, HFHLayer) for module in compressed.layer.modules())
    return row.skipped


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = 2 * super().forward(input)
        return output


class CircularConv(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = super()._conv_forward(input.roll(1, -1), weight, bias)
        return output


class NamedLinear(nn.Linear):
    """Computes as its base does."""


class LinearWithGain(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 64)
        self.gain = nn.Parameter(torch.ones(64))


class LinearWithMask(nn.Linear):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.register_buffer("mask", torch.ones(64))


class Subclassed(Tensor):
    pass


def with_hook(register: str) -> nn.Linear:
    layer = nn.Linear(64, 64)
    getattr(layer, register)(lambda *arguments: None)
    return layer


def replaced_forward() -> nn.Linear:
    layer = nn.Linear(64, 64)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


def with_weight(weight: Any) -> nn.Linear:
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = weight
    return layer


def weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(64, 64))


class TestSkips:
    @pytest.mark.parametrize(
        ("layer", "reason"),
        [
            (lambda: nn.Linear(31, 33), "fewer weights than min_size=1024"),
            (lambda: ScaledLinear(64, 64), "ScaledLinear overrides forward of torch.nn.Linear"),
            (lambda: CircularConv(32, 32, 3), "overrides _conv_forward of torch.nn.Conv1d"),
            (replaced_forward, "its forward has been replaced"),
            (LinearWithGain, "it holds gain, which torch.nn.Linear does not"),
            (LinearWithMask, "it holds mask, which torch.nn.Linear does not"),
            (lambda: parametrizations.orthogonal(nn.Linear(64, 64)), "parametrised"),
            (lambda: with_hook("register_forward_hook"), "hooks"),
            (lambda: with_hook("register_forward_pre_hook"), "hooks"),
            (lambda: with_hook("register_full_backward_hook"), "hooks"),
            (lambda: with_hook("register_load_state_dict_post_hook"), "hooks"),
            (lambda: nn.Linear(64, 64, dtype=torch.complex64), "its weight is torch.complex64"),
            (
                lambda: with_weight(nn.Parameter(torch.ones(64, 64, dtype=torch.int8), False)),
                "its weight is torch.int8",
            ),
            (lambda: nn.Linear(64, 64).double(), "unlike most weights, its own is torch.float64"),
            (lambda: nn.Linear(64, 64).requires_grad_(False), "its own is requires_grad=False"),
            (lambda: nn.Linear(64, 64, device="meta"), "unlike most weights, its own is on meta"),
            (lambda: nn.Embedding(64, 64, max_norm=1.0), "max_norm needs stored rows"),
            (lambda: nn.Embedding(64, 64, sparse=True), "sparse needs stored rows"),
            (lambda: nn.EmbeddingBag(64, 64, scale_grad_by_freq=True), "scale_grad_by_freq needs"),
            (lambda: nn.ConvTranspose2d(32, 32, 3), "there is no hashed ConvTranspose2d"),
            (lambda: nn.Conv3d(16, 16, 3), "there is no hashed Conv3d"),
            (lambda: nn.RNN(64, 64), "there is no hashed RNN"),
            (lambda: nn.LSTMCell(64, 64), "there is no hashed LSTMCell"),
        ],
    )
    def test_reasons(self, layer: Any, reason: str) -> None:
        found = reason_of(layer())
        assert found is not None
        assert reason in found

    @pytest.mark.parametrize(
        ("layer", "reason"),
        [
            (weight_normed, "weight is computed from other tensors"),
            (
                lambda: prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5),
                "weight is computed from other tensors",
            ),
            (
                lambda: with_weight(nn.Parameter(torch.eye(64).to_sparse())),
                "its weight is of layout torch.sparse_coo",
            ),
            (
                lambda: with_weight(nn.Parameter(torch.ones(64, 64).as_subclass(Subclassed))),
                "its weight is a Subclassed",
            ),
        ],
    )
    def test_reasons_where_torch_cannot_copy(self, layer: Any, reason: str) -> None:
        model = beside(layer())
        with pytest.raises(ValueError, match="inplace must be True for a model without deepcopy"):
            compress(model, 0.6)
        _, report = compress(model, 0.6, inplace=True)
        assert [row.skipped for row in report.rows] == [None, reason]

    def test_compressed_already(self) -> None:
        layer = HFHLinear(64, 64, pool=Pool(64))
        model, report = compress(beside(layer), 0.6)
        assert report.rows[1].skipped == "hashed already"
        assert model.layer.pool.weight.numel() == 64
        assert torch.equal(model.layer.materialize(), layer.materialize())

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    def test_quantised(self) -> None:
        quantised = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(64, 64), nn.LSTM(64, 64)), {nn.Linear, nn.LSTM}
        )
        _, report = compress(beside(quantised), 0.6)
        assert [row.skipped for row in report.rows[1:]] == ["quantised", "quantised"]
        assert [row.name for row in report.rows[1:]] == ["layer.0", "layer.1"]

    def test_weights_of_two_dtypes(self) -> None:
        layer: Any = nn.LSTM(32, 32)
        layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.double())
        assert reason_of(layer) == "its weights differ in device, dtype or requires_grad"

    def test_empty_weight(self) -> None:
        with pytest.warns(UserWarning, match="zero-element"):
            layer = nn.Linear(64, 0)
        assert reason_of(layer, min_size=0) == "its weight is empty"

    def test_subclass_that_computes_the_same(self) -> None:
        assert reason_of(NamedLinear(64, 64)) is None

    def test_hooks_on_parents_stay(self) -> None:
        model = nn.Sequential(beside(nn.Linear(64, 64)), nn.ReLU())
        seen: list[nn.Module] = []
        model[0].register_forward_hook(lambda module, *_: seen.append(module))
        compressed, _ = compress(model.requires_grad_(), 0.6)
        with pytest.raises(ValueError, match="features"):
            compressed(torch.ones(2, 64))
        assert seen == []
        compressed[0].layer = nn.Identity()
        compressed(torch.ones(2, 256))
        assert seen == [compressed[0]]

    def test_parts_of_attention_go_with_it(self) -> None:
        class Attention(nn.MultiheadAttention):
            def forward(self, *arguments: Any, **options: Any) -> Any:
                return super().forward(*arguments, **options)

        assert "overrides forward" in str(reason_of(Attention(64, 4)))
        hooked = nn.MultiheadAttention(64, 4)
        hooked.out_proj.register_forward_hook(lambda *arguments: None)
        assert "hooks" in str(reason_of(hooked))
        assert reason_of(nn.MultiheadAttention(64, 4), skip="*.out_proj") == "skip='*.out_proj'"
        model = beside(nn.MultiheadAttention(64, 4))
        model.alias = model.layer.out_proj
        alias = compress(model, 0.9, skip="layer")[0].alias
        assert type(alias) is type(model.alias)

    @pytest.mark.parametrize(
        ("skip", "left"),
        [
            ("a", {"a.0", "a.1"}),
            ("a.*", {"a.0", "a.1"}),
            (["a.1", "c"], {"a.1", "c"}),
            (nn.Conv2d, {"b"}),
            ([nn.Conv2d, "c"], {"b", "c"}),
            (nn.Sequential, {"a.0", "a.1", "b", "c"}),
            (lambda name, module: name == "c", {"c"}),
            ([lambda name, module: isinstance(module, nn.Linear) and not module.bias.any()], {"c"}),
        ],
    )
    def test_rules(self, skip: Any, left: set[str]) -> None:
        model: Any = nn.Sequential()
        model.add_module("a", nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
        model.add_module("b", nn.Conv2d(16, 16, 3))
        model.add_module("c", nn.Linear(64, 64))
        nn.init.zeros_(model.c.bias)
        if len(left) == 4:
            with pytest.raises(ValueError, match=r"no layer that can be compressed \(a\.0: skip="):
                compress(model, 0.9, skip=skip)
            return
        compressed, report = compress(model, 0.9, skip=skip)
        assert {row.name for row in report.rows if row.skipped} == left
        for name, module in compressed.named_modules():
            if name in left:
                assert type(module) is type(model.get_submodule(name))
        assert all("skip=" in row.skipped for row in report.rows if row.skipped)

    def test_min_size(self) -> None:
        assert reason_of(nn.Linear(31, 33), min_size=1023) is None
        assert reason_of(nn.Linear(64, 64), min_size=4097) == "fewer weights than min_size=4097"


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": 3}, TypeError, "model must be a torch.nn.Module, received int"),
            ({"ratio": "1/16"}, TypeError, "ratio must be a number, received '1/16'"),
            ({"ratio": 0}, ValueError, "ratio must be between 0 and 1, received 0"),
            ({"ratio": 1}, ValueError, "ratio must be between 0 and 1, received 1"),
            ({"ratio": float("nan")}, ValueError, "ratio .* received nan"),
            ({"min_size": -1}, ValueError, "min_size .* received -1"),
            ({"init": "random"}, ValueError, "init must be 'scratch' or 'fit', received 'random'"),
            ({"fit_options": {"progress": True}}, ValueError, "go with init='fit', received"),
            ({"importance": {nn.ReLU(): torch.ones(2)}}, ValueError, "received init='scratch'"),
            (
                {"importance": {nn.Linear(3, 2): torch.ones(3)}, "init": "fit"},
                ValueError,
                r"importance must be of layers of model, received Linear\(",
            ),
            ({"skip": 3}, TypeError, "skip must hold .* received 3"),
            ({"skip": [3]}, TypeError, "skip must hold .* received 3"),
            ({"skip": [int]}, TypeError, "skip must hold .* received <class 'int'>"),
            ({"skip": "heads"}, ValueError, "skip has a pattern that matches no module: 'heads'"),
            ({"num_hashes": 0}, ValueError, "num_hashes .* received 0"),
            ({"depth": 9}, ValueError, "depth .* received 9"),
            ({"activation": "gelu"}, ValueError, "activation .* received 'gelu'"),
            ({"block": 48}, ValueError, "block must be a power of two, received 48"),
            ({"block": 1.0}, TypeError, "block must be an int, received 1.0"),
            ({"window": "none"}, TypeError, "window must be an int, None or 'auto', received 'no"),
            ({"window": 2**30}, ValueError, "window .* received 1073741824"),
            ({"window": 96}, ValueError, "window must be a multiple of block=64, received 96"),
            ({"window": None, "rows_per_window": 4}, ValueError, "rows_per_window must be None"),
            (
                {"ratio": 0.1, "rows_per_window": 4},
                ValueError,
                "rows_per_window must be None without a window",
            ),
            ({"seed": "a"}, TypeError, "seed must be an int, received 'a'"),
            ({"seed": -1}, ValueError, "seed .* received -1"),
            ({"min_size": 10**9}, ValueError, r"model has no layer .*large: fewer weights than"),
            ({"model": nn.ReLU()}, ValueError, r"no layer that can be compressed \(no weights\)"),
            ({"model": nn.LazyLinear(8)}, ValueError, "model has a lazy layer"),
            (
                {"model": nn.Linear(64, 64), "inplace": True},
                ValueError,
                "inplace must be False for a model that is itself the layer",
            ),
        ],
    )
    def test_invalid(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        valid: dict[str, Any] = {"model": beside(nn.Linear(64, 64)), "ratio": 1 / 4}
        with pytest.raises(error, match=message):
            compress(**{**valid, **arguments})

    def test_ratio_below_what_is_dense(self) -> None:
        model = beside(nn.Conv3d(16, 16, 3))
        with pytest.raises(ValueError, match="and the smallest") as raised:
            compress(model, 1 / 16)
        assert "there is no hashed Conv3d) and a pool" in str(raised.value)
        smallest = float(str(raised.value).split("the smallest ")[1].split(",")[0])
        _, report = compress(model, smallest)
        assert report.pool_size == defaults.BLOCK
        with pytest.raises(ValueError, match="the smallest"):
            compress(model, 0.97 * smallest)

    def test_ratio_between_two_pools(self) -> None:
        """Multiples of the block are too far apart for a small model."""
        model = nn.Linear(128, 8, bias=False)
        with pytest.raises(ValueError, match=r"nearest is 0\.75391 and the smallest 0\.12891"):
            compress(model, 0.7, block=128)

    def test_nothing_changes_where_it_fails(self) -> None:
        model = beside(nn.Linear(64, 64))
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match="ratio"):
            compress(model, 1e-5, inplace=True)
        assert dict(model.named_modules()) == before
