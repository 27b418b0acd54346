"""Files of compressed models: every tensor once, and what the weights mean beside them.

A safetensors file, so nothing in it is code. Its metadata hold, as JSON under "hfh":

- ``format_version``, and the ``hash_version`` that the virtual weights were made with;
- ``aliases``: the other names of shared tensors, each with the name the file has it under. A pool
  has a name in every layer that reads it;
- ``layers``: of every layer over a pool, by its path, the class, the arguments it shares with
  torch.nn's class, and its extra state;
- ``extra_states``: those of other modules, by their key in the state dict;
- ``dense_names``: torch.nn's names of the weights and biases within recurrent and attention layers,
  by the names that the layers over a pool give them.

A checksum over tensors and metadata is beside it.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hfh.files import tensor_file
from hfh.files.checkpoint_contents import (
    Checkpoint,
    describe,
    first_names,
    hashed_layers,
    identity,
    named_state,
)
from hfh.files.restructure import hashed_as
from hfh.files.tensor_file import CheckpointError
from hfh_kernels.spec import HASH_VERSION

FORMAT_VERSION = 1
METADATA_KEY = "hfh"

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's tensors and what its virtual weights mean to a safetensors file.

    Shared tensors, above all the pool, are written once. The file appears whole or not at all: an
    error or a crash leaves an older file at path as it was.

    Raises:
        OSError: path cannot be written to.
        TypeError: the extra state of a module that is no layer over a pool is not JSON.
        ValueError: a tensor is sparse, or on the meta device and so without data.
    """
    contents = describe(model)
    for name, tensor in contents.tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
            raise ValueError(f"model has a tensor that cannot be saved: {name} is {kind}")
    for key, state in contents.extra_states.items():
        if not _is_json(state):
            raise TypeError(f"model has a state that cannot be saved as JSON: {key} is {state!r}")
    write(contents, Path(path))


def load(path: str | os.PathLike[str], model: ModuleType) -> ModuleType:
    """Read a file of :func:`save` into a model; returns it.

    The model is one that was compressed the same way, or the dense one, whose layers are then
    replaced by those of the file. Hash seeds are those of the file, whatever the model's were.
    Everything is checked before anything in the model changes.

    Raises:
        CheckpointError: the file is damaged or of another version, or it holds another model: other
            layers, hashes, tensors, shapes, dtypes or ties.
        OSError: the file cannot be read.
    """
    path = Path(path)
    contents = read(path)
    with hashed_as(contents, model) as contents:
        difference = next(_differences(contents, model), None)
        if difference is not None:
            raise CheckpointError(f"{path}: {difference}")
    model.load_state_dict(contents.state_dict())
    return model


def read(path: Path, *, of_any_program: bool = False) -> Checkpoint:
    """What a file of :func:`save` holds, once its checksum and versions are found right.

    Args:
        path: of the file.
        of_any_program: take other safetensors files too, which hold tensors, and may note which
            of them are shared.

    Raises:
        CheckpointError: it is damaged, of another version or not a file of :func:`save`.
        OSError: it cannot be read.
    """
    tensors, metadata = tensor_file.read(path)
    if not metadata.keys() >= {METADATA_KEY, tensor_file.CHECKSUM}:
        if of_any_program:
            return Checkpoint(tensors, _noted_ties(tensors, metadata), {}, {})
        raise CheckpointError(f"{path}: a safetensors file, but not one that hfh.save wrote")
    fields = json.loads(metadata[METADATA_KEY])
    for name, version in _VERSIONS.items():
        if fields.get(name) != version:
            raise CheckpointError(
                f"{path}: has {name}={fields.get(name)!r}, this version of hfh reads {version}"
            )
    return Checkpoint(tensors, **{name: fields[name] for name in _FIELDS})


def write(contents: Checkpoint, path: Path) -> None:
    """The inverse of :func:`read`."""
    fields = {**_VERSIONS, **{name: getattr(contents, name) for name in _FIELDS}}
    # By the format other programs know whose tensors these are.
    metadata = {METADATA_KEY: json.dumps(fields), "format": "pt"}
    tensor_file.write(path, contents.tensors, metadata)


def _noted_ties(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Aliases as safetensors' save_model notes them: by each name that was dropped, the kept."""
    return {
        alias: name for alias, name in metadata.items() if name in tensors and alias not in tensors
    }


def _is_json(state: Any) -> bool:
    """Whether JSON gives back the very same; tuples, for instance, come back as lists."""
    try:
        return bool(json.loads(json.dumps(state)) == state)
    except (TypeError, ValueError):
        return False


def _differences(contents: Checkpoint, model: nn.Module) -> Iterator[str]:
    """What keeps the contents from being this model's."""
    layers = dict(hashed_layers(model))
    yield from _differing_names("hashed layer", contents.layers, layers)
    for path, layer in layers.items():
        saved = contents.layers[path]
        if saved["class"] != type(layer).__name__:
            yield f"{path} is of class {saved['class']}, in the model of {type(layer).__name__}"
        try:
            # A copy takes the seed; the layer itself keeps its own until all is known to fit.
            copy.copy(layer).set_extra_state(saved["state"])
        except (TypeError, ValueError) as error:
            yield f"{path}: {error}"
    tensors, extra_states = named_state(model)
    yield from _differing_names("tensor", contents.names, tensors)
    yield from _differing_names("extra state", contents.extra_states, extra_states)
    for name, tensor in sorted(tensors.items()):
        saved_tensor = contents.tensors[contents.stored_name(name)]
        if tensor.is_meta:
            yield f"{name} is on the meta device in the model, which cannot hold values"
        if saved_tensor.shape != tensor.shape:
            yield (
                f"{name} has shape {list(saved_tensor.shape)}, in the model {list(tensor.shape)}"
            )
        if saved_tensor.dtype != tensor.dtype:
            yield f"{name} is {saved_tensor.dtype}, in the model {tensor.dtype}"
    saved_aliases = first_names({name: contents.stored_name(name) for name in tensors})
    aliases = first_names({name: identity(tensor) for name, tensor in tensors.items()})
    for name in sorted(tensors):
        saved_alias, alias = saved_aliases.get(name), aliases.get(name)
        if saved_alias != alias:
            one, other = ("the file", "the model") if saved_alias else ("the model", "the file")
            yield f"{name} is the same as {saved_alias or alias} in {one}, not in {other}"


def _differing_names(what: str, saved: Iterable[str], present: Iterable[str]) -> Iterator[str]:
    saved, present = set(saved), set(present)
    if present - saved:
        yield f"lacks {_listed(what, present - saved)}"
    if saved - present:
        yield f"has {_listed(what, saved - present)}, which the model has not"


def _listed(what: str, names: set[str]) -> str:
    """The first few of them, with their number where there are more."""
    shown = ", ".join(sorted(names)[:_MAX_LISTED])
    more = len(names) - _MAX_LISTED
    return f"the {what}{'s' * (len(names) > 1)} {shown}" + (f" and {more} more" * (more > 0))


_VERSIONS = {"format_version": FORMAT_VERSION, "hash_version": HASH_VERSION}
_FIELDS = ("aliases", "layers", "extra_states", "dense_names")
_MAX_LISTED = 4
