"""How candidates are timed on a GPU, and the least that they could take."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

REPEATS = 20
Candidates = dict[str, Callable[[], object]]


def parse_device(parser: argparse.ArgumentParser, check: bool) -> str:
    """The GPU, or to check the CPU, where HFH_EMULATE_CUDA=1 then runs the CUDA kernels."""
    if torch.cuda.is_available():
        return "cuda"
    if not check:
        parser.error("there is no GPU; --check runs without one")
    if os.environ.get("HFH_EMULATE_CUDA") == "1":
        import tests.cuda_device  # noqa: F401  (puts the emulator in the place of the CPU's)
    return "cpu"


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
        self.on_gpu = device == "cuda"
        self._repeats = 2 if check else REPEATS
        if self.on_gpu:
            # One for all: memory that was used on a stream stays with it.
            self._stream = torch.cuda.Stream()
            self._flush = torch.empty(2**28, dtype=torch.int8, device=device)

    def once(self, run: Callable[[], object]) -> object:
        """What a candidate returns."""
        if not self.on_gpu:
            return run()
        # What the candidate reads may still be in the making on another stream.
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            result = run()
        torch.cuda.synchronize()
        return result

    def medians(self, candidates: Candidates) -> dict[str, float]:
        if not self.on_gpu:
            for run in candidates.values():
                run()
            return dict.fromkeys(candidates, float("nan"))
        graphs = {name: self.capture(run)[0] for name, run in candidates.items()}
        seconds: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(self._repeats):
            for name, graph in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                seconds[name].append(start.elapsed_time(end) / 1e3)
        return {name: statistics.median(times) for name, times in seconds.items()}

    def capture(self, run: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
        """The graph, replayed once, and what each replay writes anew."""
        for _ in range(2):
            self.once(run)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            result = run()
        graph.replay()
        torch.cuda.synchronize()
        return graph, result

    def host_seconds(self, run: Callable[[], object]) -> float:
        """Until a candidate returns, without waiting for the device; the median."""
        times = []
        for _ in range(self._repeats):
            if self.on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def release(self) -> None:
        """Memory of earlier candidates and their graphs."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def extra_bytes(self, run: Callable[[], object]) -> int | None:
        """Memory beyond what was there before and what is left behind; None without a GPU."""
        if not self.on_gpu:
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
