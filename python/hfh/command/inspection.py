"""What a model holds, for people and for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hfh.files import checkpoint_contents
from hfh.text_table import text_table


@dataclass(frozen=True)
class VirtualWeight:
    """A layer over a pool: its path, class, (rows, cols), and all that its hash and g are."""

    name: str
    kind: str
    shape: tuple[int, int]
    state: dict[str, Any]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor: its name, the other names of a shared one, dtype and shape."""

    name: str
    aliases: list[str]
    dtype: str
    shape: list[int]
    numbers: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """Every virtual weight and every tensor of a model, shared ones once."""

    layers: list[VirtualWeight]
    tensors: list[StoredTensor]

    @classmethod
    def of(cls, model: nn.Module) -> Inspection:
        """Of a model, which may be one without a forward pass."""
        contents = checkpoint_contents.describe(model)
        names: dict[str, list[str]] = {}
        for alias, name in contents.aliases.items():
            names.setdefault(name, []).append(alias)
        return cls(
            [
                VirtualWeight(
                    path, type(layer).__name__, layer.weight_shape, layer.get_extra_state()
                )
                for path, layer in checkpoint_contents.hashed_layers(model)
            ],
            [
                StoredTensor(
                    name,
                    names.get(name, []),
                    str(tensor.dtype).removeprefix("torch."),
                    list(tensor.shape),
                    tensor.numel(),
                    tensor.nbytes,
                )
                for name, tensor in contents.tensors.items()
            ],
        )

    @property
    def totals(self) -> dict[str, int]:
        """Virtual weights, and the numbers and bytes of all tensors."""
        return {
            "virtual_weights": sum(math.prod(layer.shape) for layer in self.layers),
            "numbers": sum(tensor.numbers for tensor in self.tensors),
            "bytes": sum(tensor.bytes for tensor in self.tensors),
        }

    def table(self) -> str:
        """Plain text: a line a virtual weight, a line a tensor, the totals."""
        parts = []
        if self.layers:
            headings = ("layer", "class", "g", "shape", "hashes", "block", "window", "seed")
            rows = [_layer_cells(layer) for layer in self.layers]
            parts.append(text_table(headings, rows, left=range(3)))
        tensors = [
            (
                tensor.name + (f" (and {len(tensor.aliases)} more)" if tensor.aliases else ""),
                tensor.dtype,
                _product(tensor.shape),
                f"{tensor.numbers:,}",
            )
            for tensor in self.tensors
        ]
        parts.append(text_table(("tensor", "dtype", "shape", "numbers"), tensors, left=range(2)))
        totals = self.totals
        stored = f"{totals['numbers']:,} numbers in {totals['bytes']:,} bytes"
        stands_for = (
            f", behind {totals['virtual_weights']:,} virtual weights" if self.layers else ""
        )
        return "\n\n".join((*parts, stored + stands_for))

    def to_json(self) -> str:
        """Layers, tensors and totals as one JSON object."""
        return json.dumps({**asdict(self), "totals": self.totals})


def _layer_cells(layer: VirtualWeight) -> tuple[str, ...]:
    state = layer.state
    g = "none"
    if state["depth"]:
        g = f"depth {state['depth']}"
    if state["depth"] > 1:
        g += f", width {state['width']}, {state['activation']}"
    window = "all" if state["window"] is None else f"{state['window']:,}/{state['rows_per_window']}"
    return (
        *(layer.name, layer.kind, g, _product(layer.shape)),
        *(str(state["num_hashes"]), str(state["block"]), window, f"{state['seed']:08x}"),
    )


def _product(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes)) or "1"
