"""A dense model takes the layers of a file of the compressed one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfh.compression import fast_path, kinds
from hfh.compression.kinds import Kind
from hfh.files.checkpoint_contents import Checkpoint, describe_layer, hashed_layers
from hfh_kernels.nn import Pool
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.spec import HashSpec, Reconstruction


@contextmanager
def hashed_as(contents: Checkpoint, model: nn.Module) -> Iterator[Checkpoint]:
    """In the context a dense model has hashed layers wherever the file has them; after it too,
    unless there was an error. A model with hashed layers stays as it is.

    Yields the contents as this model names them: a file that was made from tensors alone knows
    neither ties nor what sort of layer a weight belongs to.
    """
    if not contents.layers or any(hashed_layers(model)):
        yield contents
        return
    contents = _with_ties(contents, model)
    replacements = _Builder(contents).replacements(model)
    replaced = {path: model.get_submodule(path) for path in replacements}
    try:
        for path, hashed in replacements.items():
            kinds.set_attribute(model, path, hashed)
        fast_path.disable(model)
        yield _as_named_by(model, contents)
    except BaseException:
        fast_path.restore(model)
        for path, dense in replaced.items():
            kinds.set_attribute(model, path, dense)
        raise


def _with_ties(contents: Checkpoint, model: nn.Module) -> Checkpoint:
    """Layers of the model that share the weight of a layer in the file are in the file as well."""
    in_file: dict[Any, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path in contents.layers and hasattr(module, "weight"):
            in_file.setdefault(module.weight, path)
    layers, aliases = dict(contents.layers), dict(contents.aliases)
    for path, module in model.named_modules(remove_duplicate=False):
        tied = in_file.get(getattr(module, "weight", None))
        if tied is not None and path not in layers:
            layers[path] = layers[tied]
            for name in ("theta", "pool.weight"):
                aliases[f"{path}.{name}"] = contents.stored_name(f"{tied}.{name}")
    return dataclasses.replace(contents, layers=layers, aliases=aliases)


class _Builder:
    """Makes hashed layers that share pools and thetas as those of the file do."""

    def __init__(self, contents: Checkpoint) -> None:
        self.contents = contents
        self.pools: dict[str, Pool] = {}
        self.thetas: dict[str, nn.Parameter] = {}

    def replacements(self, model: nn.Module) -> dict[str, nn.Module]:
        """By path, for every layer of torch.nn all of whose weights the file has as virtual ones.

        The model itself cannot be replaced.
        """
        found: dict[nn.Module, nn.Module] = {}
        by_path = {}
        for path, module in model.named_modules(remove_duplicate=False):
            kind = kinds.of_dense(module)
            if kind is None or not path or type(module).forward is not kind.dense.forward:
                continue
            places = {place: f"{path}.{place}".rstrip(".") for place in kind.weights(module)}
            if self.contents.layers.keys() >= set(places.values()):
                if module not in found:
                    found[module] = self._hashed(module, kind, places)
                by_path[path] = found[module]
        return by_path

    def _hashed(self, module: nn.Module, kind: Kind, places: Mapping[str, str]) -> nn.Module:
        hashed = kind.hashed(
            **kind.arguments(module), pool=Pool(1, device="meta"), block=1, device="meta"
        )
        for place, path in kind.others(module).items():
            kinds.set_attribute(hashed, place, kinds.attribute(module, path))
        device = next(module.parameters()).device
        for place, path in places.items():
            layer = hashed.get_submodule(place)
            assert isinstance(layer, HFHLayer)
            state = self.contents.layers[path]["state"]
            layer.hash_spec = HashSpec(**_fields(HashSpec, state))
            layer.reconstruction = Reconstruction(**_fields(Reconstruction, state))
            layer.scale = state["scale"]
            layer.pool = self._pool(f"{path}.pool.weight", device)
            layer.theta = self._theta(f"{path}.theta", device)
        return hashed.train(module.training)

    def _pool(self, name: str, device: torch.device) -> Pool:
        name = self.contents.stored_name(name)
        if name not in self.pools:
            saved = self.contents.tensors[name]
            pool = Pool(saved.numel(), dtype=saved.dtype, device="meta")
            self.pools[name] = pool.to_empty(device=device)
        return self.pools[name]

    def _theta(self, name: str, device: torch.device) -> nn.Parameter:
        name = self.contents.stored_name(name)
        if name not in self.thetas:
            saved = self.contents.tensors[name]
            self.thetas[name] = nn.Parameter(torch.empty_like(saved, device=device))
        return self.thetas[name]


def _as_named_by(model: nn.Module, contents: Checkpoint) -> Checkpoint:
    """Layers of another class have the model's, where both read the same matrix.

    Linear layers of a file may be embeddings, and its convolutions have groups.
    """
    layers = dict(contents.layers)
    for path, layer in hashed_layers(model):
        if path in layers:
            saved, own = layers[path]["state"], describe_layer(layer)
            kernels = {saved.get("kernel_size"), own["state"].get("kernel_size")} - {None}
            if _matrix(saved) == layer.weight_shape and len(kernels) <= 1:
                layers[path] = own
    return dataclasses.replace(contents, layers=layers)


def _matrix(state: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a layer's weight; None where some of its rows are dense."""
    if "dense_rows" in state:
        return None
    if "in_features" in state:
        return state["out_features"], state["in_features"]
    if "num_embeddings" in state:
        return state["num_embeddings"], state["embedding_dim"]
    kernel = math.prod(map(int, state["kernel_size"].split("x")))
    return state["out_channels"], state["in_channels"] // state["groups"] * kernel


def _fields(of: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: state[field.name] for field in dataclasses.fields(of)}
