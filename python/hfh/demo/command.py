"""What ``hfh demo`` shows and writes."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hfh.demo.report import accuracy_table, save_figure, speed_table
from hfh.demo.run import Settings, num_steps, run


def demo(settings: Settings, output: Path, as_json: bool) -> None:
    """Run the demo, print its tables, or its JSON, and write demo.json and demo.png to output.

    Progress and the names of the files go to standard error.

    Raises:
        OSError: output cannot be written to.
    """
    output.mkdir(parents=True, exist_ok=True)
    messages = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=messages,
    ) as progress:
        task = progress.add_task("loading", total=num_steps(settings))
        results = run(settings, lambda step: progress.update(task, advance=1, description=step))
    text = json.dumps(results.to_json(), indent=2)
    if as_json:
        print(text)
    else:
        console = Console()
        console.print(accuracy_table(results.accuracies))
        if results.timings:
            console.print(speed_table(results.timings, settings.features))
        else:
            console.print("The layer was not timed: hfh_kernels has no compiled extension here.")
    (output / "demo.json").write_text(text + "\n")
    save_figure(results, output / "demo.png")
    messages.print(f"Wrote demo.json and demo.png to {output}, {results.seconds:.0f} s in all.")
