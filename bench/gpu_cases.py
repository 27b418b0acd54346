"""What is measured on a GPU: the candidates of every row, and the least that they must do."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpu_timer import Candidates, Timer, Work
from bench.shapes import (
    GPU_BATCHES,
    GPU_CONVOLUTIONS,
    GPU_DECODERS,
    GPU_LINEARS,
    GPU_LOOKUPS,
    GPU_SMALL_BATCH_LINEARS,
    GPU_TRAINING_LINEARS,
    SMALL_BATCHES,
    TRAINING_BATCH,
    ZIPF,
    GPUImages,
    GPULinear,
    GPULookups,
)
from hfh_kernels.functional.weight import weight_fields
from hfh_kernels.nn import HFHLinear

RESULTS = Path(__file__).parent / "results"
SMALL_BATCH_BACKENDS = ("cuda:tiles", "cuda:slot_products", "cuda:panels", "triton")
TRAINING_BACKENDS = ("cuda", "triton")

TINY_LINEARS = (GPULinear(64, 96), GPULinear(64, 64, block=1, depth=0, num_hashes=1))
TINY_WINDOWED = GPULinear(128, 96, block=64, compression=4, window=512, rows_per_window=16)
TINY_SMALL_BATCH_LINEARS = (TINY_WINDOWED, dataclasses.replace(TINY_WINDOWED, depth=1))
TINY_DECODERS = tuple(
    GPULinear(64, 64, block=32, depth=depth, window=512, rows_per_window=16, num_layers=3)
    for depth in (1, 2)
)
TINY_CONVOLUTIONS = (GPUImages(channels=32, size=5, batch=2),)
TINY_LOOKUPS = (
    GPULookups(num_embeddings=3200, num_indices=64),
    GPULookups(bag_size=8, num_embeddings=3200, num_indices=64),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table: what is measured, and what makes its candidates and their work.

    There are always the candidates dense and hfh, the layer as users call it.
    """

    what: str
    kind: str
    make: Callable[[], tuple[Candidates, dict[str, Work]]]
    inspect: Callable[[Timer, Candidates], dict[str, Any]] | None = None
    """More of a row, of the candidates that can run."""


KINDS = {"forward": False, "forward + backward": True}


def layer_cases(device: str, check: bool) -> Iterator[Case]:
    """Every operator as it is dispatched."""
    for shape in TINY_LINEARS if check else GPU_LINEARS:
        for batch in (1, 17) if check else GPU_BATCHES:
            for kind, backward in KINDS.items():
                make = functools.partial(linear_candidates, shape, batch, backward, device)
                yield Case(_name(shape, batch), kind, make)
    for images in TINY_CONVOLUTIONS if check else GPU_CONVOLUTIONS:
        for kind, backward in KINDS.items():
            make = functools.partial(convolution_candidates, images, backward, device)
            yield Case(images.name, kind, make)
    for lookups in TINY_LOOKUPS if check else GPU_LOOKUPS:
        for kind, backward in KINDS.items():
            make = functools.partial(lookup_candidates, lookups, backward, device)
            yield Case(lookups.name, kind, make)
        yield Case(lookups.name, "training step", functools.partial(lookup_steps, lookups, device))


def cuda_cases(device: str, check: bool) -> Iterator[Case]:
    """What the kernels of csrc/cuda are for, each of them beside Triton's."""
    for shape in TINY_SMALL_BATCH_LINEARS if check else GPU_SMALL_BATCH_LINEARS:
        for batch in (1, 9, 40) if check else SMALL_BATCHES:
            make = functools.partial(
                linear_candidates, shape, batch, False, device, SMALL_BATCH_BACKENDS
            )
            yield Case(_name(shape, batch), "forward", make, same_as_automatic)
    for shape in TINY_DECODERS if check else GPU_DECODERS:
        yield Case(
            _name(shape, 1),
            "decode step",
            functools.partial(decode_candidates, shape, device),
            functools.partial(inspect_decode, shape.num_layers),
        )
    for shape in TINY_SMALL_BATCH_LINEARS if check else GPU_TRAINING_LINEARS:
        batch = 17 if check else TRAINING_BATCH
        for kind, backward in KINDS.items():
            make = functools.partial(
                linear_candidates, shape, batch, backward, device, TRAINING_BACKENDS
            )
            yield Case(_name(shape, batch), kind, make)
    for lookups in TINY_LOOKUPS if check else GPU_LOOKUPS:
        skewed = dataclasses.replace(lookups, zipf=ZIPF)
        make = functools.partial(skewed_steps, lookups, skewed, device)
        yield Case(skewed.name, "training step", make)


