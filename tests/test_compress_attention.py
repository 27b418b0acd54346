from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfh.layers.attention import HFHMultiheadAttention
from hfh_kernels.nn import HFHLinear, Pool
from tests.tolerances import relative_error
from tests.toolkit_checks import TOLERANCE, assert_same_as_dense, compress, materialize

SIZE, HEADS, QUERIES, KEYS, BATCH = 12, 3, 4, 5, 2


def make(**arguments: Any) -> HFHMultiheadAttention:
    pool = Pool(512, dtype=torch.float64)
    layer = HFHMultiheadAttention(SIZE, HEADS, pool=pool, dtype=torch.float64, **arguments)
    for bias in (layer.in_proj_bias, layer.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return layer


def make_inputs(layer: HFHMultiheadAttention, same: str, batch: bool) -> list[Tensor]:
    """Query, key and value, of which ``same`` says which are one tensor."""

    def values(length: int, size: int) -> Tensor:
        shape = [length, size]
        if batch:
            shape.insert(0 if layer.batch_first else 1, BATCH)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    query = values(QUERIES, SIZE)
    if same == "self":
        return [query] * 3
    key = values(KEYS, layer.kdim)
    return [query, key, key if same == "memory" else values(KEYS, layer.vdim)]


MASKS = (
    "none",
    "padding",
    "2-d",
    "3-d",
    "padding and 2-d",
    "floating",
    "causal",
    "padding and causal",
)


def make_masks(kind: str, keys: int, batch: bool) -> dict[str, Any]:
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[0, -1] = True
    heads = HEADS * BATCH if batch else HEADS
    # No query may be left without a key: softmax would be NaN, which equals nothing.
    mask = torch.rand(heads, QUERIES, keys) < 0.4
    mask[..., 0] = False
    if kind == "floating":
        return {
            "attn_mask": torch.randn(heads, QUERIES, keys).double(),
            "key_padding_mask": torch.randn(BATCH, keys).double()[... if batch else 0],
        }
    masks: dict[str, Any] = {}
    if "padding" in kind:
        masks["key_padding_mask"] = padding if batch else padding[0]
    if "2-d" in kind:
        masks["attn_mask"] = mask[0]
    if kind == "3-d":
        masks["attn_mask"] = mask
    if "causal" in kind:
        masks["attn_mask"] = torch.ones(QUERIES, keys, dtype=torch.bool).triu(1)
        masks["is_causal"] = True
    return masks


EXTRAS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 7, "vdim": 9, "batch_first": True},
]


CASES = [
    (extra, same)
    for extra, same in itertools.product(EXTRAS, ("self", "memory", "none"))
    if same == "none" or "kdim" not in extra
]


@pytest.mark.parametrize(
    ("extra", "same"), CASES, ids=[f"{', '.join(extra) or 'plain'}-{same}" for extra, same in CASES]
)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_options(
    extra: dict[str, Any], masks: str, need_weights: bool, same: str, batch: bool
) -> None:
    layer = make(**extra)
    inputs = make_inputs(layer, same, batch)
    keys = QUERIES if same == "self" else KEYS
    arguments = {"need_weights": need_weights, **make_masks(masks, keys, batch)}
    if extra.get("add_bias_kv") and "causal" in masks and not need_weights:
        # Torch's hint hides the added keys, too, where its mask does not: the mask is right.
        arguments["is_causal"] = False
        with_hint = layer(*inputs, **{**arguments, "is_causal": True})[0]
        assert torch.equal(with_hint, layer(*inputs, **arguments)[0])
    assert_same_as_dense(
        layer, lambda module: module(*inputs, **arguments), {id(x): x for x in inputs}.values()
    )


@pytest.mark.parametrize("batch", [False, True])
def test_weights_of_each_head(batch: bool) -> None:
    layer = make()
    inputs = make_inputs(layer, "none", batch)
    weights = layer(*inputs, average_attn_weights=False)[1]
    reference = materialize(layer)(*inputs, average_attn_weights=False)[1]
    assert weights.shape == (*[BATCH] * batch, HEADS, QUERIES, KEYS)
    assert relative_error(weights, reference) < TOLERANCE
    assert layer(*inputs, need_weights=False)[1] is None


def test_dropout() -> None:
    layer = make(dropout=0.5)
    inputs = make_inputs(layer, "self", True)
    for need_weights in (False, True):
        arguments = {"need_weights": need_weights}
        layer.train()
        assert not torch.equal(layer(*inputs, **arguments)[0], layer(*inputs, **arguments)[0])
        layer.eval()
        assert torch.equal(layer(*inputs, **arguments)[0], layer(*inputs, **arguments)[0])


def test_one_product_for_self_attention() -> None:
    layer = make()
    calls: list[tuple[int, ...]] = []
    layer.in_proj.register_forward_hook(lambda *call: calls.append(call[-1].shape))
    layer(*make_inputs(layer, "self", True))
    assert calls == [(QUERIES, BATCH, 3 * SIZE)]
    layer(*make_inputs(layer, "memory", True))
    assert calls[1:] == [(KEYS, BATCH, 2 * SIZE), (QUERIES, BATCH, SIZE)]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"bias": False}, {"kdim": 24, "vdim": 40}, {"add_bias_kv": True, "batch_first": True}],
)
def test_compress_carries_parameters(arguments: dict[str, Any]) -> None:
    dense = nn.MultiheadAttention(32, 4, **arguments)
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    layer, _ = compress(dense, 1 / 2)
    plain = materialize(layer)
    assert plain.state_dict().keys() == dense.state_dict().keys()
    carried = [name for name in ("in_proj_bias", "out_proj.bias", "bias_k", "bias_v")]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, dense.state_dict()[name]) == (name in carried)
    assert plain.batch_first == dense.batch_first


