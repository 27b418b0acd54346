"""A progress bar on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    description: str, total: int, is_shown: bool
) -> Iterator[Callable[[int, str], None]]:
    """A function that is told how many steps are done and what to say of them.

    Nothing is shown unless ``is_shown``; without rich, a line a step.
    """
    if not is_shown:
        yield lambda completed, message: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield lambda completed, message: print(
            f"{description} {completed}/{total} {message}", file=sys.stderr
        )
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)

        def show(completed: int, message: str) -> None:
            bar.update(task, completed=completed, description=f"{description}, {message}")

        yield show
