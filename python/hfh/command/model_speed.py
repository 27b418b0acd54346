"""Time of a compressed model against the dense one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfh import machine
from hfh.text_table import text_table
from hfh.timing import interleaved_medians


@dataclass(frozen=True)
class Speed:
    """Median seconds of one call of each model, and what was called."""

    dense: float
    compressed: float
    training: bool
    repeats: int

    @property
    def ratio(self) -> float:
        """Below 1 the compressed model is faster."""
        return self.compressed / self.dense

    def table(self) -> str:
        """Plain text."""
        what = "forward and backward" if self.training else "forward"
        rows = [
            ("dense", f"{1e3 * self.dense:.3f}", "1.00"),
            ("compressed", f"{1e3 * self.compressed:.3f}", f"{self.ratio:.2f}"),
        ]
        return text_table((what, "ms", "ratio"), rows)

    def to_json(self) -> str:
        """The figures and the machine they are of, as one JSON object."""
        return json.dumps(
            {
                "dense_seconds": self.dense,
                "compressed_seconds": self.compressed,
                "ratio": self.ratio,
                "training": self.training,
                "repeats": self.repeats,
                "machine": machine.describe(),
            }
        )


def compare(
    dense: nn.Module,
    compressed: nn.Module,
    input: Tensor,
    training: bool,
    repeats: int,
    on_repeat: Callable[[], None],
) -> Speed:
    """Interleaved medians of the forward pass in inference, or of forward and backward in training.

    Args:
        dense, compressed: models of one argument; their modes are set, their gradients dropped.
        input: that argument.
        training: whether to time a backward pass too, from the sum of all outputs.
        repeats: timed calls of each.
        on_repeat: called after each repeat, of which there are ``repeats``.
    """
    call = _train if training else _infer
    for model in (dense, compressed):
        model.train(training)
    medians = interleaved_medians(
        {"dense": lambda: call(dense, input), "compressed": lambda: call(compressed, input)},
        repeats,
        warmup=max(2, repeats // 5),
        on_repeat=on_repeat,
    )
    return Speed(medians["dense"], medians["compressed"], training, repeats)


@torch.inference_mode()
def _infer(model: nn.Module, input: Tensor) -> None:
    model(input)


def _train(model: nn.Module, input: Tensor) -> None:
    torch.stack([output.sum() for output in _tensors(model(input))]).sum().backward()
    model.zero_grad(set_to_none=True)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Differentiable ones, of an output that may be a tree of them."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors(part)
