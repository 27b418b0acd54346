"""What the command ``hfh`` can do.

Nothing here imports torch before a command needs it, so that help and completion are quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfh.command.options import (
    AsJson,
    Factory,
    InputShape,
    InputType,
    Output,
    Ratio,
    Source,
    Weights,
    count,
    number,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

app = typer.Typer(
    name="hfh",
    help="Homologically functional hashing: networks whose weights are hashed from one small pool.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_NEEDS_INPUT = "the shape of the model's input is needed, such as --input 1,3,224,224"


def _version(wanted: bool) -> None:
    if wanted:
        from hfh_kernels.version import __version__

        print(f"hfh {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from.")
    ] = False,
) -> None:
    pass


class Init(str, Enum):
    """Where the virtual weights of a compressed model start."""

    FIT = "fit"
    SCRATCH = "scratch"


@app.command()
def compress(
    source: Source,
    output: Output,
    ratio: Ratio = 1 / 16,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers to leave, such as 'head' or '*.attn*'."),
    ] = None,
    init: Annotated[
        Init, typer.Option(help="Fit the weights there are, or start a new network to train.")
    ] = Init.FIT,
    num_hashes: Annotated[int | None, number("Pool elements behind a weight, 1 to 16.")] = None,
    depth: Annotated[int | None, number("Layers of g: 0 for none, 1 for a linear one.")] = None,
    width: Annotated[int | None, number("Units of g's hidden layers.")] = None,
    block: Annotated[int | None, number("Neighbouring columns that share a draw.")] = None,
    min_size: Annotated[int | None, number("Weights of the smallest layer to compress.")] = None,
    seed: Annotated[int | None, number("Of the random numbers that pool and g start as.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Inputs of the model, a batch in each tensor of this safetensors file: fit the "
            "outputs of layers, not their weights. Far better where there is data.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep the fit's state here, and go on from what is there."
        ),
    ] = None,
    weights: Weights = None,
    as_json: AsJson = False,
) -> None:
    """Compress a model, or the weights of a safetensors file, into a new safetensors file.

    Of a file, weights named *.weight with 2 to 4 dimensions are compressed, and those that have the
    names of an LSTM, GRU or MultiheadAttention of torch.nn; all else is kept.

    hfh materialize turns it back; hfh.load reads it into the model it is of.
    """
    _require_output(output, Path(source), weights)
    for name, path in (("--checkpoint", checkpoint), ("--calibration", calibration)):
        if path is not None and init is not Init.FIT:
            raise typer.BadParameter("goes with --init fit", param_hint=name)
    if calibration is not None and Path(source).exists():
        message = "needs a model that runs, package.module:factory"
        raise typer.BadParameter(message, param_hint="--calibration")
    with _working(f"reading {source}"):
        from hfh.command.sources import load_model
        from hfh.compression.compress import compress
        from hfh.files.checkpoint import save

        model = load_model(source, weights)
    chosen = {
        "num_hashes": num_hashes,
        "depth": depth,
        "width": width,
        "block": block,
        "min_size": min_size,
        "seed": seed,
    }
    given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if init is Init.FIT:
        given["fit_options"] = {"progress": True, "checkpoint": checkpoint}
    if calibration is not None:
        with _working(f"running the model on {calibration}"):
            given["importance"] = _second_moments(model, calibration)
    compressed, report = compress(model, ratio, skip=skip or (), init=init.value, **given)
    save(compressed, output)
    print(report.to_json() if as_json else report.table())
    if report.fit is not None and not as_json:
        print(f"\n{report.fit.table()}")
    _say(f"Wrote {output}, {output.stat().st_size:,} bytes.")
    if report.fit is not None and calibration is None:
        _say("It was fitted to the weights alone: train it, or give --calibration, before use.")


@app.command()
def inspect(source: Source, weights: Weights = None, as_json: AsJson = False) -> None:
    """Show what a file or a model holds: virtual weights, their hashes, and every tensor.

    A file is read whole, so damage to a compressed one is found.
    """
    with _working(f"reading {source}"):
        from hfh.command.inspection import Inspection
        from hfh.command.sources import load_model

        inspection = Inspection.of(load_model(source, weights))
    print(inspection.to_json() if as_json else inspection.table())


@app.command()
def materialize(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="That hfh compress wrote.", show_default=False)
    ],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Write the virtual weights out as a dense safetensors file, under the names they had."""
    _require_output(output, source)
    with _working(f"reading {source}"):
        from hfh.compression.dense import materialize
        from hfh.files import checkpoint, tensor_file
        from hfh.files.checkpoint_contents import describe
        from hfh.files.state_dict_model import state_dict_model

        contents = checkpoint.read(source)
        dense = describe(materialize(state_dict_model(contents))).renamed(contents.dense_names)
    if dense.extra_states:
        keys = ", ".join(dense.extra_states)
        raise ValueError(f"{source} holds what a file of tensors cannot: {keys}")
    # Ties are noted as safetensors' save_model does it.
    tensor_file.write(output, dense.tensors, {"format": "pt", **dense.aliases})
    numbers = sum(tensor.numel() for tensor in dense.tensors.values())
    if as_json:
        print(json.dumps({"file": str(output), "numbers": numbers, "tensors": len(dense.tensors)}))
    _say(f"Wrote {output}, {numbers:,} numbers in {len(dense.tensors):,} tensors.")


