"""The published figures of ``linear``: prints the tables and writes results/linear-MACHINE.json.

`python -m bench.linear [--quick]`. Every figure is the median of runs interleaved with those of
what it is compared with, in one process. "resident" calls one layer again and again; "streamed"
goes round as many dense weights as exceed the last-level cache, and as many layers of different
seeds over one pool.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import model
from bench.candidates import Candidate, candidates, overhead_candidates, training_step
from bench.shapes import BATCHES, FORWARD_BACKWARD, NUM_WEIGHTS, ROWS, Row
from hfh import machine
from hfh.timing import interleaved_medians
from hfh_kernels.nn import HFHLinear

RESULTS = Path(__file__).parent / "results"
STREAMED_BYTES_AT_MOST = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Effort:
    batches: tuple[int, ...]
    variants: tuple[str, ...]
    seconds: float
    """For each comparison."""


FULL = Effort(BATCHES, ("resident", "streamed"), 1.5)
QUICK = Effort((1, 128), ("resident",), 0.3)


def medians(functions: dict[str, Candidate], seconds: float) -> dict[str, float]:
    start = time.perf_counter()
    for function in functions.values():
        function()
    once = time.perf_counter() - start
    repeats = min(200, max(3, int(seconds / once)))
    return interleaved_medians(functions, repeats, warmup=max(1, repeats // 10))


def streamed_bytes() -> int:
    """Twice the last-level cache, within limits."""
    cache = machine.last_level_cache_bytes()
    return min(STREAMED_BYTES_AT_MOST, 2 * cache if cache else STREAMED_BYTES_AT_MOST)


def measure_rows(effort: Effort, rates: model.Rates) -> list[dict[str, Any]]:
    results = []
    dense_weights: list[torch.nn.Parameter] = []
    for variant in effort.variants:
        for row in ROWS:
            pool = row.pool()
            num_layers = 1
            if variant == "streamed":
                num_layers = -(-streamed_bytes() // (NUM_WEIGHTS * row.dtype.itemsize))
            if not dense_weights or dense_weights[0].dtype != row.dtype:
                dense_weights.clear()
            dense_weights += [row.dense_weight() for _ in range(num_layers - len(dense_weights))]
            layers = [row.layer(pool) for _ in range(num_layers)]
            for batch in effort.batches:
                results.append(
                    measure(row, batch, layers, dense_weights[:num_layers], variant, effort, rates)
                )
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def measure(
    row: Row,
    batch: int,
    layers: Sequence[HFHLinear],
    dense_weights: Sequence[Tensor],
    variant: str,
    effort: Effort,
    rates: model.Rates,
) -> dict[str, Any]:
    seconds = medians(candidates(row, batch, layers, dense_weights), effort.seconds)
    floor = model.floor(row, batch, rates)
    return {
        "row": row.name,
        "batch": batch,
        "variant": variant,
        "seconds": seconds,
        "ratio": seconds["hfh"] / seconds["dense"],
        "ratio_materialized": seconds["materialize + linear"] / seconds["dense"],
        "target": row.targets.get(batch),
        "floor_seconds": floor.seconds,
        "floor_binds": floor.binds,
        "percent_of_floor": 100 * floor.seconds / seconds["hfh"],
    }


def measure_training(effort: Effort) -> dict[str, Any]:
    row = FORWARD_BACKWARD
    functions = training_step(row, 128, row.layer(row.pool()), row.dense_weight())
    seconds = medians(functions, 2 * effort.seconds)
    return {"seconds": seconds, "ratio": seconds["hfh"] / seconds["dense"]}


def measure_overhead(effort: Effort) -> dict[str, Any]:
    """Seconds of one call."""
    calls = 200

    def many(function: Candidate) -> Candidate:
        def run() -> None:
            for _ in range(calls):
                function()

        return run

    functions = {name: many(function) for name, function in overhead_candidates().items()}
    results = {}
    for mode, context in (("no_grad", torch.no_grad()), ("grad", torch.enable_grad())):
        with context:
            seconds = medians(functions, effort.seconds)
        seconds = {name: total / calls for name, total in seconds.items()}
        results[mode] = {
            "seconds": seconds,
            "ratio": seconds["functional.linear"] / seconds["F.linear"],
            "ratio_module": seconds["HFHLinear"] / seconds["nn.Linear"],
        }
    return results


def measure_memory() -> list[dict[str, Any]]:
    results = []
    for batch, dtype, block in ((128, "float32", 64), (128, "float32", 1), (128, "bfloat16", 64)):
        command = [sys.executable, "-m", "bench.peak_memory", str(batch), dtype, str(block)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        forward, backward = map(int, output.split())
        results.append(
            {
                "batch": batch,
                "dtype": dtype,
                "block": block,
                "forward_bytes": forward,
                "backward_bytes": backward,
            }
        )
    return results


def print_tables(report: dict[str, Any], effort: Effort) -> None:
    by_key = {(r["row"], r["batch"], r["variant"]): r for r in report["rows"]}

    def table(title: str, variant: str, cell: Callable[[dict[str, Any]], str]) -> None:
        print(f"\n{title}, {variant}\n")
        print(f"| {'batch':34} |" + "".join(f" {batch:>13} |" for batch in effort.batches))
        print(f"|{'-' * 36}|" + f"{'-' * 15}|" * len(effort.batches))
        for row in ROWS:
            cells = (cell(by_key[row.name, batch, variant]) for batch in effort.batches)
            print(f"| {row.name:34} |" + "".join(f" {text:>13} |" for text in cells))

    def with_target(result: dict[str, Any]) -> str:
        target = result["target"]
        return f"{result['ratio']:.2f}" + (f" (<= {target:.2f})" if target else "")

    for variant in effort.variants:
        table("HFH / dense (target)", variant, with_target)
        table(
            "Milliseconds, HFH / dense",
            variant,
            lambda r: f"{1e3 * r['seconds']['hfh']:.2f} / {1e3 * r['seconds']['dense']:.2f}",
        )
        table(
            "Materialise, then multiply / dense",
            variant,
            lambda r: f"{r['ratio_materialized']:.2f}",
        )
        table(
            "Percent of the floor of making every weight by vector operations, and what binds it; "
            "more than 100 where slot products or a matrix unit do otherwise",
            variant,
            lambda r: f"{r['percent_of_floor']:.0f} {r['floor_binds'][:5]}",
        )
    training = report["training_step"]
    print(f"\nForward, backward and Adam, batch 128, HFH / dense: {training['ratio']:.2f}")
    for mode, overhead in report["overhead"].items():
        print(
            f"One call on 64 x 64, batch 1, {mode}: function {overhead['ratio']:.2f} x F.linear, "
            f"module {overhead['ratio_module']:.2f} x nn.Linear"
        )
    for memory in report["peak_memory"]:
        print(
            f"Peak extra memory, batch {memory['batch']}, {memory['dtype']}, block "
            f"{memory['block']}: forward {memory['forward_bytes'] / 2**20:.1f} MiB, "
            f"backward {memory['backward_bytes'] / 2**20:.1f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    rates = model.measure_rates(streamed_bytes(), 10 if arguments.quick else 50)
    report = {
        "machine": machine.describe(),
        "quick": arguments.quick,
        "rates": dataclasses.asdict(rates),
        "rows": measure_rows(effort, rates),
        "training_step": measure_training(effort),
        "overhead": measure_overhead(effort),
        "peak_memory": measure_memory() if sys.platform == "linux" else [],
    }
    print_tables(report, effort)
    if not arguments.quick:
        slug = re.sub(r"[^a-z0-9]+", "-", report["machine"]["processor"].lower()).strip("-")
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"linear-{slug}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwrote {file}")


if __name__ == "__main__":
    main()
