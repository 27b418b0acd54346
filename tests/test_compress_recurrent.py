from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from hfh.layers.recurrent import HFHGRU, HFHLSTM
from hfh_kernels.nn import Pool
from tests.toolkit_checks import assert_same_as_dense, compress, materialize, tensors

INPUT, HIDDEN, LENGTH, BATCH = 12, 10, 5, 3
KINDS: dict[str, type[nn.Module]] = {"lstm": HFHLSTM, "gru": HFHGRU}
FORMS = ("sequence first", "batch first", "no batch", "packed", "packed, unsorted")


def make(name: str, **arguments: Any) -> Any:
    pool = Pool(512, dtype=torch.float64)
    return KINDS[name](INPUT, HIDDEN, pool=pool, dtype=torch.float64, **arguments)


def make_input(form: str) -> Tensor | PackedSequence:
    shape = {"batch first": (BATCH, LENGTH), "no batch": (LENGTH,)}.get(form, (LENGTH, BATCH))
    values = torch.randn(*shape, INPUT, dtype=torch.float64, requires_grad=True)
    if not form.startswith("packed"):
        return values
    lengths = [5, 2, 4] if "unsorted" in form else [5, 4, 2]
    packed = pack_padded_sequence(values, lengths, enforce_sorted="unsorted" not in form)
    return packed._replace(data=packed.data.detach().requires_grad_())


def make_states(layer: Any, form: str) -> list[Tensor]:
    batch = () if form == "no batch" else (BATCH,)
    rows = layer.num_layers * (1 + layer.bidirectional)
    return [
        torch.randn(rows, *batch, size, dtype=torch.float64, requires_grad=True)
        for size in layer._state_sizes
    ]


def caller(input: Any, hx: Any) -> Callable[[nn.Module], Any]:
    return lambda module: module(input, hx)


OPTIONS = [
    (name, layers, both, bias, size)
    for name, layers, both, bias, size in itertools.product(
        KINDS, (1, 2), (False, True), (False, True), (0, 6)
    )
    if name == "lstm" or size == 0
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "layers", "both", "bias", "size"), OPTIONS)
@pytest.mark.parametrize("has_states", [False, True], ids=["zeros", "states"])
def test_options(
    name: str, layers: int, both: bool, bias: bool, size: int, form: str, has_states: bool
) -> None:
    arguments: dict[str, Any] = {"proj_size": size} if size else {}
    layer = make(
        name,
        num_layers=layers,
        bidirectional=both,
        bias=bias,
        batch_first=form == "batch first",
        **arguments,
    )
    input = make_input(form)
    states = make_states(layer, form) if has_states else []
    hx = None if not states else tuple(states) if name == "lstm" else states[0]
    assert_same_as_dense(layer, caller(input, hx), [*tensors(input), *states])


@pytest.mark.parametrize("name", KINDS)
def test_dropout_between_layers(name: str) -> None:
    layer = make(name, num_layers=2, dropout=0.5)
    input = make_input("sequence first")
    layer.eval()
    assert_same_as_dense(layer, caller(input, None), tensors(input))
    layer.train()
    once, again = layer(input)[0], layer(input)[0]
    assert not torch.equal(once, again)
    # All that enters the second layer is dropped, and nothing before: what comes out is the same
    # for any input, but the first layer's last state is not.
    layer.dropout = 1.0
    (output, states), (other_output, other_states) = layer(input), layer(2 * input)
    assert torch.equal(output, other_output)
    first, other_first = (next(tensors(value))[0] for value in (states, other_states))
    assert not torch.equal(first, other_first)


@pytest.mark.parametrize("name", KINDS)
def test_packed_result_keeps_its_order(name: str) -> None:
    layer, input = make(name), make_input("packed, unsorted")
    output, _ = layer(input)
    padded, lengths = pad_packed_sequence(output)
    assert lengths.tolist() == [5, 2, 4]
    assert isinstance(input, PackedSequence)
    values, _ = pad_packed_sequence(input)
    alone, _ = layer(values[:2, 1])
    torch.testing.assert_close(padded[:2, 1], alone)


