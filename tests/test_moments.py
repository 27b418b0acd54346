from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfh.fitting.moments import second_moments
from tests.tolerances import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": "valid", "groups": 3},
    {"padding": (1, 0), "groups": 6, "stride": (2, 1)},
]


def require_predicts(layer: nn.Linear | nn.Conv1d | nn.Conv2d, input: Tensor) -> None:
    """trace(R E[x x^T] R^T) is the mean square of the output, summed over the rows of weights R."""
    moments = second_moments(nn.Sequential(layer), [input])[layer]
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    cols = layer.weight[0].numel()
    assert moments.shape == (cols, cols)
    rows = torch.randn(len(layer.weight) // groups, cols)
    with torch.no_grad():
        layer.weight.copy_(rows.repeat(groups, 1).view_as(layer.weight))
        actual = layer(input).double().square().mean() * len(rows)
    assert relative_error(torch.trace(rows @ moments @ rows.T), actual) < 1e-5


@pytest.mark.parametrize("shape", [(7,), (20, 7), (4, 5, 7)])
def test_linear(shape: tuple[int, ...]) -> None:
    require_predicts(nn.Linear(7, 3, bias=False), torch.randn(shape))


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("batch", [(), (5,)])
def test_conv2d(options: dict[str, Any], batch: tuple[int, ...]) -> None:
    layer = nn.Conv2d(6, 12, (3, 2), bias=False, **options)
    require_predicts(layer, torch.randn(*batch, 6, 9, 8))


@pytest.mark.parametrize("options", CONVOLUTIONS[:-1], ids=str)
def test_conv1d(options: dict[str, Any]) -> None:
    require_predicts(nn.Conv1d(6, 12, 3, bias=False, **options), torch.randn(5, 6, 11))


def test_images_go_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfh.fitting.moments._CHUNK_ELEMENTS", 2000)
    require_predicts(nn.Conv2d(2, 3, 3, bias=False), torch.randn(7, 2, 8, 8))


def test_all_batches_count_alike_by_their_inputs() -> None:
    layer = nn.Linear(4, 2)
    inputs = torch.randn(30, 4)
    whole = second_moments(layer, [inputs])[layer]
    parts = second_moments(layer, inputs.split([25, 5]))[layer]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole, inputs.T @ inputs / 30)


def test_wide_layers_get_the_diagonal() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    inputs = torch.randn(30, 4)
    moments = second_moments(model, [inputs], max_cols=5)
    assert [moments[layer].dim() for layer in model] == [2, 1]
    torch.testing.assert_close(moments[model[1]], model[0](inputs).detach().square().mean(dim=0))
    assert second_moments(model, [inputs], max_cols=0)[model[0]].shape == (4,)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        hidden: Tensor = self.first(a) + self.second(input=b)
        output: Tensor = self.attention(hidden, hidden, hidden)[0]
        return output


@pytest.mark.parametrize("kind", [tuple, dict])
def test_batches_are_what_the_model_takes(kind: type) -> None:
    model, a, b = Two(), torch.randn(5, 3), torch.randn(5, 3)
    moments = second_moments(model, [(a, b) if kind is tuple else {"b": b, "a": a}])
    assert moments.keys() == {model.first, model.second}
    torch.testing.assert_close(moments[model.second], b.T @ b / 5)
    assert second_moments(model, [(a, b)], layers=[model.first]).keys() == {model.first}


def test_hooks_are_removed() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        second_moments(model, [torch.randn(5, 4)])
    second_moments(model, [torch.randn(5, 3)])
    assert not model._forward_pre_hooks


def test_bad_input() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="batches must not be empty"):
        second_moments(model, [])
    with pytest.raises(ValueError, match="max_cols"):
        second_moments(model, [torch.ones(1, 3)], max_cols=-1)
    with pytest.raises(TypeError, match=r"layers must be of .*received ReLU"):
        second_moments(model, [torch.ones(1, 3)], layers=[nn.ReLU()])
