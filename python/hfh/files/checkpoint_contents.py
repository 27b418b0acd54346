"""What the file of a model holds, and what a model has for one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hfh.compression import kinds
from hfh_kernels.nn import Pool
from hfh_kernels.nn.layer import HFHLayer


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds; :mod:`hfh.files.checkpoint` says what the fields are."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    layers: dict[str, dict[str, Any]]
    extra_states: dict[str, Any]
    dense_names: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all tensors, shared ones by each of theirs."""
        return [*self.tensors, *self.aliases]

    def stored_name(self, name: str) -> str:
        """The name that the file has a tensor under."""
        return self.aliases.get(name, name)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same with other names of those tensors that ``names`` has."""
        return replace(
            self,
            tensors={names.get(name, name): tensor for name, tensor in self.tensors.items()},
            aliases={
                names.get(alias, alias): names.get(name, name)
                for alias, name in self.aliases.items()
            },
        )

    def state_dict(self) -> dict[str, Any]:
        """Of the model that was saved, with shared tensors under each of their names."""
        return {
            **{name: self.tensors[self.stored_name(name)] for name in self.names},
            **{extra_state_key(path): layer["state"] for path, layer in self.layers.items()},
            **self.extra_states,
        }


def describe(model: nn.Module) -> Checkpoint:
    """What a file of this model holds."""
    tensors, extra_states = named_state(model)
    aliases = first_names({name: identity(tensor) for name, tensor in tensors.items()})
    stored = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    layers = {path: describe_layer(layer) for path, layer in hashed_layers(model)}
    return Checkpoint(stored, aliases, layers, extra_states, _dense_names(model))


def _dense_names(model: nn.Module) -> dict[str, str]:
    names: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = kinds.of_hashed(module)
        if kind is None:
            continue
        places = {
            f"{place}.weight".lstrip("."): name for place, name in kind.weights(module).items()
        }
        for place, name in kind.others(module).items():
            if kinds.attribute(module, place) is not None:
                places[place] = name
        prefix = f"{path}." if path else ""
        names |= {prefix + place: prefix + name for place, name in places.items() if place != name}
    return names


def describe_layer(layer: HFHLayer) -> dict[str, Any]:
    """The class, the arguments it shares with torch.nn's class, and all that its hash and g are."""
    kind = kinds.of_hashed(layer)
    arguments = {} if kind is None else kind.arguments(layer)
    return {
        "class": type(layer).__name__,
        # Lists, as JSON gives them back.
        "arguments": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in arguments.items()
        },
        "state": layer.get_extra_state(),
    }


def hashed_layers(model: nn.Module) -> Iterator[tuple[str, HFHLayer]]:
    """Every layer over a pool, by each path that leads to it."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, HFHLayer):
            yield path, module


def extra_state_key(path: str) -> str:
    """Where the state dict of a model has the extra state of the module at a path."""
    return f"{path}._extra_state" if path else "_extra_state"


def named_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors, shared ones by each of their names, and extra states but those of our layers."""
    state = model.state_dict(keep_vars=True)
    for path, _ in hashed_layers(model):
        del state[extra_state_key(path)]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    extra_states = {key: value for key, value in state.items() if key not in tensors}
    # A state dict has each pool once, where this model happens to be traversed first.
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Pool):
            tensors[f"{path}.weight" if path else "weight"] = module.weight
    return tensors, extra_states


def first_names(identities: Mapping[str, Hashable]) -> dict[str, str]:
    """For each name that shares its identity with others, but the first of them: that first."""
    first: dict[Hashable, str] = {}
    aliases = {}
    for name in sorted(identities):
        kept = first.setdefault(identities[name], name)
        if kept != name:
            aliases[name] = kept
    return aliases


def identity(tensor: Tensor) -> Hashable:
    """Equal for tensors that are one: the same object, or the same view of the same memory."""
    if tensor.numel() == 0 or tensor.is_meta or tensor.layout != torch.strided:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