def _name(shape: GPULinear, batch: int) -> str:
    return f"{shape.name}, {str(shape.dtype).removeprefix('torch.')}, batch {batch}"


def linear_candidates(
    shape: GPULinear, batch: int, backward: bool, device: str, backends: tuple[str, ...] = ()
) -> tuple[Candidates, dict[str, Work]]:
    """With a candidate for each of ``backends``, by its name.

    On the CPU the operators are one backend's alone: CUDA's by the emulator, or Triton's.
    """
    if device == "cpu":
        emulated = os.environ.get("HFH_EMULATE_CUDA") == "1"
        backends = tuple(name for name in backends if (name != "triton") == emulated)
    layer = shape.layer(device)
    input = shape.input(batch, device).requires_grad_(backward)
    weight = shape.dense_weight(device).requires_grad_(backward)
    leaves: list[Tensor] = [input, layer.pool.weight]
    if layer.reconstruction.depth > 0:
        leaves.append(layer.theta)
    forwards: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "dense": (lambda: F.linear(input, weight), [input, weight]),
        "materialize + dense": (lambda: F.linear(input, layer.materialize()), leaves),
        "hfh": (lambda: layer(input), leaves),
    }
    for backend in backends:
        forwards[backend] = (functools.partial(run_linear, layer, input, backend), leaves)
    if layer.reconstruction.depth == 0:
        # What a HashedNets written in PyTorch does: a gather of the whole matrix, and no g.
        index = torch.randint(
            layer.pool.weight.numel(), weight.shape, device=device, dtype=torch.int32
        )
        forwards["gather + dense"] = (
            lambda: F.linear(input, layer.pool.weight[index]),
            leaves,
        )
    grad = _gradient_of(forwards["dense"][0], backward)
    candidates: Candidates = {
        name: _candidate(forward, inputs, grad) for name, (forward, inputs) in forwards.items()
    }
    passes = 3 if backward else 1
    flops = 2.0 * passes * batch * weight.numel()
    activations = passes * batch * (shape.in_features + shape.out_features) * input.element_size()
    tiles_of_rows = -(-batch // 256)
    made = passes * weight.numel() * tiles_of_rows
    return candidates, {
        "dense": Work(passes * weight.numel() * weight.element_size() + activations, flops),
        "hfh": Work(
            layer.pool.weight.numel() * weight.element_size() + activations,
            flops,
            made * instructions_a_weight(shape),
        ),
    }


def run_linear(layer: HFHLinear, input: Tensor, backend: str) -> Tensor:
    """The layer by one implementation, or a RuntimeError that says why it cannot run."""
    weight = weight_fields(layer.hash_spec, layer.reconstruction, layer.scale, 0, 0)
    # The names of single kernels are the operator's alone.
    output: Tensor = torch.ops.hfh.linear(
        input, layer.pool.weight, layer.theta, None, layer.out_features, *weight[:-1], backend
    )
    return output


def _candidate(
    forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor | None
) -> Callable[[], object]:
    """The forward pass without a graph, or with ``grad`` of its output both passes."""

    def run() -> Tensor:
        with torch.no_grad():
            return forward()

    return run if grad is None else lambda: torch.autograd.grad(forward(), leaves, grad)


def _gradient_of(forward: Callable[[], Tensor], backward: bool) -> Tensor | None:
    with torch.no_grad():
        return torch.randn_like(forward()) if backward else None


def instructions_a_weight(shape: GPULinear) -> float:
    """Of Triton's forward loop as compiled for the H200; 0 where that was not looked at."""
    path = RESULTS / "compiled.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() and not shape.window else []
    kind = f"U{shape.num_hashes} depth {shape.depth}, block {shape.block},"
    found = [
        row["loop_instructions"]
        for row in rows
        if row["kernel"] == "_linear_fwd_kernel" and row["arch"] == 90 and kind in row["call"]
    ]
    return min(found, default=0.0)


def convolution_candidates(
    shape: GPUImages, backward: bool, device: str
) -> tuple[Candidates, dict[str, Work]]:
    layer = shape.layer(device)
    input = shape.input(device).requires_grad_(backward)
    dense = nn.Conv2d(
        shape.channels, shape.channels, 3, padding=1, bias=False, device=device, dtype=shape.dtype
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters: list[Tensor] = [input, layer.pool.weight, layer.theta]
    grad = _gradient_of(lambda: dense(input), backward)
    return {
        "dense": _candidate(lambda: dense(input), [input, dense.weight], grad),
        "materialize + dense": _candidate(
            lambda: F.conv2d(input, layer.materialize(), padding=1), parameters, grad
        ),
        "hfh": _candidate(lambda: layer(input), parameters, grad),
    }, {}


def lookup_candidates(
    shape: GPULookups, backward: bool, device: str
) -> tuple[Candidates, dict[str, Work]]:
    layer = shape.layer(device)
    arguments = shape.arguments(device)
    table = torch.randn(
        shape.num_embeddings, shape.embedding_dim, device=device, dtype=shape.dtype
    ).requires_grad_(backward)

    def dense() -> Tensor:
        if shape.bag_size:
            return F.embedding_bag(arguments[0], table, arguments[1], mode="sum")
        return F.embedding(arguments[0], table)

    grad = _gradient_of(dense, backward)
    return {
        "dense": _candidate(dense, [table], grad),
        "hfh": _candidate(lambda: layer(*arguments), [layer.pool.weight, layer.theta], grad),
    }, {}


def lookup_steps(shape: GPULookups, device: str) -> tuple[Candidates, dict[str, Work]]:
    """A whole training step with Adam."""
    layer = shape.layer(device)
    arguments = shape.arguments(device)
    size = shape.num_embeddings, shape.embedding_dim
    dense: nn.Module = nn.Embedding(*size, device=device)
    if shape.bag_size:
        dense = nn.EmbeddingBag(*size, mode="sum", device=device)

    def step(module: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.Adam(
            module.parameters(), lr=1e-6, fused=device == "cuda", capturable=device == "cuda"
        )
        with torch.no_grad():
            grad = torch.randn_like(module(*arguments))

        def run() -> None:
            module(*arguments).backward(grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        return run

    return {"dense": step(dense), "hfh": step(layer)}, {}


def skewed_steps(
    uniform: GPULookups, skewed: GPULookups, device: str
) -> tuple[Candidates, dict[str, Work]]:
    """Training steps under skewed indices, and beside each one under uniform indices."""
    candidates, work = lookup_steps(skewed, device)
    for name, run in lookup_steps(uniform, device)[0].items():
        candidates[f"{name}, uniform"] = run
    return candidates, work


def decode_candidates(shape: GPULinear, device: str) -> tuple[Candidates, dict[str, Work]]:
    """One token through all layers."""
    layers = shape.layers(device)
    weights = [shape.dense_weight(device) for _ in layers]
    input = shape.input(1, device)

    def through(functions: list[Callable[[Tensor], Tensor]]) -> Callable[[], object]:
        def run() -> Tensor:
            token = input
            with torch.no_grad():
                for function in functions:
                    token = function(token)
            return token

        return run

    size, num_layers = input.element_size(), shape.num_layers
    flops = 2.0 * num_layers * shape.num_weights
    return {
        "dense": through([functools.partial(F.linear, weight=weight) for weight in weights]),
        "hfh": through([*layers]),
    }, {
        "dense": Work(num_layers * shape.num_weights * size, flops),
        "hfh": Work(layers[0].pool.weight.numel() * size, flops),
    }


def same_as_automatic(timer: Timer, candidates: Candidates) -> dict[str, Any]:
    """Which kernels give what automatic dispatch gives, bit for bit: the one it took is of them."""
    expected = timer.once(candidates["hfh"])
    assert isinstance(expected, Tensor)
    same = []
    for name in SMALL_BATCH_BACKENDS:
        output = timer.once(candidates[name]) if name in candidates else None
        if isinstance(output, Tensor) and torch.equal(output, expected):
            same.append(name)
    return {"same_as_automatic": same}


def inspect_decode(num_layers: int, timer: Timer, candidates: Candidates) -> dict[str, Any]:
    """The host's seconds a layer where nothing is captured; and that capturing changes nothing."""
    seconds = {name: timer.host_seconds(run) / num_layers for name, run in candidates.items()}
    facts: dict[str, Any] = {"host_seconds_a_layer": seconds}
    if not timer.on_gpu:
        return facts
    expected = timer.once(candidates["hfh"])
    timer.capture(candidates["hfh"])
    graph, output = timer.capture(candidates["hfh"])
    assert isinstance(expected, Tensor)
    assert isinstance(output, Tensor)
    output.fill_(torch.nan)
    counts = []
    for _ in range(2):
        torch.cuda.synchronize()
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])
        graph.replay()
    torch.cuda.synchronize()
    if not torch.equal(output, expected):
        raise AssertionError("a replayed decode step differs from an eager one")
    if counts[0] != counts[1]:
        raise AssertionError(f"a replay made {counts[1] - counts[0]} allocations")
    return facts | {"replay_is_as_eager": True, "allocations_in_replay": 0}
