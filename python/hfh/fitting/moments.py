"""Second moments of the inputs of a dense model's layers: what errors of their weights cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfh_kernels.spec import require_int

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_CHUNK_ELEMENTS = 2**24
"""Of patches at a time, where one image has fewer."""


def second_moments(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Iterable[nn.Module] | None = None,
    max_cols: int = 4096,
) -> dict[nn.Module, Tensor]:
    """E[x x^T], or its diagonal, of the inputs x of a model's linear and convolutional layers.

    x is what one row of the layer's weight matrix [rows, cols] is multiplied with: an input vector,
    or for a convolution the patch (input channel of the group, kernel row, kernel column) behind
    one output position, with its padding; the mean is over all of them, and over groups. An error R
    of that matrix changes the squared output by trace(R E[x x^T] R^T) on average: hand the moments
    to :func:`hfh.fit` as importance, of the layers that take these layers' places.

    The model runs as it is (call ``eval()`` where dropout or batch norm should not disturb),
    without gradients; a thousand inputs are plenty.

    Args:
        model: dense.
        batches: what to call it with: a tensor, or a tuple of positional or a dict of named
            arguments, each.
        layers: those to look at; by default every ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d``.
        max_cols: of matrices; where cols are more, only the diagonal E[x^2] is taken. 0 for
            diagonals everywhere.

    Returns:
        float32 [cols, cols] or [cols] by layer, on its input's device; no layer whose forward
        method did not run, as in ``nn.MultiheadAttention``, which reads the weights of its own.

    Raises:
        TypeError: a layer is of another kind, or max_cols not an int.
        ValueError: max_cols is negative, or batches is empty.
    """
    require_int("max_cols", max_cols, 0, 2**32)
    if layers is None:
        layers = [module for module in model.modules() if isinstance(module, _KINDS)]
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}

    def add(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        input = arguments[0] if arguments else named["input"]
        for rows in _rows(layer, input.detach().float()):
            is_matrix = rows.shape[1] <= max_cols
            moments = rows.T @ rows if is_matrix else rows.square().sum(dim=0)
            sums[layer] = sums[layer] + moments if layer in sums else moments
            counts[layer] = counts.get(layer, 0) + len(rows)

    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            if not isinstance(layer, _KINDS):
                names = ", ".join(kind.__name__ for kind in _KINDS)
                raise TypeError(f"layers must be of {names}, received {type(layer).__name__}")
            hooks.callback(layer.register_forward_pre_hook(add, with_kwargs=True).remove)
        has_run = False
        for batch in batches:
            has_run = True
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*(batch if isinstance(batch, tuple) else (batch,)))
    if not has_run:
        raise ValueError("batches must not be empty")
    return {layer: total / counts[layer] for layer, total in sums.items()}


def _rows(layer: nn.Module, input: Tensor) -> Iterator[Tensor]:
    """All x [count, cols], some at a time."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        yield input.reshape(-1, input.shape[-1])
        return
    dims = len(layer.kernel_size)
    # PyTorch's own account of "same", "valid" and numbers.
    sides = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    images = functional.pad(input.reshape(-1, *input.shape[-dims - 1 :]), sides, mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if dims == 1:
        images = images.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    elements = images[:1].numel() * kernel[0] * kernel[1]
    for chunk in images.split(max(1, _CHUNK_ELEMENTS // max(1, elements))):
        patches = functional.unfold(chunk, kernel, dilation=dilation, stride=stride)
        by_group = patches.unflatten(1, (layer.groups, -1))
        yield by_group.movedim(2, 3).flatten(0, 2)
