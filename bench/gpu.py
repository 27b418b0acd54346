"""The published figures of the GPU: prints a short table, writes results/gpu-MACHINE.json.

`python -m bench.gpu [--check]`; --check runs every candidate once on tiny shapes and writes
nothing, on the CPU too (with TRITON_INTERPRET=1 through Triton's interpreter).

A figure is the median of graph replays, each after the second-level cache was emptied, with the
candidates in turn. The floor of a candidate is the largest of three times: its bytes at the speed
of a large copy, its multiply-adds at that of a large product, both measured in the same run, and
the instructions that make virtual weights (results/compiled.json) at four a cycle and processor.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.shapes import (
    GPU_BATCHES,
    GPU_CONVOLUTIONS,
    GPU_LINEARS,
    GPU_LOOKUPS,
    GPUImages,
    GPULinear,
    GPULookups,
)
from hfh import machine
from hfh_kernels.nn import HFHLinear

RESULTS = Path(__file__).parent / "results"
REPEATS = 20
TINY_LINEARS = (GPULinear(64, 96), GPULinear(64, 64, block=1, depth=0, num_hashes=1))
TINY_CONVOLUTIONS = (GPUImages(channels=32, size=5, batch=2),)
TINY_LOOKUPS = (
    GPULookups(num_embeddings=3200, num_indices=64),
    GPULookups(bag_size=8, num_embeddings=3200, num_indices=64),
)
Candidates = dict[str, Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device reaches, measured."""

    copy_bytes: float
    """A second, read and written."""
    product_flops: float
    """A second, of bfloat16."""
    instructions: float
    """A second, four a cycle and processor at the highest clock; inf where torch has none."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that a candidate must do."""

    bytes: float
    flops: float = 0.0
    instructions: float = 0.0

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """Seconds, and what binds."""
        times = {
            "bytes": self.bytes / ceilings.copy_bytes,
            "multiply-adds": self.flops / ceilings.product_flops,
            "instructions": self.instructions / ceilings.instructions,
        }
        binding = max(times, key=lambda name: times[name])
        return times[binding], binding


class Timer:
    """Seconds of candidates in turn: on a GPU of graph replays from a cold cache."""

    def __init__(self, device: str, check: bool) -> None:
        self._device, self._check = device, check
        if device == "cuda":
            self._flush = torch.empty(2**28, dtype=torch.int8, device=device)

    def medians(self, candidates: Candidates) -> dict[str, float]:
        if self._device != "cuda":
            for run in candidates.values():
                run()
            return dict.fromkeys(candidates, float("nan"))
        graphs = {name: self._capture(run) for name, run in candidates.items()}
        seconds: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(2 if self._check else REPEATS):
            for name, graph in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                seconds[name].append(start.elapsed_time(end) / 1e3)
        return {name: statistics.median(times) for name, times in seconds.items()}

    def _capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def extra_bytes(self, run: Callable[[], object]) -> int | None:
        """Memory beyond what was there before and what is left behind; None without a GPU."""
        if self._device != "cuda":
            return None
        kept = run()
        gc.collect()
        torch.cuda.synchronize()
        del kept
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        left = torch.cuda.memory_allocated() - before
        del kept
        return torch.cuda.max_memory_allocated() - before - left


