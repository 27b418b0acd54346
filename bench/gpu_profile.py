"""Launches every kernel of csrc/cuda at one layer's size, for a profiler: `python -m
bench.gpu_profile [--check]`.

All run twice, the second time between the marks that `ncu --profile-from-start off` heeds.
--check takes tiny sizes and runs them once, on the CPU too: with HFH_EMULATE_CUDA=1 through the
emulator.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import torch

from bench.gpu_cases import TINY_LOOKUPS, TINY_SMALL_BATCH_LINEARS, run_linear
from bench.gpu_timer import parse_device
from bench.shapes import GPU_LOOKUPS, GPU_SMALL_BATCH_LINEARS, ZIPF, GPULinear, GPULookups

PROFILED_IN_FEATURES = 4096


def linear_launches(shape: GPULinear, device: str) -> dict[str, Callable[[], object]]:
    layer = shape.layer(device)

    def forward(backend: str, batch: int) -> Callable[[], object]:
        input = shape.input(batch, device)

        def run() -> object:
            with torch.no_grad():
                return run_linear(layer, input, backend)

        return run

    def both(batch: int) -> Callable[[], object]:
        input = shape.input(batch, device).requires_grad_()
        return lambda: run_linear(layer, input, "cuda").sum().backward()

    runs = {f"tiles, batch {batch}": forward("cuda:tiles", batch) for batch in (1, 16)}
    runs["panels, batch 64"] = forward("cuda:panels", 64)
    if shape.depth < 2:
        runs["slot products, batch 1"] = forward("cuda:slot_products", 1)
    runs["forward + backward, batch 64"] = both(64)
    return {f"{shape.name}: {name}": run for name, run in runs.items()}


def lookup_launches(shape: GPULookups, device: str) -> dict[str, Callable[[], object]]:
    layer, arguments = shape.layer(device), shape.arguments(device)
    return {f"{shape.name}: forward + backward": lambda: layer(*arguments).sum().backward()}


def launches(device: str, check: bool) -> dict[str, Callable[[], object]]:
    linears = TINY_SMALL_BATCH_LINEARS if check else GPU_SMALL_BATCH_LINEARS
    lookups = TINY_LOOKUPS if check else GPU_LOOKUPS
    runs: dict[str, Callable[[], object]] = {}
    for linear in linears:
        if check or linear.in_features == PROFILED_IN_FEATURES:
            runs |= linear_launches(linear, device)
    for lookup in lookups:
        runs |= lookup_launches(dataclasses.replace(lookup, zipf=ZIPF), device)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="once, tiny, on the CPU too")
    check = parser.parse_args().check
    device = parse_device(parser, check)
    runs = launches(device, check)
    for run in runs.values():
        run()
    if check:
        return
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for name, run in runs.items():
        print(name)
        run()
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
