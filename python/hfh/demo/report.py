"""The demo's results as two tables and one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from hfh.demo import speed
from hfh.demo.accuracy import Accuracy
from hfh.demo.methods import COMPRESSIONS, DENSE, NUM_DENSE
from hfh.demo.run import Results
from hfh.demo.speed import Timing

COMPRESSION_COLOURS = dict(zip(COMPRESSIONS, ("#0072b2", "#d55e00"), strict=True))
KIND_COLOURS = dict(zip(speed.KINDS, ("#cc79a7", "#009e73", "#56b4e9"), strict=True))
DENSE_COLOUR = "#555555"


def accuracy_table(accuracies: Sequence[Accuracy]) -> Table:
    """Test error by budget and method."""
    num_seeds = len(accuracies[0].test_errors)
    table = Table(
        title="Test error on scikit-learn's digits",
        caption="Parameters: pool, reconstruction networks and biases. "
        f"Mean and standard error over seeds ({num_seeds}); "
        "learning rates chosen for each method by validation.",
    )
    table.add_column("budget")
    table.add_column("method")
    for heading in ("parameters", "ratio", "test error %"):
        table.add_column(heading, justify="right")
    for index, result in enumerate(accuracies):
        is_last = index + 1 == len(accuracies)
        table.add_row(
            f"1/{result.compression}",
            result.method,
            f"{result.num_parameters:,}",
            f"{result.num_parameters / NUM_DENSE:.4f}",
            _with_error(result),
            end_section=is_last or accuracies[index + 1].compression != result.compression,
        )
    return table


def _with_error(result: Accuracy) -> str:
    error = result.standard_error
    return f"{result.mean:.2f}" if error is None else f"{result.mean:.2f} ± {error:.2f}"


def speed_table(timings: Sequence[Timing], features: int) -> Table:
    """Milliseconds, and their ratio to dense, by number of layers in turn and batch size."""
    table = Table(
        title=f"Forward pass of a {features} x {features} layer, fp32, ms (ratio to F.linear)",
        caption="HFH: U4, width 4; pool's size and block as named. Medians, interleaved.",
    )
    for heading in ("layers in turn", "batch", "F.linear"):
        table.add_column(heading, justify="right")
    for kind in speed.KINDS:
        table.add_column(str(kind), justify="right")
    for index, timing in enumerate(timings):
        is_last = index + 1 == len(timings)
        table.add_row(
            str(timing.num_layers),
            str(timing.batch),
            f"{1e3 * timing.dense:.2f}",
            *(
                f"{1e3 * seconds:.2f} ({timing.ratio(kind):.2f})"
                for kind, seconds in timing.hfh.items()
            ),
            end_section=is_last or timings[index + 1].num_layers != timing.num_layers,
        )
    return table


def save_figure(results: Results, file: Path) -> None:
    """Test errors on the left, times on the right if there are any."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    if results.timings:
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _draw_times(right, results.timings, results.settings.features)
    else:
        left = figure.subplots()
    _draw_errors(left, results.accuracies)
    figure.savefig(file, dpi=160)


def _draw_errors(axes: Axes, accuracies: Sequence[Accuracy]) -> None:
    compressed = [result for result in accuracies if result.method != DENSE.name]
    methods = list(dict.fromkeys(result.method for result in compressed))
    for result in accuracies:
        if result.method == DENSE.name:
            axes.axvline(result.mean, color=DENSE_COLOUR, linestyle="--", linewidth=1.2)
            error = result.standard_error or 0
            axes.axvspan(
                result.mean - error, result.mean + error, color=DENSE_COLOUR, alpha=0.15, lw=0
            )
            axes.annotate(
                f"dense, {NUM_DENSE:,} parameters",
                (result.mean, len(methods) - 0.4),
                xytext=(5, 0),
                textcoords="offset points",
                color=DENSE_COLOUR,
                va="center",
            )
    for offset, compression in zip((-0.13, 0.13), COMPRESSIONS, strict=True):
        chosen = [result for result in compressed if result.compression == compression]
        heights = [methods.index(result.method) + offset for result in chosen]
        colour = COMPRESSION_COLOURS[compression]
        for height, result in zip(heights, chosen, strict=True):
            seeds = result.test_errors
            axes.scatter(seeds, [height] * len(seeds), s=12, color=colour, alpha=0.25, linewidth=0)
        axes.errorbar(
            [result.mean for result in chosen],
            heights,
            xerr=[result.standard_error or 0 for result in chosen],
            fmt="o",
            color=colour,
            capsize=3,
            label=f"1/{compression} of the parameters",
        )
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.2, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("test error, %")
    axes.set_title("Digits, 64-256-256-10: test error", loc="left")
    _finish(axes)


def _draw_times(axes: Axes, timings: Sequence[Timing], features: int) -> None:
    counts = sorted({timing.num_layers for timing in timings})
    batches = list(dict.fromkeys(timing.batch for timing in timings))
    axes.axhline(1, color=DENSE_COLOUR, linestyle="--", linewidth=1.2)
    axes.annotate(
        "dense",
        (1, 1),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        color=DENSE_COLOUR,
        va="center",
    )
    for num_layers, line, fill in zip(counts, (":", "-"), ("white", None), strict=True):
        for kind in speed.KINDS:
            axes.plot(
                range(len(batches)),
                [timing.ratio(kind) for timing in timings if timing.num_layers == num_layers],
                line,
                marker="o",
                markerfacecolor=fill,
                color=KIND_COLOURS[kind],
                label=str(kind) if num_layers > 1 else None,
            )
    axes.set_xticks(range(len(batches)), map(str, batches))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch")
    axes.set_ylabel("time / F.linear")
    axes.set_title(f"Linear {features} x {features}: time", loc="left")
    axes.text(
        0.98,
        0.96,
        f"dotted: one layer\nsolid: {counts[-1]} layers in turn",
        transform=axes.transAxes,
        ha="right",
        va="top",
    )
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