def measure_ceilings(timer: Timer) -> Ceilings:
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = timer.medians({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    properties: Any = torch.cuda.get_device_properties(0)
    kilohertz = getattr(properties, "clock_rate", math.inf)
    return Ceilings(
        copy_bytes=2 * source.numel() / seconds["copy"],
        product_flops=2 * size**3 / seconds["product"],
        instructions=properties.multi_processor_count * 4 * 32 * kilohertz * 1e3,
    )


def gradients(
    forward: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def linear_candidates(
    shape: GPULinear, batch: int, backward: bool, device: str
) -> tuple[Candidates, dict[str, Work]]:
    layer = shape.layer(device)
    assert isinstance(layer, HFHLinear)
    input = shape.input(batch, device).requires_grad_(backward)
    weight = torch.randn(
        shape.out_features, shape.in_features, device=device, dtype=shape.dtype
    ).requires_grad_(backward)
    forwards: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "dense": (lambda: F.linear(input, weight), [input, weight]),
        "materialize + dense": (
            lambda: F.linear(input, layer.materialize()),
            [input, layer.pool.weight, layer.theta],
        ),
        "hfh": (lambda: layer(input), [input, layer.pool.weight, layer.theta]),
    }
    if layer.reconstruction.depth == 0:
        # What a HashedNets written in PyTorch does: a gather of the whole matrix, and no g.
        index = torch.randint(
            layer.pool.weight.numel(), weight.shape, device=device, dtype=torch.int32
        )
        forwards["gather + dense"] = (
            lambda: F.linear(input, layer.pool.weight[index]),
            [input, layer.pool.weight],
        )
        forwards["hfh"] = (forwards["hfh"][0], forwards["hfh"][1][:2])
        forwards["materialize + dense"] = (
            forwards["materialize + dense"][0],
            forwards["materialize + dense"][1][:2],
        )
    candidates: Candidates = {}
    for name, (forward, leaves) in forwards.items():
        candidates[name] = _candidate(forward, leaves, backward)
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


def _candidate(
    forward: Callable[[], Tensor], leaves: list[Tensor], backward: bool
) -> Callable[[], object]:
    if not backward:

        def run() -> Tensor:
            with torch.no_grad():
                return forward()

        return run
    with torch.no_grad():
        grad = torch.randn_like(forward())
    return gradients(forward, leaves, grad)


def instructions_a_weight(shape: GPULinear) -> float:
    """Of the forward kernel's loop as compiled for the H200; 0 where that was not looked at."""
    path = RESULTS / "compiled.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    kind = f"U{shape.num_hashes} depth {shape.depth}, block {shape.block},"
    found = [
        row["loop_instructions"]
        for row in rows
        if row["kernel"] == "_linear_fwd_kernel" and row["arch"] == 90 and kind in row["call"]
    ]
    return min(found, default=0.0)


def convolution_candidates(shape: GPUImages, backward: bool, device: str) -> Candidates:
    layer = shape.layer(device)
    input = shape.input(device).requires_grad_(backward)
    dense = nn.Conv2d(
        shape.channels, shape.channels, 3, padding=1, bias=False, device=device, dtype=shape.dtype
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters: list[Tensor] = [input, layer.pool.weight, layer.theta]
    return {
        "dense": _candidate(lambda: dense(input), [input, dense.weight], backward),
        "materialize + dense": _candidate(
            lambda: F.conv2d(input, layer.materialize(), padding=1), parameters, backward
        ),
        "hfh": _candidate(lambda: layer(input), parameters, backward),
    }


def lookup_candidates(shape: GPULookups, backward: bool, device: str) -> Candidates:
    layer = shape.layer(device)
    arguments = shape.arguments(device)
    table = torch.randn(
        shape.num_embeddings, shape.embedding_dim, device=device, dtype=shape.dtype
    ).requires_grad_(backward)

    def dense() -> Tensor:
        if shape.bag_size:
            return F.embedding_bag(arguments[0], table, arguments[1], mode="sum")
        return F.embedding(arguments[0], table)

    return {
        "dense": _candidate(dense, [table], backward),
        "hfh": _candidate(lambda: layer(*arguments), [layer.pool.weight, layer.theta], backward),
    }


def lookup_steps(shape: GPULookups, device: str) -> Candidates:
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

    return {"dense": step(dense), "hfh": step(layer)}


def rows(timer: Timer, device: str, check: bool) -> Iterable[dict[str, Any]]:
    def row(what: str, kind: str, candidates: Candidates, **more: Any) -> dict[str, Any]:
        seconds = timer.medians(candidates)
        extra = timer.extra_bytes(candidates["hfh"])
        result = {"what": what, "kind": kind, "seconds": seconds, "hfh_extra_bytes": extra, **more}
        ratio = seconds["hfh"] / seconds["dense"]
        print(f"{what:58} {kind:20} {1e6 * seconds['hfh']:10.1f} us  {ratio:6.2f} x dense")
        return result

    ceilings = None if device != "cuda" else measure_ceilings(timer)
    if ceilings is not None:
        yield {"what": "ceilings", **dataclasses.asdict(ceilings)}
    for shape in TINY_LINEARS if check else GPU_LINEARS:
        for batch in (1, 17) if check else GPU_BATCHES:
            for backward in (False, True):
                candidates, work = linear_candidates(shape, batch, backward, device)
                floors = {}
                if ceilings is not None:
                    floors = {name: item.floor(ceilings) for name, item in work.items()}
                yield row(
                    f"{shape.name}, {str(shape.dtype).removeprefix('torch.')}, batch {batch}",
                    _kind(backward), candidates, floors=floors,
                )  # fmt: skip
    for images in TINY_CONVOLUTIONS if check else GPU_CONVOLUTIONS:
        for backward in (False, True):
            candidates = convolution_candidates(images, backward, device)
            yield row(images.name, _kind(backward), candidates)
    for lookups in TINY_LOOKUPS if check else GPU_LOOKUPS:
        for backward in (False, True):
            candidates = lookup_candidates(lookups, backward, device)
            yield row(lookups.name, _kind(backward), candidates)
        yield row(lookups.name, "training step", lookup_steps(lookups, device))


def _kind(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="once, tiny, and write nothing")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.check:
        parser.error("there is no GPU; --check runs without one")
    results = list(rows(Timer(device, options.check), device, options.check))
    if options.check:
        return
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    report = {
        "machine": {**machine.describe(), "gpu": torch.cuda.get_device_name()},
        "repeats": REPEATS,
        "rows": results,
    }
    path = RESULTS / f"gpu-{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
