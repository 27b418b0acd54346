"""The published figures of ``conv2d``: prints a table, writes results/convolution-MACHINE.json.

`python -m bench.convolution [--quick]`. Every figure is the median of interleaved runs in one
process. The dense layer is torch's, in the faster of its memory formats, and so is ours; what is
materialised first is convolved in the format that the dense layer is faster in.
`python -m bench.convolution --memory INDEX` prints the peak memory of one shape's forward and
backward pass over its arguments and results, in bytes (Linux only).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from bench.peak_memory import extra
from bench.shapes import CONVOLUTIONS, Images
from hfh import machine
from hfh.timing import interleaved_medians
from hfh_kernels.nn import HFHConv2d

RESULTS = Path(__file__).parent / "results"
FORMATS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}


def candidates(shape: Images, backward: bool) -> dict[str, Callable[[], object]]:
    layer = shape.layer()
    padding = shape.kernel // 2
    functions: dict[str, Callable[[], object]] = {}
    for name, memory_format in FORMATS.items():
        size = (shape.batch, shape.channels, shape.size, shape.size)
        input = torch.randn(size).contiguous(memory_format=memory_format).requires_grad_(backward)
        dense = nn.Conv2d(
            shape.channels, shape.channels, shape.kernel, padding=padding, bias=False
        ).to(memory_format=memory_format)  # type: ignore[call-overload]
        materialized = _materialized(layer, memory_format, padding)
        for kind, function, parameters in (
            ("dense", dense, list(dense.parameters())),
            ("materialize + conv2d", materialized, list(layer.parameters())),
            ("hfh", layer, list(layer.parameters())),
        ):
            functions[f"{kind}, {name}"] = _run(function, input, parameters, backward)
    return functions


def _materialized(
    layer: Any, memory_format: torch.memory_format, padding: int
) -> Callable[[Tensor], Tensor]:
    def run(input: Tensor) -> Tensor:
        weight = layer.materialize().contiguous(memory_format=memory_format)
        return conv2d(input, weight, padding=padding)

    return run


def _run(
    function: Callable[[Tensor], Tensor],
    input: Tensor,
    parameters: list[nn.Parameter],
    backward: bool,
) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: function(input))
    grad_output = torch.randn_like(function(input))
    return lambda: torch.autograd.grad(function(input), (input, *parameters), grad_output)


def measure(shape: Images, backward: bool, repeats: int) -> dict[str, Any]:
    seconds = interleaved_medians(candidates(shape, backward), repeats, warmup=3)
    best = {
        kind: min(value for name, value in seconds.items() if name.startswith(kind))
        for kind in ("dense", "materialize", "hfh")
    }
    return {
        "shape": shape.name,
        "backward": backward,
        "seconds": seconds,
        "ratio": best["hfh"] / best["dense"],
        "ratio_materialized": best["materialize"] / best["dense"],
        "target": shape.backward_target if backward else shape.forward_target,
    }


def measure_memory(shape: Images) -> tuple[int, int]:
    torch.set_num_threads(2)
    layer = shape.layer()
    # Smaller ones bring into being what torch and its libraries make on first use, code among it.
    narrow = HFHConv2d(shape.channels, 32, shape.kernel, pool=layer.pool)
    for small, batch, size in ((layer, 1, 2), (narrow, 2, shape.size)):
        output = small(torch.randn(batch, shape.channels, size, size, requires_grad=True))
        output.backward(torch.randn_like(output))
        small.zero_grad()
    input = torch.randn(shape.batch, shape.channels, shape.size, shape.size, requires_grad=True)
    grad_output = torch.randn(input.shape)

    def backward() -> Iterable[Tensor]:
        output.backward(grad_output)
        return [x.grad for x in (input, *layer.parameters()) if x.grad is not None]

    forward_extra, (output,) = extra(lambda: [layer(input)])
    backward_extra, _ = extra(backward)
    return forward_extra, backward_extra


def memory_of_all() -> list[dict[str, Any]]:
    results = []
    for index, shape in enumerate(CONVOLUTIONS):
        command = [sys.executable, "-m", "bench.convolution", "--memory", str(index)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        forward, backward = map(int, output.split())
        results.append({"shape": shape.name, "forward_bytes": forward, "backward_bytes": backward})
    return results


def print_tables(report: dict[str, Any]) -> None:
    for result in report["rows"]:
        direction = "forward + backward" if result["backward"] else "forward"
        seconds = result["seconds"]
        times = ", ".join(f"{name} {1e3 * value:.2f}" for name, value in seconds.items())
        print(
            f"{result['shape']}, {direction}: {result['ratio']:.2f} of dense "
            f"(<= {result['target']:.2f}), materialised {result['ratio_materialized']:.2f}\n"
            f"    ms: {times}"
        )
    for memory in report["peak_memory"]:
        print(
            f"Peak extra memory, {memory['shape']}: forward "
            f"{memory['forward_bytes'] / 2**20:.1f} MiB, "
            f"backward {memory['backward_bytes'] / 2**20:.1f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="write no results")
    parser.add_argument("--repeats", type=int, default=40, help="half of them for large batches")
    parser.add_argument("--memory", type=int, metavar="INDEX")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.memory is not None:
        return print(*measure_memory(CONVOLUTIONS[arguments.memory]))
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {
        "machine": machine.describe(),
        "repeats": arguments.repeats,
        "rows": [
            measure(shape, backward, max(5, arguments.repeats // (2 if shape.batch > 1 else 1)))
            for shape in CONVOLUTIONS
            for backward in (False, True)
        ],
        "peak_memory": memory_of_all() if sys.platform == "linux" else [],
    }
    print_tables(report)
    if not arguments.quick:
        slug = re.sub(r"[^a-z0-9]+", "-", report["machine"]["processor"].lower()).strip("-")
        file = RESULTS / f"convolution-{slug}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwrote {file}")


if __name__ == "__main__":
    main()
