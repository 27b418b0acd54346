"""A model of which only the tensors are known, as those of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
_DENSE_LAYERS: dict[int, Callable[..., nn.Module]] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}
"""By the dimensions of their weight."""


class StateDictModel(nn.Module):
    """A tree of modules whose state dict has the names of a file; it has no forward pass.

    For what needs weights alone: compressing, materialising, saving, counting.
    """


def state_dict_model(contents: Checkpoint) -> StateDictModel:
    """The model of a file, with hashed layers where the file has them.

    Elsewhere a floating ``*.weight`` of two, three or four dimensions becomes that of a Linear,
    Conv1d or Conv2d, with the ``bias`` beside it. (An embedding's cannot be told from a Linear's.)
    Everything else stays a parameter or, unless floating, a buffer.

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
    for owner, members in _members(contents).items():
        layer = None if owner in contents.layers else _dense_layer(members)
        if layer is not None:
            _put(model, owner, layer)
    for name in contents.names:
        _put(model, name, values[contents.stored_name(name)])
    return model


def _place(path: str) -> list[str]:
    """Sorts numbers by their size."""
    return [part.zfill(9) if part.isdecimal() else part for part in path.split(".")]


def _members(contents: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Tensors by their last name, of every path that has no paths within it."""
    members: dict[str, dict[str, Tensor]] = {}
    for name in contents.names:
        owner, _, leaf = name.rpartition(".")
        members.setdefault(owner, {})[leaf] = contents.tensors[contents.stored_name(name)]
    outer = {""}
    for owner in members:
        outer |= {owner[:end] for end, character in enumerate(owner) if character == "."}
    return {owner: tensors for owner, tensors in members.items() if owner not in outer}


def _dense_layer(tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """The layer of torch.nn that has just these; None where there is none."""
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or not weight.is_floating_point() or weight.numel() == 0:
        return None
    is_bias = bias is None or (bias.shape, bias.dtype) == (weight.shape[:1], weight.dtype)
    if tensors.keys() - {"weight", "bias"} or not is_bias or weight.dim() not in _DENSE_LAYERS:
        return None
    rows, cols, *kernel = weight.shape
    sizes = (cols, rows, kernel) if kernel else (cols, rows)
    return _DENSE_LAYERS[weight.dim()](*sizes, bias=bias is not None, device="meta")


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
