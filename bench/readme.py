"""Writes the measured tables of README.md from the results: `python -m bench.readme`.

A table stands between the lines `<!-- NAME -->` and `<!-- end of NAME -->`. Cells have a figure of
each machine, in the order of their files' names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import compiled_cuda, cuda_model
from bench.cuda_model import H200
from bench.gpu_timer import Work
from bench.linear import RESULTS
from bench.shapes import GPU_BATCHES, PLAIN
from hfh_kernels.ops.tuning import ROWS

README = Path(__file__).parents[1] / "README.md"


Report = dict[str, Any]
MISSING = "-"


def machines(kind: str) -> list[Report]:
    """Reports of `bench.KIND`, a machine each."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{kind}-*.json"))]


def marked(ratio: float) -> str:
    return f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}"


def of_machines(cells: Iterable[str | None]) -> str:
    """Cells of one figure; empty where no machine has it."""
    given = [*cells]
    return " / ".join(cell or MISSING for cell in given) if any(given) else ""


def ratio_table(
    what: str, columns: Sequence[str], cells: Sequence[Mapping[tuple[str, str], str]]
) -> list[str]:
    """Of cells by row and column, for each machine. Rows that a machine lacks come last."""
    rows = dict.fromkeys(row for of_machine in cells for row, _ in of_machine)
    lines = [f"| {what} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        figures = [of_machines(of_one.get((row, column)) for of_one in cells) for column in columns]
        lines.append(f"| {row} | " + " | ".join(figures) + " |")
    return lines


def linear_table(reports: Sequence[Report]) -> str:
    cells = [
        {
            (row["row"], f"batch {row['batch']}"): marked(row["ratio"])
            for row in report["rows"]
            if row["variant"] == "streamed"
        }
        for report in reports
    ]
    batches = list(dict.fromkeys(column for of_one in cells for _, column in of_one))
    return "\n".join(ratio_table("time, relative to the dense layer", batches, cells))


def machine_lines(reports: Sequence[Report]) -> str:
    lines = []
    for report in reports:
        machine, overhead = report["machine"], report["overhead"]
        memory = {(m["dtype"], m["block"]): m for m in report["peak_memory"]}["float32", 64]
        lines += [
            f"- {machine['processor']}: kernels for {machine['hfh_kernels']['cpu_capability']}, "
            f"last-level cache of {machine['last_level_cache_bytes'] >> 20} MiB, "
            f"{machine['threads']} threads, torch {machine['packages']['torch']}, "
            f"commit {machine['commit'][:7]}.",
            "  A whole training step (forward, backward, Adam) at batch 128: "
            f"{report['training_step']['ratio']:.2f} of the dense layer's time.",
            f"  One call on a 64 x 64 layer: {overhead['grad']['ratio']:.1f} x `F.linear`, "
            f"{overhead['no_grad']['ratio']:.1f} x under `no_grad`.",
            "  Memory beyond pool, activations and their gradients, 4096 x 4096, batch 128: "
            f"{memory['forward_bytes'] / 2**20:.1f} MiB forward, "
            f"{memory['backward_bytes'] / 2**20:.1f} MiB backward.",
        ]
    return "\n".join(lines)


def convolution_table(reports: Sequence[Report]) -> str:
    kinds = {False: "forward", True: "forward + backward"}
    cells = [
        {(row["shape"], kinds[row["backward"]]): marked(row["ratio"]) for row in report["rows"]}
        for report in reports
    ]
    most = max(
        max(memory["forward_bytes"], memory["backward_bytes"])
        for report in reports
        for memory in report["peak_memory"]
    )
    return "\n".join(
        [
            *ratio_table("time, relative to the dense convolution", [*kinds.values()], cells),
            "",
            "At most "
            f"{most / 2**20:.1f} MiB beyond pool, activations and their gradients in any of these.",
        ]
    )


def embedding_table(reports: Sequence[Report]) -> str:
    """Ratios to the dense operator, and to its variant with a sparse gradient."""
    timed = {
        "forward": "forward",
        "forward + backward": "forward + backward",
        "training step": "with Adam",
    }

    def cell(result: dict[str, Any]) -> str:
        ratio, sparse = result["ratio"], result["ratio_sparse"]
        return marked(ratio) if sparse == ratio else f"{marked(ratio)} ({sparse:.2f})"

    cells = [
        {
            (row["row"], timed[what]): cell(result)
            for row in report["rows"]
            for what, result in row["results"].items()
        }
        for report in reports
    ]
    peaks = [report["peak_memory"]["embedding"] for report in reports]
    forward, backward = (
        max(peak[which] for peak in peaks) / 2**20 for which in ("forward_bytes", "backward_bytes")
    )
    return "\n".join(
        [
            *ratio_table("time, relative to the dense operator", [*timed.values()], cells),
            "",
            f"Memory beyond the pool, its gradient and the result: {forward:.1f} MiB forward, "
            f"{backward:.1f} MiB backward.",
        ]
    )


def compiled_table(report: dict[str, Any]) -> str:
    """The kernels for one kind of layer on the H200, smallest and largest tiles."""
    lines = [
        "| kernel, sm_90, bfloat16, U 4, depth 2, block 32 | registers | shared memory "
        "| instructions a weight: in the loop | in all |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        if (
            row["arch"] != 90
            or PLAIN not in row["call"]
            or re.search("linear.*batch (64|128)$", row["call"])
        ):
            continue
        operator, layer = row["call"].split(" ", 1)
        detail = layer.rsplit(", ", 1)[1] if "batch" in layer else layer.split(",")[0]
        lines.append(
            f"| `{operator}`, {detail} | {row['registers']} | {row['shared_bytes'] // 1024} KiB "
            f"| {row['loop_instructions']:.0f} | {row['instructions']:.0f} |"
        )
    return "\n".join(lines)


def counts_table(report: dict[str, Any]) -> str:
    """Floors of forward passes on the H200, in microseconds, from what was compiled."""
    in_loop = {
        row["call"]: row["loop_instructions"]
        for row in report["rows"]
        if row["arch"] == 90 and row["kernel"] == "_linear_fwd_kernel"
    }
    lines = [
        "| floor in microseconds, ours (dense) | "
        + " | ".join(f"batch {batch}" for batch in GPU_BATCHES)
        + " |",
        "|---" * (len(GPU_BATCHES) + 1) + "|",
    ]
    for inputs, outputs in ((4096, 4096), (8192, 28672)):
        for depth in (2, 1):
            cells = []
            for batch in GPU_BATCHES:
                rows = next((size for size in ROWS if batch <= size), ROWS[-1])
                call = f"linear 4096 x 4096, U4 depth {depth}, block 32, bf16, batch {rows}"
                weights = inputs * outputs
                made = weights * -(-batch // rows) * in_loop[call]
                activations = 2 * batch * (inputs + outputs)
                flops = 2 * batch * weights
                ours = Work(2 * weights / 16 + activations, flops, made).floor(H200)[0]
                dense = Work(2 * weights + activations, flops).floor(H200)[0]
                cells.append(f"{1e6 * ours:.0f} ({1e6 * dense:.0f})")
            lines.append(f"| {inputs} x {outputs}, depth {depth} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cuda_compiled_table() -> str:
    """The main CUDA kernels for the H200."""
    lines = [
        "| kernel, sm_90a, bfloat16 | registers | shared memory | instructions a weight |",
        "|---|---|---|---|",
    ]
    rows = {row.kernel: row for row in compiled_cuda.load() if row.arch == cuda_model.ARCH}
    for name, what in CUDA_KERNELS.items():
        row = rows[name]
        shared = cuda_model.window_shared_bytes(row.name)
        lines.append(
            f"| `{row.name}`, {what} | {row.registers} | {shared // 1024} KiB "
            f"| {row.lane_instructions:.1f} |"
        )
    return "\n".join(lines)


U4, U2, DEEP = "U4 depth 1", "U2 depth 1", "U4 depth 2 width 4 relu"
CUDA_KERNELS = {
    "slot_products<BFloat16, 64, 1>": "U4 depth 1, batch 1",
    "slot_products<BFloat16, 64, 4>": "U4 depth 1, batch 4",
    f"linear_elements<BFloat16, {U4}, shared once, false, 1>": "U4 depth 1, batch 8",
    f"linear_elements<BFloat16, {U4}, shared once, false, 2>": "U4 depth 1, batch 16",
    f"linear_elements<BFloat16, {U2}, shared once, false, 1>": "U2 depth 1, batch 8",
    f"linear_small<BFloat16, {DEEP}, shared, 1>": "U4 depth 2, batch 8",
    f"linear_small<BFloat16, {DEEP}, shared, 2>": "U4 depth 2, batch 16",
    f"write_panel<BFloat16, {DEEP}, shared, false>": "U4 depth 2",
    "write_panel<BFloat16, U1 depth 1, shared, true>": "U1, block 1",
    f"write_panel<BFloat16, {U4}, shared, true>": "U4 depth 1, block 1",
    f"weight_backward<{U4}, shared, BFloat16>": "U4 depth 1",
    f"weight_backward<{DEEP}, shared, BFloat16>": "U4 depth 2",
    f"embedding<BFloat16, 8, {DEEP}>": "U4 depth 2",
    f"embedding_bag<false, BFloat16, 8, {DEEP}>": "U4 depth 2",
    f"lookup_backward<BFloat16, 8, {DEEP}>": "U4 depth 2",
}
"""Rows of the table, and what they are for."""


def cuda_small_table() -> str:
    """Products of small batches: times relative to the dense layer, and what binds."""
    found = cuda_model.small_batches()
    lines = [
        "| counted, not measured | target | "
        + " | ".join(f"batch {batch}" for batch in cuda_model.BATCHES)
        + " |",
        "|---" * (len(cuda_model.BATCHES) + 2) + "|",
    ]
    for layer in dict.fromkeys(small.layer for small in found):
        rows = [small for small in found if small.layer == layer]
        cells = (
            f"{small.ratio:.2f} ({small.units.binding}{'' if small.kernel == 'tiles' else ', s'})"
            for small in rows
        )
        name = (
            f"{layer.in_features} x {layer.out_features}, U{layer.num_hashes} depth {layer.depth}, "
            f"windows of {layer.rows_per_window} rows"
        )
        lines.append(f"| {name} | {rows[0].target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cuda_large_table() -> str:
    """Products of large batches by panels: what reconstruction adds to the dense layer's time."""
    lines = [
        "| counted, not measured: batch 4096 | forward | forward + backward |",
        "|---|---|---|",
    ]
    found = cuda_model.large_batches()
    for layer in dict.fromkeys(large.layer for large in found):
        cells = [f"{large.ratio:.2f}" for large in found if large.layer == layer]
        lines.append("| " + " | ".join([layer.name, *cells, ""][:3]) + " |")
    return "\n".join(lines)


def demo_text(report: dict[str, Any]) -> str:
    """The demo's two tables."""
    settings, results = report["settings"], report["accuracy"]
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_method.setdefault(result["method"], {})[result["compression"]] = result

    def cell(result: dict[str, Any] | None) -> str:
        if result is None:
            return ""
        return (
            f"{result['mean']:.2f} ± {result['standard_error']:.2f} ({result['num_parameters']:,})"
        )

    whole = by_method.pop("dense")[1]
    ratios = sorted({result["compression"] for result in results} - {1})
    lines = [
        f"Test error in % on the digits, mean and standard error of {settings['seeds']} seeds, and "
        f"the number of parameters. The dense network: {cell(whole)}.",
        "",
        "| | " + " | ".join(f"1/{ratio}" for ratio in ratios) + " |",
        "|---" * (len(ratios) + 1) + "|",
        *(
            f"| {method} | " + " | ".join(cell(cells.get(ratio)) for ratio in ratios) + " |"
            for method, cells in by_method.items()
        ),
        "",
        "Milliseconds of a 4096 x 4096 layer's forward pass, and their ratio to `F.linear`:",
        "",
    ]
    kinds = [
        f"depth {kind['depth']}, block {kind['block']}, 1/{kind['compression']}"
        for kind in report["speed"][0]["hfh"]
    ]
    lines += [
        "| layers in turn | batch | `F.linear` | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 3) + "|",
    ]
    for timing in report["speed"]:
        cells = (f"{1e3 * h['seconds']:.2f} ({h['ratio']:.2f})" for h in timing["hfh"])
        lines.append(
            f"| {timing['layers']} | {timing['batch']} | {1e3 * timing['dense_seconds']:.2f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def fit_text(report: dict[str, Any]) -> str:
    """Networks as they were fitted, then all as they were trained."""

    def cell(row: dict[str, Any]) -> str:
        return f"{row['test_error']['mean']:.2f} ± {row['test_error']['standard_error']:.2f}"

    networks = report["networks"]
    seeds = len(networks[0]["test_error"]["values"])
    dense = ", ".join(f"{n['network']} {cell(n)} ({n['num_parameters']:,})" for n in networks)
    ratios = sorted({row["ratio"] for row in networks[0]["fits"]})
    columns = [(network["network"], ratio) for network in networks for ratio in ratios]
    fits: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in (row for network in networks for row in network["fits"]):
        moments = "second moments" if row["moments"] else "weights alone"
        name = f"U{row['num_hashes']} depth {row['depth']}, {moments}"
        fits.setdefault(name, {})[row["network"], row["ratio"]] = row
    lines = [
        f"Test error in %, mean and standard error of {seeds} seeds. The dense networks, and their "
        f"parameters: {dense}. Straight after the fit, in brackets the relative error that it "
        "lowered: of the weights where it knew them alone, of the layers' outputs where it knew "
        "their inputs' second moments:",
        "",
        "| | " + " | ".join(f"{name} at 1/{ratio}" for name, ratio in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, of_columns in fits.items():
        cells = (
            f"{cell(of_columns[column])} ({of_columns[column]['weighted_error']['mean']:.2f})"
            for column in columns
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    trained: dict[str, dict[tuple[str, int, int], dict[str, Any]]] = {}
    for row in (row for network in networks for row in network["trainings"]):
        name = f"U4 depth {row['depth']}, {row['method']}"
        trained.setdefault(name, {})[row["network"], row["ratio"], row["steps"]] = row
    steps = sorted({row["steps"] for row in networks[0]["trainings"]})
    lines += [
        "",
        f"After {' and after '.join(f'{count}' for count in steps)} steps of training:",
        "",
        "| | " + " | ".join(f"{name} at 1/{ratio}" for name, ratio in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, of_cells in trained.items():
        cells = (
            ", ".join(cell(of_cells[network, ratio, count]) for count in steps)
            for network, ratio in columns
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace_block(text: str, name: str, content: str) -> str:
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
    if not re.search(pattern, text, flags=re.DOTALL):
        raise ValueError(f"README.md has no block {name!r}")
    return re.sub(pattern, rf"\g<1>{content}\n\g<2>", text, flags=re.DOTALL)


def main() -> None:
    text = README.read_text()
    linear = machines("linear")
    text = replace_block(text, "linear streamed", linear_table(linear))
    text = replace_block(text, "machines", machine_lines(linear))
    text = replace_block(text, "convolution", convolution_table(machines("convolution")))
    text = replace_block(text, "embedding", embedding_table(machines("embedding")))
    text = replace_block(text, "demo", demo_text(json.loads((RESULTS / "demo.json").read_text())))
    compiled = json.loads((RESULTS / "compiled.json").read_text())
    text = replace_block(text, "compiled", compiled_table(compiled))
    text = replace_block(text, "counts", counts_table(compiled))
    text = replace_block(text, "compiled CUDA", cuda_compiled_table())
    text = replace_block(text, "small batches on CUDA", cuda_small_table())
    text = replace_block(text, "large batches on CUDA", cuda_large_table())
    text = replace_block(text, "fit", fit_text(json.loads((RESULTS / "fit.json").read_text())))
    README.write_text(text)


if __name__ == "__main__":
    main()