@app.command()
def cost(
    source: Source,
    input_shape: InputShape = None,
    dtype: InputType = "float32",
    ratio: Ratio = 1 / 16,
    positions: Annotated[
        int | None,
        number(
            "For a file, which has no forward pass: vectors that each matrix is multiplied with, "
            "1 by default.",
            count,
        ),
    ] = None,
    weights: Weights = None,
    as_json: AsJson = False,
) -> None:
    """Count parameters, bytes and operations: dense, HashedNets, HFH and pruned (CSR).

    A model that is dense is compressed to --ratio first.
    """
    with _working(f"reading {source}"):
        from hfh.command.sources import is_file, load_model
        from hfh.costs import cost_model

        if is_file(source) and input_shape is not None:
            raise typer.BadParameter("goes with package.module:factory", param_hint="--input")
        if not is_file(source) and positions is not None:
            raise typer.BadParameter("goes with a safetensors file", param_hint="--positions")
        if not is_file(source) and input_shape is None:
            raise typer.BadParameter(_NEEDS_INPUT, param_hint="--input")
        input_dtype = _dtype(dtype)
        model, note = _hashed(load_model(source, weights), ratio)
    with _working("counting"):
        if input_shape is None:
            result = cost_model.weight_cost(model, positions or 1)
        else:
            result = cost_model.cost(model, input_shape, dtype=input_dtype)
    print(result.to_json() if as_json else result.table())
    _say(note)


@app.command()
def bench(
    source: Factory,
    input_shape: InputShape = None,
    dtype: InputType = "float32",
    ratio: Ratio = 1 / 16,
    training: Annotated[bool, typer.Option("--training", help="Time a backward pass too.")] = False,
    repeats: Annotated[int, number("Timed calls of each model.", count)] = 20,
    threads: Annotated[int | None, number("As torch chooses by default.", count)] = None,
    weights: Weights = None,
    as_json: AsJson = False,
) -> None:
    """Time a compressed model against the dense one.

    A model that is dense is compressed to --ratio; one that is compressed is materialised.
    """
    with _working(f"reading {source}"):
        import torch

        from hfh.command.model_speed import compare
        from hfh.command.sources import is_file, load_model
        from hfh.compression.dense import materialize

        if is_file(source):
            raise typer.BadParameter(
                f"a file has no forward pass to time: {source}", param_hint="MODULE:FACTORY"
            )
        if input_shape is None:
            raise typer.BadParameter(_NEEDS_INPUT, param_hint="--input")
        if threads is not None:
            torch.set_num_threads(threads)
        input = _example(input_shape, _dtype(dtype))
        compressed, note = _hashed(load_model(source, weights), ratio)
        dense = materialize(compressed)
    with _progress("timing", repeats) as advance:
        speed = compare(dense, compressed, input, training, repeats, advance)
    print(speed.to_json() if as_json else speed.table())
    _say(note)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write.")] = Path(
        "demo_results"
    ),
    seeds: Annotated[int | None, number("Trainings a method, 5 by default.")] = None,
    threads: Annotated[int | None, number("As torch chooses by default.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes: a check.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Search the learning rates anew (half an hour).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train dense, HashedNets and HFH networks on digits, then time a 4096 x 4096 layer.

    Prints two tables, writes demo.png and demo.json.
    """
    try:
        from hfh.demo.command import demo
        from hfh.demo.run import QUICK, Settings
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; pip install 'hfh-kernels[demo]'") from error
    chosen = {"seeds": seeds, "threads": threads, "tune": tune}
    named: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    try:
        settings = replace(QUICK if quick else Settings(), **named)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    demo(settings, output, as_json)


def _second_moments(model: nn.Module, calibration: Path) -> dict[nn.Module, torch.Tensor]:
    from hfh.files.tensor_file import read
    from hfh.fitting.moments import second_moments

    batches, _ = read(calibration)
    moments: dict[nn.Module, torch.Tensor]
    try:
        moments = second_moments(model.eval(), batches.values())
    except Exception as error:
        # The model's own errors know nothing of files.
        raise ValueError(f"{calibration} does not hold inputs of the model: {error}") from error
    return moments


def _require_output(output: Path, *inputs: Path | None) -> None:
    """Before the work, not after it."""
    if not output.parent.is_dir():
        raise typer.BadParameter(f"no folder {output.parent}", param_hint="--output")
    for path in inputs:
        if path is not None and path.exists() and output.exists() and output.samefile(path):
            raise typer.BadParameter("must not be a file that is read", param_hint="--output")


def _hashed(model: nn.Module, ratio: float) -> tuple[nn.Module, str]:
    """The model, compressed from scratch if it is dense, and what to say of that."""
    from hfh.compression.compress import compress
    from hfh.files.checkpoint_contents import hashed_layers

    if any(hashed_layers(model)):
        return model, "It was compressed already."
    compressed, report = compress(model, ratio, seed=0)
    return compressed, f"Compressed from scratch to {report.ratio:.4g} of the parameters."


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        message = f"must be a dtype of torch, such as int64, received {name!r}"
        raise typer.BadParameter(message, param_hint="--dtype")
    return dtype


def _example(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random numbers; zeros where they are integers, since any table has a row 0."""
    import torch

    return (
        torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr)


@contextmanager
def _working(description: str) -> Iterator[None]:
    """Shows on a terminal that something takes its time."""
    from rich.console import Console

    with Console(stderr=True).status(f"{description} ..."):
        yield


@contextmanager
def _progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, drawn only when it is advanced, so that it disturbs no timing."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.update(task, advance=1, refresh=True)
