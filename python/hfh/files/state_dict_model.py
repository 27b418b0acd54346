"""A model of which only the tensors are known, as those of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hfh.files.checkpoint_contents import Checkpoint
from hfh.layers.attention import PackedProjection
from hfh_kernels.nn import HFHConv1d, HFHConv2d, HFHEmbedding, HFHEmbeddingBag, HFHLinear, Pool
from hfh_kernels.nn.layer import HFHLayer

_CLASSES: dict[str, type[HFHLayer]] = {
    layer.__name__: layer
    for layer in (HFHLinear, PackedProjection, HFHConv1d, HFHConv2d, HFHEmbedding, HFHEmbeddingBag)
}
_HASH_ARGUMENTS = (
    *("num_hashes", "depth", "width", "activation"),
    *("block", "window", "rows_per_window", "seed"),
)
_BY_DIMENSIONS: dict[int, Callable[..., nn.Module]] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}
"""Layers of one weight, by the dimensions it has."""
_BY_GATES: dict[float, Callable[..., nn.Module]] = {3: nn.GRU, 4: nn.LSTM}
"""Recurrent layers, by the rows of a weight for each hidden unit."""


class StateDictModel(nn.Module):
    """A tree of modules whose state dict has the names of a file; it has no forward pass.

    For what needs weights alone: compressing, materialising, saving, counting.
    """


def state_dict_model(contents: Checkpoint) -> StateDictModel:
    """The model of a file, with hashed layers where the file has them.

    Elsewhere tensors that have the names and shapes of an LSTM, GRU or MultiheadAttention become
    one, and a floating ``*.weight`` of two, three or four dimensions that of a Linear, Conv1d or
    Conv2d, with the ``bias`` beside it. (An embedding's cannot be told from a Linear's, and an
    attention layer's heads not at all.) Everything else stays a parameter or, unless floating, a
    buffer.

    Raises:
        ValueError: a name cannot be that of a parameter of a module, or a layer is of a class that
            is not of hfh_kernels or hfh.
    """
    model = StateDictModel()
    pools: dict[str, Pool] = {}
    for owner in sorted({name.rpartition(".")[0] for name in contents.names} - {""}, key=_place):
        _put(model, owner, nn.Module())
    for path, entry in contents.layers.items():
        pool_name = contents.stored_name(f"{path}.pool.weight")
        if pool_name not in pools:
            pools[pool_name] = Pool(contents.tensors[pool_name].numel(), device="meta")
        _put(model, path, _hashed_layer(path, entry, pools[pool_name]))
    values = {
        name: nn.Parameter(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in contents.tensors.items()
    }
    for owner, layer in _dense_layers(contents):
        _put(model, owner, layer)
    for name in contents.names:
        _put(model, name, values[contents.stored_name(name)])
    return model


def _place(path: str) -> list[str]:
    """Sorts numbers by their size."""
    return [part.zfill(9) if part.isdecimal() else part for part in path.split(".")]


def _dense_layers(contents: Checkpoint) -> Iterator[tuple[str, nn.Module]]:
    """By path, the layers of torch.nn that have just the tensors within it, without memory."""
    within: dict[str, dict[str, Tensor]] = {}
    for name in contents.names:
        for end in (index for index, character in enumerate(name) if character == "."):
            tensors = within.setdefault(name[:end], {})
            tensors[name[end + 1 :]] = contents.tensors[contents.stored_name(name)]
    found: set[str] = set()
    for owner in sorted(within, key=len):
        outer = (owner[:end] for end, character in enumerate(owner) if character == ".")
        if owner in contents.layers or not found.isdisjoint(outer):
            continue
        layer = _dense_layer(within[owner])
        if layer is not None:
            found.add(owner)
            yield owner, layer


def _dense_layer(tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """The layer of torch.nn that has just these; None where there is none."""
    first = next(iter(tensors.values()))
    if not first.is_floating_point() or any(
        tensor.numel() == 0 or tensor.dtype != first.dtype for tensor in tensors.values()
    ):
        return None
    for layer_of in (_layer_of_one_weight, _recurrent_layer, _attention_layer):
        layer = layer_of(tensors)
        if layer is None:
            continue
        shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
        if shapes == {name: tensor.shape for name, tensor in tensors.items()}:
            return layer
    return None


def _layer_of_one_weight(tensors: Mapping[str, Tensor]) -> nn.Module | None:
    weight = tensors.get("weight")
    if weight is None or weight.dim() not in _BY_DIMENSIONS:
        return None
    rows, cols, *kernel = weight.shape
    sizes = (cols, rows, kernel) if kernel else (cols, rows)
    return _BY_DIMENSIONS[weight.dim()](*sizes, bias="bias" in tensors, device="meta")


def _recurrent_layer(tensors: Mapping[str, Tensor]) -> nn.Module | None:
    of_input, of_hidden = tensors.get("weight_ih_l0"), tensors.get("weight_hh_l0")
    projection = tensors.get("weight_hr_l0", of_hidden)
    if of_input is None or of_hidden is None or projection is None:
        return None
    if not of_input.dim() == of_hidden.dim() == projection.dim() == 2:
        return None
    hidden_size = projection.shape[1]
    gates = len(of_hidden) / hidden_size
    if gates not in _BY_GATES:
        return None
    proj_size = {"proj_size": len(projection)} if "weight_hr_l0" in tensors else {}
    if proj_size and (_BY_GATES[gates] is not nn.LSTM or len(projection) >= hidden_size):
        return None
    return _BY_GATES[gates](
        of_input.shape[1],
        hidden_size,
        num_layers=sum(f"weight_ih_l{index}" in tensors for index in range(len(tensors))),
        bias="bias_ih_l0" in tensors,
        bidirectional="weight_ih_l0_reverse" in tensors,
        device="meta",
        **proj_size,
    )


def _attention_layer(tensors: Mapping[str, Tensor]) -> nn.Module | None:
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    if "out_proj.weight" not in matrices:
        return None
    widths = {
        argument: matrices[name].shape[1]
        for argument, name in (("kdim", "k_proj_weight"), ("vdim", "v_proj_weight"))
        if name in matrices
    }
    return nn.MultiheadAttention(
        len(matrices["out_proj.weight"]),
        num_heads=1,
        bias="in_proj_bias" in tensors,
        add_bias_kv="bias_k" in tensors,
        device="meta",
        **widths,
    )


def _hashed_layer(path: str, entry: Mapping[str, Any], pool: Pool) -> HFHLayer:
    """The layer that the file describes, without memory."""
    if entry["class"] not in _CLASSES:
        raise ValueError(f"the file has a layer of unknown class, {path}: {entry['class']}")
    state = entry["state"]
    hash_arguments = {name: state[name] for name in _HASH_ARGUMENTS}
    if "dense_rows" in state:
        hash_arguments["dense_rows"] = state["dense_rows"]
    layer = _CLASSES[entry["class"]](
        **entry["arguments"], **hash_arguments, pool=pool, device="meta"
    )
    layer.scale = state["scale"]
    return layer


def _put(model: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Set a module, a parameter or a buffer, with modules on the way where there are none."""
    *owners, name = path.split(".")
    module = model
    try:
        for owner in owners:
            if owner not in module._modules:
                module.add_module(owner, nn.Module())
            module = module.get_submodule(owner)
        if isinstance(value, nn.Module):
            module.add_module(name, value)
        elif isinstance(value, nn.Parameter):
            module.register_parameter(name, value)
        else:
            module.register_buffer(name, value)
    except KeyError as error:
        raise ValueError(f"{path!r} cannot be the name of a parameter: {error.args[0]}") from error