@pytest.mark.parametrize("name", KINDS)
def test_compress_carries_biases_and_options(name: str) -> None:
    dense: Any = {"lstm": nn.LSTM(40, 32, 2, bidirectional=True), "gru": nn.GRU(40, 32)}[name]
    dense.eval()
    layer, report = compress(dense, 1 / 4)
    assert type(layer).__name__ == KINDS[name].__name__
    assert [row.name for row in report.rows] == [name for name, _ in layer.named_children()]
    for place, path in (("input_l0", "ih_l0"), ("recurrent_l0", "hh_l0")):
        bias = layer.get_submodule(place).bias
        assert torch.equal(bias, getattr(dense, f"bias_{path}"))
        assert bias is not getattr(dense, f"bias_{path}")
    assert not layer.input_l0.training
    plain = materialize(layer)
    assert repr(plain) == repr(dense)
    layer.flatten_parameters()


def test_initialisation() -> None:
    torch.manual_seed(0)
    layer: Any = HFHLSTM(64, 100, pool=Pool(2**14))
    for projection in layer.children():
        assert projection.materialize().var().item() == pytest.approx(1 / 300, rel=0.15)
    assert layer.input_l0.bias.abs().max().item() == pytest.approx(0.1, rel=0.05)
    before = {name: value.clone() for name, value in layer.named_parameters()}
    layer.reset_parameters()
    same = [n for n, value in layer.named_parameters() if torch.equal(value, before[n])]
    assert same == ["input_l0.pool.weight"]
    assert layer.input_l0.scale == pytest.approx(1 / 300**0.5)


def test_short_rows_take_shorter_blocks() -> None:
    layer: Any = HFHLSTM(9, 40, proj_size=5, pool=Pool(512))
    blocks = [layer.get_submodule(f"{name}_l0").hash_spec.block for name in _ROLES]
    assert blocks == [8, 4, 32]


_ROLES = ("input", "recurrent", "projection")


def test_repr() -> None:
    text = HFHGRU(4, 8, 2, pool=Pool(64), bidirectional=True).extra_repr()
    assert text == "4, 8, num_layers=2, bidirectional=True"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size .* received 0"),
        ({"hidden_size": 2.0}, TypeError, "hidden_size .* received 2.0"),
        ({"num_layers": 0}, ValueError, "num_layers .* received 0"),
        ({"proj_size": 8}, ValueError, "proj_size .* received 8"),
        ({"dropout": 1.5}, ValueError, "dropout .* received 1.5"),
        ({"block": 48}, ValueError, "block .* received 48"),
    ],
)
def test_invalid_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    valid: dict[str, Any] = {"input_size": 4, "hidden_size": 8, "pool": Pool(96)}
    with pytest.raises(error, match=message):
        HFHLSTM(**{**valid, **arguments})


@pytest.mark.parametrize(
    ("shape", "states", "message"),
    [
        ((2, 3, 5), None, r"input must be .* 12 features, received shape \[2, 3, 5\]"),
        ((12,), None, r"received shape \[12\]"),
        ((0, 3, 12), None, r"at least one step, received \[0, 3, 12\]"),
        ((2, 3, 12), [(1, 2, 10), (1, 3, 10)], r"shape \[1, 3, 10\], received shape \[1, 2, 10\]"),
        ((2, 3, 12), [(1, 3, 10), (3, 10)], r"shape \[1, 3, 10\], received shape \[3, 10\]"),
        ((2, 12), [(1, 10), (2, 10)], r"hx must have shape"),
    ],
)
def test_invalid_input(shape: tuple[int, ...], states: Any, message: str) -> None:
    layer = make("lstm")
    hx = None if states is None else tuple(torch.zeros(size).double() for size in states)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape, dtype=torch.float64), hx)
