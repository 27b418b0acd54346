"""What ``compress`` takes, what it leaves and why, and what it refuses."""

from __future__ import annotations

import copy
import json
import sys
import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from hfh import defaults
from hfh.report import Report
from hfh_kernels.nn import HFHConv1d, HFHConv2d, HFHEmbedding, HFHEmbeddingBag, HFHLinear, Pool
from hfh_kernels.nn.layer import HFHLayer
from tests.models import pools
from tests.toolkit_checks import compress, materialize


def beside(layer: nn.Module) -> Any:
    """A model that can be compressed whatever becomes of the layer in it."""
    model = nn.Sequential()
    model.add_module("large", nn.Linear(256, 256))
    model.add_module("layer", layer)
    return model


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


class TestTies:
    def make(self, *layers: Any) -> nn.Sequential:
        for layer in layers[1:]:
            layer.weight = layers[0].weight
        return nn.Sequential(nn.Linear(256, 256), *layers)

    @pytest.mark.parametrize(
        "layers",
        [
            lambda: (nn.Linear(64, 64), nn.Linear(64, 64)),
            lambda: (nn.Embedding(80, 32), nn.Linear(32, 80), nn.Linear(32, 80, bias=False)),
            lambda: (nn.Linear(32, 80), nn.Embedding(80, 32)),
            lambda: (nn.Embedding(80, 32), nn.EmbeddingBag(80, 32), nn.Embedding(80, 32)),
            lambda: (nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, padding=1)),
        ],
    )
    def test_tied(self, layers: Any) -> None:
        dense = self.make(*layers())
        model, report = compress(dense, 1 / 4)
        tied = list(model)[1:]
        assert len({id(layer.theta) for layer in tied}) == 1
        assert all(torch.equal(layer.materialize(), tied[0].materialize()) for layer in tied)
        assert [row.dense_parameters > 0 for row in report.rows[1:]] == [True] + [False] * (
            len(tied) - 1
        )
        assert report.compressed_parameters == sum(p.numel() for p in model.parameters())
        plain = materialize(model)
        assert len({id(layer.weight) for layer in list(plain)[1:]}) == 1
        assert sum(p.numel() for p in plain.parameters()) == report.dense_parameters

    def test_padding_unties(self) -> None:
        """The projection has a row where the embedding has zeros."""
        dense = self.make(nn.Embedding(80, 32, padding_idx=3), nn.Linear(32, 80))
        model, _ = compress(dense, 1 / 4)
        plain = materialize(model)
        indices, input = torch.arange(80), torch.randn(4, 32)
        torch.testing.assert_close(plain[1](indices), model[1](indices))
        torch.testing.assert_close(plain[2](input), model[2](input))
        assert not plain[1].weight[3].any()
        assert plain[2].weight[3].any()

    def test_parts_of_an_lstm(self) -> None:
        layer = nn.LSTM(64, 64, 2)
        layer.weight_hh_l1 = layer.weight_hh_l0
        model, _ = compress(layer, 1 / 4)
        assert model.recurrent_l0.theta is model.recurrent_l1.theta
        plain = materialize(model)
        assert plain.weight_hh_l1 is plain.weight_hh_l0

    def test_module_used_twice(self) -> None:
        layer = nn.Linear(64, 64)
        dense = nn.ModuleDict({"a": layer, "b": nn.ModuleList([layer, nn.Linear(64, 64)])})
        for inplace in (False, True):
            model, report = compress(copy.deepcopy(dense), 1 / 4, inplace=inplace)
            assert model["a"] is model["b"][0]
            assert isinstance(model["a"], HFHLinear)
            assert len(report.rows) == 2
            plain = materialize(model)
            assert plain["a"] is plain["b"][0]
        assert compress(dense, 3 / 4, skip="b.0")[1].rows[0].skipped == "skip='b.0'"

    def test_with_a_layer_that_stays(self) -> None:
        """Directly, and by way of another layer that is refused for that."""
        first, second = nn.Linear(64, 64), nn.LSTM(64, 16)
        third = nn.Linear(64, 64)
        second.weight_ih_l0 = first.weight
        dense = nn.ModuleDict({"large": nn.Linear(256, 256), "a": first, "b": second, "c": third})
        third.weight = first.weight
        model, report = compress(dense, 1 / 2, skip="c")
        reasons = {row.name: row.skipped for row in report.rows}
        assert reasons["c"] == "skip='c'"
        assert reasons["a"] == reasons["b"] == "its weight is also c.weight, which stays dense"
        assert model["a"].weight is model["b"].weight_ih_l0 is model["c"].weight

    def test_tied_biases(self) -> None:
        dense: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64))
        dense[1].bias = dense[2].bias = dense[0].bias
        model, _ = compress(dense, 1 / 4)
        assert model[0].bias is model[1].bias is model[2].bias
        assert model[0].bias is not dense[0].bias
        plain = materialize(model)
        assert plain[0].bias is plain[1].bias is plain[2].bias

    def test_reference_outside_the_modules(self) -> None:
        """A plain list of layers, which torch does not know, must hold the hashed ones."""
        dense: Any = nn.Sequential(nn.Linear(64, 64))
        dense.layers = [dense[0]]
        model, _ = compress(dense, 1 / 4)
        assert model.layers[0] is model[0]


