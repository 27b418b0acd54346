"""Options that several commands take, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer


def _ratio(text: str) -> float:
    try:
        ratio = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 0 < ratio < 1:
        raise typer.BadParameter(
            f"must be between 0 and 1, such as 1/16 or 0.05, received {text!r}"
        )
    return ratio


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"must be an integer, received {text!r}") from None


def count(text: str) -> int:
    number = integer(text)
    if number < 1:
        raise typer.BadParameter(f"must be at least 1, received {number}")
    return number


class Sizes(tuple[int, ...]):
    """The shape of an input, a type of its own since typer reads a tuple as several arguments."""


def _sizes(text: str) -> Sizes:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() for size in sizes):
        raise typer.BadParameter(f"must be sizes such as 1,3,224,224, received {text!r}")
    return Sizes(map(int, sizes))


_FILE_OR_FACTORY = (
    "A safetensors file, or a torch.nn.Module or a function that makes one, as "
    "package.module:factory."
)
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=_FILE_OR_FACTORY, show_default=False)]
Factory = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="A torch.nn.Module, or a function that makes one, as package.module:factory.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Load this safetensors file into what the factory makes."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")]
Ratio = Annotated[
    float,
    typer.Option(
        parser=_ratio,
        metavar="RATIO",
        show_default="1/16",
        help="Parameters after / before, such as 1/16 or 0.05.",
    ),
]
InputShape = Annotated[
    Sizes | None,
    typer.Option(
        "--input", parser=_sizes, metavar="SIZES", help="Shape of the input, such as 1,3,224,224."
    ),
]
InputType = Annotated[
    str,
    typer.Option(metavar="DTYPE", help="Of the input: float32, bfloat16, int64 (look-ups) ..."),
]


def number(help: str, parser: Callable[[str], int] = integer) -> Any:
    return typer.Option(parser=parser, metavar="N", help=help, show_default=False)
