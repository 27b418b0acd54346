"""The layers of torch.nn that have a hashed counterpart, and the way there and back.

Both have the same arguments under the same names, and every parameter of the one has a place in
the other: a weight is virtual there, anything else the very same parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from hfh.layers.attention import HFHMultiheadAttention
from hfh.layers.recurrent import HFHGRU, HFHLSTM, weight_names
from hfh_kernels.nn import HFHConv1d, HFHConv2d, HFHEmbedding, HFHEmbeddingBag, HFHLinear

Names = dict[str, str]
"""By the place in the hashed module, the place in torch's."""


class Kind(NamedTuple):
    """A layer of torch.nn and its hashed counterpart."""

    dense: type[nn.Module]
    hashed: type[nn.Module]
    arguments: Callable[[nn.Module], dict[str, Any]]
    """The constructors' arguments, from a module of either class."""
    weights: Callable[[nn.Module], Names]
    """Submodules with a virtual weight ("" for the module itself), from a module of either."""
    others: Callable[[nn.Module], Names]
    """Parameters beside the weights, present or None, from a module of either class."""


def attribute(module: nn.Module, path: str) -> Any:
    """What lies at a dotted path; None where there is nothing."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name, None)


def set_attribute(module: nn.Module, path: str, value: Any) -> None:
    """Put a value at a dotted path."""
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, value)


def of_dense(module: nn.Module) -> Kind | None:
    """The kind of a module of torch.nn or of a class derived from one."""
    return next((kind for kind in KINDS if isinstance(module, kind.dense)), None)


def of_hashed(module: nn.Module) -> Kind | None:
    """The kind of a hashed module."""
    return next((kind for kind in KINDS if isinstance(module, kind.hashed)), None)


def _with_arguments(*names: str) -> Callable[[nn.Module], dict[str, Any]]:
    """Those that are attributes; "bias" is a parameter or None, or a bool in recurrent layers."""

    def arguments(module: nn.Module) -> dict[str, Any]:
        values: dict[str, Any] = {name: getattr(module, name) for name in names}
        if "bias" in values and not isinstance(values["bias"], bool):
            values["bias"] = values["bias"] is not None
        return values

    return arguments


def _one_weight(module: nn.Module) -> Names:
    return {"": "weight"}


def _bias(module: nn.Module) -> Names:
    return {"bias": "bias"}


def _none(module: nn.Module) -> Names:
    return {}


def _recurrent_weights(module: nn.Module) -> Names:
    return {name: f"weight_{ending}" for name, ending in weight_names(module)}


def _recurrent_biases(module: nn.Module) -> Names:
    return {
        f"{name}.bias": f"bias_{ending}"
        for name, ending in weight_names(module)
        if not name.startswith("projection")
    }


def _attention_arguments(module: nn.Module) -> dict[str, Any]:
    names = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
    return {
        **{name: getattr(module, name) for name in names},
        "bias": module.in_proj_bias is not None,
        "add_bias_kv": module.bias_k is not None,
    }


def _attention_weights(module: nn.Module) -> Names:
    if module._qkv_same_embed_dim:
        projections = {"in_proj": "in_proj_weight"}
    else:
        projections = {f"{name}_proj": f"{name}_proj_weight" for name in "qkv"}
    return {**projections, "out_proj": "out_proj.weight"}


def _attention_others(module: nn.Module) -> Names:
    return {name: name for name in ("in_proj_bias", "out_proj.bias", "bias_k", "bias_v")}


_CONVOLUTION = _with_arguments(
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "bias",
)
_RECURRENT = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
)


def _kinds() -> Iterator[Kind]:
    linear = _with_arguments("in_features", "out_features", "bias")
    yield Kind(nn.Linear, HFHLinear, linear, _one_weight, _bias)
    yield Kind(nn.Conv1d, HFHConv1d, _CONVOLUTION, _one_weight, _bias)
    yield Kind(nn.Conv2d, HFHConv2d, _CONVOLUTION, _one_weight, _bias)
    table = ("num_embeddings", "embedding_dim", "padding_idx")
    rows = _with_arguments(*table)
    yield Kind(nn.Embedding, HFHEmbedding, rows, _one_weight, _none)
    bags = _with_arguments(*table, "mode", "include_last_offset")
    yield Kind(nn.EmbeddingBag, HFHEmbeddingBag, bags, _one_weight, _none)
    lstm = _with_arguments(*_RECURRENT, "proj_size")
    yield Kind(nn.LSTM, HFHLSTM, lstm, _recurrent_weights, _recurrent_biases)
    gru = _with_arguments(*_RECURRENT)
    yield Kind(nn.GRU, HFHGRU, gru, _recurrent_weights, _recurrent_biases)
    yield Kind(
        nn.MultiheadAttention,
        HFHMultiheadAttention,
        _attention_arguments,
        _attention_weights,
        _attention_others,
    )


KINDS = tuple(_kinds())