def test_initialisation() -> None:
    layer = HFHMultiheadAttention(128, 4, pool=Pool(2**14))
    # Xavier's on the packed weight, [3 * 128, 128].
    assert layer.in_proj.materialize().var().item() == pytest.approx(2 / (4 * 128), rel=0.1)
    assert layer.out_proj.materialize().var().item() == pytest.approx(1 / (3 * 128), rel=0.1)
    assert not layer.in_proj_bias.any()  # type: ignore[union-attr]
    scale = layer.in_proj.scale
    layer.reset_parameters()
    assert layer.in_proj.scale == scale


class TestTransformer:
    """Torch's fast path reads weights of the parts; each way of not having them must be seen."""

    @pytest.mark.parametrize("skip", [(), ("*self_attn",), ("*linear*",), ("*out_proj",)])
    @pytest.mark.parametrize("layers", [1, 2])
    def test_inference(self, skip: tuple[str, ...], layers: int) -> None:
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        dense = nn.TransformerEncoder(layer, layers).eval()
        model, _ = compress(dense, 3 / 4, skip=skip)
        input = torch.randn(BATCH, KEYS, 32)
        padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
        padding[0, -2:] = True
        expected = model(input, src_key_padding_mask=padding)
        with torch.no_grad():
            output = model(input, src_key_padding_mask=padding)
            plain = materialize(model)(input, src_key_padding_mask=padding)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(output[~padding], plain[~padding])

    def test_fast_path_is_restored(self) -> None:
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        dense: Any = nn.TransformerEncoder(layer, 1).eval()
        model, _ = compress(dense, 3 / 4)
        plain = materialize(model)
        assert vars(plain).keys() == vars(dense).keys()
        assert plain.use_nested_tensor == dense.use_nested_tensor is True
        assert plain.layers[0].activation_relu_or_gelu == 1
        assert vars(plain.layers[0]).keys() == vars(dense.layers[0]).keys()
        assert dense.layers[0].activation_relu_or_gelu == 1

    def test_fast_path_stays_where_nothing_changed(self) -> None:
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        dense = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Linear(32, 64))
        model, _ = compress(dense, 0.95, skip=nn.TransformerEncoder)
        assert model[0].layers[0].activation_relu_or_gelu == 1

    def test_decoder(self) -> None:
        layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
        model, _ = compress(nn.TransformerDecoder(layer, 1).double().eval(), 1 / 2)
        target, memory = (torch.randn(BATCH, length, 32).double() for length in (QUERIES, KEYS))
        mask = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
        arguments = {"tgt_mask": mask, "tgt_is_causal": True}
        output = model(target, memory, **arguments)
        reference = materialize(model)(target, memory, **arguments)
        assert relative_error(output, reference) < TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"embed_dim": 0}, ValueError, "embed_dim .* received 0"),
        ({"num_heads": 5}, ValueError, "embed_dim must be a multiple of num_heads=5, received 12"),
        ({"num_heads": 2.0}, TypeError, "num_heads .* received 2.0"),
    ],
)
def test_invalid_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    valid: dict[str, Any] = {"embed_dim": 12, "num_heads": 3, "pool": Pool(96)}
    with pytest.raises(error, match=message):
        HFHMultiheadAttention(**{**valid, **arguments})


INVALID_CALLS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([(4, 2, 11)] * 3, {}, ValueError, r"query must have 12 features, received shape \[4, 2, 11\]"),
    ([(4, 12), (4, 2, 12), (4, 2, 12)], {}, ValueError, "key must be 2-d or 3-d, as query is"),
    ([(4, 2, 12), (5, 2, 12), (4, 2, 12)], {}, ValueError, "value must have key's shape"),
    ([(2, 4, 2, 12)] * 3, {}, ValueError, "query must be 2-d or 3-d"),
    ([(4, 2, 12)] * 3, {"is_causal": True}, ValueError, "attn_mask must be given"),
    (
        [(4, 2, 12)] * 3,
        {"attn_mask": torch.zeros(4, 3)},
        ValueError,
        r"attn_mask must have shape \[4, 4\] or \[6, 4, 4\], received shape \[4, 3\]",
    ),
    (
        [(4, 2, 12)] * 3,
        {"key_padding_mask": torch.zeros(4, 2)},
        ValueError,
        r"key_padding_mask must have shape \[2, 4\], received shape \[4, 2\]",
    ),
    (
        [(4, 2, 12)] * 3,
        {"attn_mask": torch.zeros(4, 4, dtype=torch.int64)},
        TypeError,
        r"attn_mask must be bool or floating, received torch\.int64",
    ),
]


@pytest.mark.parametrize(("shapes", "arguments", "error", "message"), INVALID_CALLS)
def test_invalid_calls(
    shapes: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    with pytest.raises(error, match=message):
        make()(*inputs, **arguments)


def test_nested_input() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(3, SIZE), torch.zeros(2, SIZE)])
    with pytest.raises(ValueError, match="query must not be nested"):
        make()(nested, nested, nested)


def test_projections_are_layers_over_the_pool() -> None:
    for extra in EXTRAS:
        layer = make(**extra)
        projections = [part for part in layer.children() if isinstance(part, HFHLinear)]
        assert len(projections) == (4 if "kdim" in extra else 2)
        assert math.prod(projections[-1].weight_shape) == SIZE**2
