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
import concurrent.futures
import dataclasses
import functools
import gc
import json
import multiprocessing
import re
import statistics
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
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
PROCESSES = 8
"""That compile."""
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
    """A second, four a cycle and processor at the highest clock."""


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
            # One for all: memory that was used on a stream stays with it.
            self._stream = torch.cuda.Stream()
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
        # What the candidate reads may still be in the making on another stream.
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            run()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def release(self) -> None:
        """Memory of earlier candidates and their graphs."""
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

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
    properties: Any = triton.runtime.driver.active.utils.get_device_properties(0)
    return Ceilings(
        copy_bytes=2 * source.numel() / seconds["copy"],
        product_flops=2 * size**3 / seconds["product"],
        instructions=properties["multiprocessor_count"]
        * 4
        * 32
        * properties["sm_clock_rate"]
        * 1e3,
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


def convolution_candidates(
    shape: GPUImages, backward: bool, device: str
) -> tuple[Candidates, dict[str, Work]]:
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

    return {
        "dense": _candidate(dense, [table], backward),
        "hfh": _candidate(lambda: layer(*arguments), [layer.pool.weight, layer.theta], backward),
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table: what is measured, and what makes its candidates and their work."""

    what: str
    kind: str
    make: Callable[[], tuple[Candidates, dict[str, Work]]]


def cases(device: str, check: bool) -> Iterator[Case]:
    for shape in TINY_LINEARS if check else GPU_LINEARS:
        for batch in (1, 17) if check else GPU_BATCHES:
            what = f"{shape.name}, {str(shape.dtype).removeprefix('torch.')}, batch {batch}"
            for kind, backward in KINDS.items():
                make = functools.partial(linear_candidates, shape, batch, backward, device)
                yield Case(what, kind, make)
    for images in TINY_CONVOLUTIONS if check else GPU_CONVOLUTIONS:
        for kind, backward in KINDS.items():
            make = functools.partial(convolution_candidates, images, backward, device)
            yield Case(images.name, kind, make)
    for lookups in TINY_LOOKUPS if check else GPU_LOOKUPS:
        for kind, backward in KINDS.items():
            make = functools.partial(lookup_candidates, lookups, backward, device)
            yield Case(lookups.name, kind, make)
        yield Case(lookups.name, "training step", functools.partial(lookup_steps, lookups, device))


KINDS = {"forward": False, "forward + backward": True}


def compile_kernels(given: list[Case]) -> None:
    """Run all of ours once in several processes, which leave compiled kernels in Triton's cache.

    One process alone takes minutes. Errors are not reported: they come again when measured.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        for run in [pool.submit(_run_ours, case) for case in given]:
            run.exception()


def _run_ours(case: Case) -> None:
    for name, run in case.make()[0].items():
        if name in ("hfh", "materialize + dense"):
            run()
    torch.cuda.synchronize()


def measure(timer: Timer, case: Case, ceilings: Ceilings | None) -> dict[str, Any]:
    timer.release()
    candidates, work = case.make()
    seconds = timer.medians(candidates)
    extra = timer.extra_bytes(candidates["hfh"])
    ratio = seconds["hfh"] / seconds["dense"]
    print(f"{case.what:58} {case.kind:20} {1e6 * seconds['hfh']:10.1f} us  {ratio:6.2f} x dense")
    floors = {}
    if ceilings is not None:
        floors = {name: item.floor(ceilings) for name, item in work.items()}
    return {"seconds": seconds, "hfh_extra_bytes": extra, "floors": floors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="once, tiny, and write nothing")
    check = parser.parse_args().check
    device = "cuda" if torch.cuda.is_available() else "cpu"
    timer, given = Timer(device, check), list(cases(device, check))
    if check:
        for case in given:
            measure(timer, case, None)
        return
    if device == "cpu":
        parser.error("there is no GPU; --check runs without one")
    compile_kernels(given)
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = RESULTS / f"gpu-{name}.json"
    ceilings = measure_ceilings(timer)
    rows: list[dict[str, Any]] = []
    report = {
        "machine": {**machine.describe(), "gpu": torch.cuda.get_device_name()},
        "repeats": REPEATS,
        "ceilings": dataclasses.asdict(ceilings),
        "rows": rows,
    }
    for case in given:
        row: dict[str, Any] = {"what": case.what, "kind": case.kind}
        try:
            row |= measure(timer, case, ceilings)
        except Exception as error:
            # The others are still worth having.
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        # After each, for a script that is cut short.
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")
    failed = sum("error" in row for row in rows)
    if failed:
        raise SystemExit(f"{failed} of {len(rows)} rows failed")


if __name__ == "__main__":
    main()
