"""What ``compress`` makes of layers, ties, seeds and windows, and what it reports."""

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
from torch.nn.utils import parametrize

from hfh.compression import defaults
from hfh.compression.report import Report
from hfh_kernels.nn import HFHConv1d, HFHConv2d, HFHEmbedding, HFHEmbeddingBag, HFHLinear, Pool
from hfh_kernels.nn.layer import HFHLayer
from tests.models import pools
from tests.toolkit_checks import beside, compress, materialize


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
        first, second, third = nn.Linear(16, 64, bias=False), nn.LSTM(64, 16), nn.Linear(64, 64)
        second.weight_hh_l0 = first.weight
        second.weight_ih_l0 = third.weight
        dense = nn.ModuleDict({"large": nn.Linear(256, 256), "a": first, "b": second, "c": third})
        model, report = compress(dense, 1 / 2, skip="c")
        assert {row.name: row.skipped for row in report.rows} == {
            "large": None,
            "a": "its weight is also b.weight_hh_l0, which stays dense",
            "b": "its weight is also c.weight, which stays dense",
            "c": "skip='c'",
        }
        assert model["b"].weight_ih_l0 is model["c"].weight
        assert model["b"].weight_hh_l0 is model["a"].weight

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
        for result in (model, materialize(model)):
            assert not any(module.training for module in result.modules())
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
        assert [layer.hash_spec.block for layer in model] == [16, 64, 8]
        assert [row.block for row in report.rows] == [16, 64, 8]
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
            "cpu: slot products or tiles of weights, by batch",
            "cpu: rows as they are looked up",
            "cpu: tiles of weights",
        ]
        without_slots = [
            "cpu: tiles of weights",
            "cpu: rows as they are looked up",
            "cpu: tiles of weights",
        ]
        assert regimes(dense, depth=2) == without_slots
        assert regimes(copy.deepcopy(dense).double()) == without_slots

    def test_regimes_of_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hfh_kernels.dispatch.choose", lambda backend, *tensors: "triton")
        model = nn.ModuleList([nn.Linear(64, 64), nn.Embedding(64, 64)])
        rows = compress(model, 1 / 2)[1].rows
        assert [row.regime for row in rows] == [
            "triton: tiles of weights",
            "triton: rows as they are looked up",
        ]


class FitReport:
    def to_json(self) -> str:
        return '{"error": 0.5}'


def test_fit_is_given_every_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, Any] = {}

    def fit(weights: Mapping[HFHLayer, Tensor], **keywords: Any) -> FitReport:
        received.update(keywords, weights=weights)
        with torch.no_grad():
            next(iter(weights)).pool.weight.fill_(2.0)
        return FitReport()

    module = types.ModuleType("hfh.fitting.fit")
    module.fit = fit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hfh.fitting.fit", module)
    dense: Any = nn.ModuleDict(
        {
            "table": nn.Embedding(80, 32),
            "output": nn.Linear(32, 80),
            "conv": nn.Conv2d(16, 16, 3),
            "lstm": nn.LSTM(32, 32),
            "small": nn.Linear(4, 4),
        }
    )
    dense["output"].weight = dense["table"].weight
    importance = {dense[name]: torch.rand(2) for name in ("output", "conv", "small")}
    options = {"progress": False}
    model, report = compress(dense, 1 / 4, init="fit", importance=importance, fit_options=options)
    names = {
        model["table"]: "table",
        model["conv"]: "conv",
        model["lstm"].input_l0: "lstm.input_l0",
        model["lstm"].recurrent_l0: "lstm.recurrent_l0",
    }
    assert received["names"] == names
    assert received["progress"] is False
    assert list(received["weights"]) == list(names)
    for layer, weight in received["weights"].items():
        assert weight.shape == layer.weight_shape
        assert not weight.requires_grad
    expected = dense["conv"].weight.flatten(1)
    torch.testing.assert_close(received["weights"][model["conv"]], expected)
    assert received["importance"] == {
        model["table"]: importance[dense["output"]],
        model["conv"]: importance[dense["conv"]],
    }
    assert model["output"].pool.weight.eq(2.0).all()
    assert json.loads(report.to_json())["fit"] == {"error": 0.5}


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