class TestSeed:
    def draw(self, seed: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = beside(nn.GRU(64, 32))
        torch.manual_seed(torch.seed())
        return [*compress(model, 1 / 4, seed=seed)[0].parameters()]

    def test_int(self) -> None:
        first, again, other = self.draw(1), self.draw(1), self.draw(2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])

    def test_generator(self) -> None:
        first, again = (self.draw(torch.Generator().manual_seed(5)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        generator = torch.Generator().manual_seed(5)
        self.draw(generator)
        assert not torch.equal(self.draw(generator)[0], first[0])

    def test_global_random_numbers(self) -> None:
        model = beside(nn.Linear(64, 64))
        state = torch.get_rng_state()
        compress(model, 1 / 4, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        first = compress(model, 1 / 4)[0]
        torch.set_rng_state(state)
        again = compress(model, 1 / 4)[0]
        assert torch.equal(first.large.pool.weight, again.large.pool.weight)
        assert not torch.equal(torch.get_rng_state(), state)


class TestLayers:
    def test_classes_and_arguments(self) -> None:
        dense = nn.ModuleList(
            [
                nn.Linear(64, 48, bias=False),
                nn.Conv1d(32, 48, 5, 2, 1, dilation=2, groups=2, padding_mode="circular"),
                nn.Conv2d(32, 32, (3, 5), padding="same", bias=False),
                nn.Embedding(100, 24, padding_idx=-1),
                nn.EmbeddingBag(100, 24, mode="max", include_last_offset=True, padding_idx=2),
            ]
        ).eval()
        model, _ = compress(dense, 1 / 2)
        assert [type(layer) for layer in model] == [
            HFHLinear,
            HFHConv1d,
            HFHConv2d,
            HFHEmbedding,
            HFHEmbeddingBag,
        ]
        assert repr(materialize(model)) == repr(dense)
        assert not any(module.training for module in model.modules())
        torch.testing.assert_close(model[1].bias, dense[1].bias)

    def test_scale_is_that_of_the_weights(self) -> None:
        dense: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv2d(8, 16, 3))
        nn.init.normal_(dense[0].weight, std=0.02)
        nn.init.zeros_(dense[1].weight)
        model, _ = compress(dense, 1 / 2)
        assert model[0].materialize().std().item() == pytest.approx(0.02, rel=0.2)
        assert model[1].scale == pytest.approx(1 / (3 * 64) ** 0.5)
        assert model[2].materialize().std().item() == pytest.approx(
            dense[2].weight.std().item(), rel=0.2
        )

    def test_training_mode_of_each_part(self) -> None:
        dense = beside(nn.Linear(64, 64))
        dense.large.eval()
        model, _ = compress(dense, 1 / 4)
        assert [module.training for module in (model, model.large, model.layer)] == [
            True,
            False,
            True,
        ]

    def test_frozen_model(self) -> None:
        model, _ = compress(beside(nn.LSTM(64, 64)).requires_grad_(False), 1 / 4)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(p.requires_grad for p in materialize(model).parameters())

    def test_the_model_is_one_layer(self) -> None:
        dense = nn.Linear(64, 64)
        model, report = compress(dense, 1 / 4)
        assert isinstance(model, HFHLinear)
        assert report.rows[0].name == ""
        assert "(model)" in str(report)

    def test_blocks_fit_rows(self) -> None:
        dense = nn.Sequential(nn.Embedding(200, 24), nn.Linear(64, 64), nn.Conv2d(1, 256, 3))
        model, report = compress(dense, 1 / 4)
        assert [layer.hash_spec.block for layer in model] == [16, 32, 8]
        assert [row.block for row in report.rows] == [16, 32, 8]
        model, _ = compress(dense, 1 / 4, block=8)
        assert [layer.hash_spec.block for layer in model] == [8, 8, 8]


class TestWindow:
    def spec(self, ratio: float, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        model = nn.Sequential(nn.Linear(512, 512, bias=False, dtype=dtype))
        compressed, report = compress(model, ratio, **options)
        spec = compressed[0].hash_spec
        assert (spec.window, spec.rows_per_window) == (report.window, report.rows_per_window)
        return spec

    def test_default(self) -> None:
        assert self.spec(1 / 20).window is None
        spec = self.spec(1 / 8)
        assert spec.window == 2**14
        assert spec.window * 4 == defaults.WINDOW_BYTES
        assert self.spec(1 / 8, torch.bfloat16).window is None
        assert self.spec(1 / 4, torch.bfloat16).window == 2**15
        assert self.spec(1 / 8, torch.float64).window == 2**13
        assert self.spec(1 / 8, window=None).window is None

    def test_given(self) -> None:
        spec = self.spec(1 / 8, window=1024, rows_per_window=7)
        assert (spec.window, spec.rows_per_window) == (1024, 7)
        assert self.spec(1 / 8, window=1024).rows_per_window is not None

    @pytest.mark.parametrize("pool_size", [2**15, 2**17, 2**20, 2**24])
    def test_rows_cover_the_pool(self, pool_size: int) -> None:
        rows, window = [1000, 3, 4096], 2**14
        group = defaults.rows_per_window(rows, pool_size, window)

        def covers(group: int) -> float:
            return sum(-(-count // group) for count in rows) * window / pool_size

        assert covers(group) >= defaults.MIN_WINDOWS or group == 1
        assert group == defaults.MAX_ROWS_PER_WINDOW or covers(2 * group) < defaults.MIN_WINDOWS

    def test_few_elements_are_lost(self) -> None:
        model = nn.Sequential(nn.Linear(512, 2048, bias=False))
        compressed, _ = compress(model, 1 / 8)
        (pool,) = pools(compressed)
        grad = torch.autograd.grad(compressed(torch.randn(32, 512)).square().sum(), pool.weight)[0]
        assert compressed[0].hash_spec.window is not None
        assert (grad == 0).float().mean() < 0.05


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
            ({"fit_options": {"progress": True}}, ValueError, "fit_options must be empty with"),
            ({"skip": 3}, TypeError, "'int' object is not iterable|skip must hold"),
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
            ({"window": 33}, ValueError, "window must be a multiple of block=32, received 33"),
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
        smallest = float(str(raised.value).split("the smallest ")[1].split(",")[0])
        _, report = compress(model, smallest)
        assert report.pool_size == defaults.BLOCK
        with pytest.raises(ValueError, match="the smallest"):
            compress(model, 0.97 * smallest)

    def test_ratio_between_two_pools(self) -> None:
        """Multiples of the block are too far apart for a small model."""
        model = nn.Linear(128, 8, bias=False)
        with pytest.raises(ValueError, match=r"nearest is 0\.75391 and the smallest 0\.12891"):
            compress(model, 0.7, depth=1, block=128)

    def test_nothing_changes_where_it_fails(self) -> None:
        model = beside(nn.Linear(64, 64))
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match="ratio"):
            compress(model, 1e-5, inplace=True)
        assert dict(model.named_modules()) == before


class TestReport:
    def report(self) -> Report:
        model = beside(nn.MultiheadAttention(64, 4))
        model.add_module("small", nn.Linear(8, 8))
        model.add_module("norm", nn.LayerNorm(64))
        return compress(model, 1 / 8)[1]

    def test_rows(self) -> None:
        report = self.report()
        assert [(row.name, row.kind, row.shape) for row in report.rows] == [
            ("large", "Linear", (256, 256)),
            ("layer.in_proj", "MultiheadAttention", (192, 64)),
            ("layer.out_proj", "MultiheadAttention", (64, 64)),
            ("small", "Linear", (8, 8)),
        ]
        assert report.rows[0].lookups == 256 * 256 * 4 / report.pool_size
        assert report.virtual_parameters == 256 * 256 + 192 * 64 + 64 * 64

    def test_table(self) -> None:
        report = self.report()
        text = str(report)
        assert text == report.table()
        lines = text.splitlines()
        assert "in_proj" in lines[2]
        assert "dense: fewer weights than min_size=1024" in lines[4]
        assert f"{report.dense_parameters:,} -> {report.compressed_parameters:,}" in text
        assert "window: none" in text
        assert "window: 2,048 elements for" in str(
            compress(beside(nn.Linear(64, 64)), 1 / 4, window=2048)[1]
        )

    def test_json(self) -> None:
        report = self.report()
        fields = json.loads(report.to_json())
        assert fields["ratio"] == report.ratio
        assert fields["ratio_asked"] == 1 / 8
        assert fields["pool_size"] == report.pool_size
        assert fields["fit"] is None
        assert [row["skipped"] for row in fields["rows"]] == [row.skipped for row in report.rows]
        assert fields["rows"][1]["shape"] == [192, 64]

    def test_regimes(self) -> None:
        dense = nn.ModuleList([nn.Linear(64, 64), nn.Embedding(64, 64), nn.Linear(72, 64)])

        def regimes(model: nn.Module, **options: Any) -> list[str]:
            return [row.regime for row in compress(model, 1 / 2, **options)[1].rows]

        on_meta = regimes(copy.deepcopy(dense).to("meta"))
        assert all(regime.startswith("reference, materialises: it takes") for regime in on_meta)
        if not regimes(dense)[0].startswith("cpu"):
            pytest.skip("no compiled extension")
        assert regimes(dense) == [
            "cpu: tiles of weights",
            "cpu: rows as they are looked up",
            "cpu: tiles of weights",
        ]
        assert regimes(dense, depth=1) == [
            "cpu: slot products or tiles of weights, by batch",
            "cpu: rows as they are looked up",
            "cpu: tiles of weights",
        ]


def test_fit_is_given_every_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[HFHLayer, Tensor] = {}
    options: dict[str, Any] = {}

    def fit(weights: Mapping[HFHLayer, Tensor], **keywords: Any) -> str:
        received.update(weights)
        options.update(keywords)
        with torch.no_grad():
            next(iter(weights)).pool.weight.fill_(2.0)
        return "errors"

    module = types.ModuleType("hfh.fit")
    module.fit = fit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hfh.fit", module)
    dense: Any = nn.ModuleDict(
        {
            "table": nn.Embedding(80, 32),
            "output": nn.Linear(32, 80),
            "conv": nn.Conv2d(16, 16, 3),
            "lstm": nn.LSTM(32, 32),
        }
    )
    dense["output"].weight = dense["table"].weight
    model, report = compress(dense, 1 / 4, init="fit", fit_options={"progress": False})
    assert report.fit == "errors"
    assert options == {"progress": False}
    layers = [model["table"], model["conv"], model["lstm"].input_l0, model["lstm"].recurrent_l0]
    assert list(received) == layers
    for layer, weight in received.items():
        assert weight.shape == layer.weight_shape
        assert not weight.requires_grad
    torch.testing.assert_close(received[model["conv"]], dense["conv"].weight.flatten(1))
    assert model["output"].pool.weight.eq(2.0).all()


def test_unknown_layers_are_not_materialised() -> None:
    class Other(HFHLayer):
        def __init__(self) -> None:
            super().__init__(
                (4, 4), 1.0, pool=Pool(32), num_hashes=4, depth=1, width=4, activation="relu",
                block=4, window=None, rows_per_window=None, seed=0, theta=None, device=None,
                dtype=None,
            )  # fmt: skip

    with pytest.raises(ValueError, match="model has a layer of unknown class, 0: Other"):
        materialize(nn.Sequential(Other()))


def test_materialize_keeps_dense_rows() -> None:
    pool = Pool(512)
    table = HFHEmbedding(40, 16, pool=pool, dense_rows=4, permutation=torch.randperm(40))
    model = nn.Sequential(table, HFHLinear.tied_to(table))
    plain = materialize(model)
    assert plain[0].weight is plain[1].weight
    indices = torch.randint(40, (5,))
    torch.testing.assert_close(plain(indices), model(indices))


def test_parametrised_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compressed is an ordinary module: it can be parametrised like one."""
    model, _ = compress(beside(nn.Linear(64, 64)), 1 / 4)
    parametrize.register_parametrization(model.layer, "bias", nn.Identity())
    assert model.layer(torch.ones(2, 64)).shape == (2, 64)
