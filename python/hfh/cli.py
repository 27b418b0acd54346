"""The command ``hfh``: what is said and returned whichever command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; wrong arguments raise SystemExit(2).

    Errors are one line on standard error. ``hfh --traceback ...`` shows where they come from.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        from typer.exceptions import TyperException

        from hfh.command.commands import app
    except ModuleNotFoundError as error:
        return _fail(f"{error}; pip install 'hfh-kernels[toolkit]'")
    try:
        status = app(arguments, prog_name="hfh", standalone_mode=False)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        command = "hfh" if context is None else context.command_path
        raise SystemExit(_fail(error.format_message(), command, error.exit_code)) from None
    except Exception as error:
        if arguments[:1] == ["--traceback"]:
            raise
        return _fail(_describe(error))
    if status == INTERRUPTED:
        print("hfh: interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0


INTERRUPTED = 130


def _describe(error: Exception) -> str:
    """What kind of error it is only where the message was not written for users."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; pip install 'hfh-kernels[toolkit]'"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ImportError, OSError, ValueError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _fail(message: str, command: str = "hfh", status: int = 1) -> int:
    print(f"{command}: error: {' '.join(message.split())}", file=sys.stderr)
    return status
