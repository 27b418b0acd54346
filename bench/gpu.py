"""The published figures of the GPU: prints a short table, writes results/gpu-MACHINE*.json.

`python -m bench.gpu [--check] [SUITE ...]`: "layers" is every operator as it is dispatched, "cuda"
what the kernels of csrc/cuda are for; all by default. --check runs every candidate once on tiny
shapes and writes nothing, on the CPU too: with TRITON_INTERPRET=1 through Triton's interpreter,
with HFH_EMULATE_CUDA=1 through the CUDA kernels' emulator.

A figure is the median of graph replays, each after the second-level cache was emptied, with the
candidates in turn. The floor of a candidate is the largest of three times: its bytes at the speed
of a large copy, its multiply-adds at that of a large product, both measured in the same run, and
the instructions that make virtual weights (results/compiled.json) at four a cycle and processor.
A candidate that says that it cannot run is left out, with what it says.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu_cases import RESULTS, TRAINING_BACKENDS, Case, cuda_cases, layer_cases
from bench.gpu_timer import REPEATS, Candidates, Ceilings, Timer, measure_ceilings, parse_device
from hfh import machine

PROCESSES = 12
"""That compile."""
SUITES: dict[str, Callable[[str, bool], Iterator[Case]]] = {
    "layers": layer_cases,
    "cuda": cuda_cases,
}


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
        if name in ("hfh", "materialize + dense", "triton"):
            run()
    torch.cuda.synchronize()


def measure(timer: Timer, case: Case, ceilings: Ceilings | None, row: dict[str, Any]) -> None:
    """Fills the row: what was measured before something fails is kept."""
    timer.release()
    candidates, work = case.make()
    row["refusals"] = take_out_what_cannot_run(timer, candidates)
    row["seconds"] = timer.medians(candidates)
    row["hfh_extra_bytes"] = timer.extra_bytes(candidates["hfh"])
    row["floors"] = {}
    if ceilings is not None:
        row["floors"] = {name: item.floor(ceilings) for name, item in work.items()}
    try:
        if case.inspect is not None:
            row |= case.inspect(timer, candidates)
    finally:
        print(line(case, row))


def take_out_what_cannot_run(timer: Timer, candidates: Candidates) -> dict[str, str]:
    """What those that went said; the dense layer and hfh itself must run."""
    refusals = {}
    for name, run in [*candidates.items()]:
        try:
            timer.once(run)
        except RuntimeError as error:
            if name in ("dense", "hfh") or "cannot run" not in str(error):
                raise
            refusals[name] = str(error).splitlines()[0]
            del candidates[name]
    return refusals


def line(case: Case, row: dict[str, Any]) -> str:
    seconds: dict[str, float] = row["seconds"]
    ours, dense = seconds["hfh"], seconds["dense"]
    text = f"{case.what:66} {case.kind:18} {1e6 * ours:9.1f} us {ours / dense:6.2f} x dense"
    if "same_as_automatic" in row:
        fastest = min(seconds.keys() - {"dense", "hfh"}, key=lambda name: seconds[name])
        took = " or ".join(row["same_as_automatic"])
        text += f", took {took}, fastest {fastest} {1e6 * seconds[fastest]:.1f}"
    else:
        for name in TRAINING_BACKENDS:
            if name in seconds:
                text += f", {name} {1e6 * seconds[name]:.1f}"
    if "hfh, uniform" in seconds:
        text += f", {ours / seconds['hfh, uniform']:.2f} x uniform"
    for name, host in row.get("host_seconds_a_layer", {}).items():
        text += f", host {name} {1e6 * host:.1f} us a layer"
    return text


def measure_suite(suite: str, timer: Timer, results: Path) -> int:
    """How many rows failed."""
    given = [*SUITES[suite]("cuda", False)]
    compile_kernels(given)
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = results / ("gpu-" + name + ("" if suite == "layers" else f"-{suite}") + ".json")
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
            measure(timer, case, ceilings, row)
        except Exception as error:
            # The others are still worth having.
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        # After each, for a script that is cut short.
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")
    return sum("error" in row for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="once, tiny, and write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    options = parser.parse_args()
    suites = options.suites or [*SUITES]
    for suite in suites:
        if suite not in SUITES:
            parser.error(f"SUITE must be one of {', '.join(SUITES)}, received {suite!r}")
    device = parse_device(parser, options.check)
    if options.check:
        timer = Timer(device, check=True)
        for suite in suites:
            for case in SUITES[suite](device, True):
                measure(timer, case, None, {})
        return
    options.results.mkdir(parents=True, exist_ok=True)
    failed = sum(
        measure_suite(suite, Timer(device, check=False), options.results) for suite in suites
    )
    if failed:
        raise SystemExit(f"{failed} rows failed")


if __name__ == "__main__":
    main()
