"""The command ``hfh``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from hfh_kernels import __version__


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; wrong arguments raise SystemExit(2)."""
    parser = _Parser(prog="hfh", description="Homologically functional hashing.")
    parser.add_argument("--version", action="version", version=f"hfh {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo_parser = commands.add_parser("demo", help="train and time compressed networks")
    _add_demo_options(demo_parser)
    options = parser.parse_args(arguments)
    try:
        return _demo(options, demo_parser)
    except (ImportError, OSError) as error:
        print(f"hfh: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hfh: interrupted", file=sys.stderr)
        return 130


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train dense, HashedNets and HFH networks on scikit-learn's digits, then time a "
        "4096 x 4096 layer against F.linear. Prints two tables, writes demo.png and demo.json."
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_results"),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="trainings a method (default: 5)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as torch chooses")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: a check")
    parser.add_argument(
        "--tune", action="store_true", help="search the learning rates anew (half an hour)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the results as JSON instead of tables"
    )


def _demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        from hfh.demo.command import demo
        from hfh.demo.run import QUICK, Settings
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; pip install 'hfh-kernels[demo]'") from error
    chosen = {"seeds": options.seeds, "threads": options.threads, "tune": options.tune}
    named = {name: value for name, value in chosen.items() if value is not None}
    try:
        settings = replace(QUICK if options.quick else Settings(), **named)
    except ValueError as error:
        parser.error(str(error))
    demo(settings, options.output, options.json)
    return 0
