"""Fair timing of functions against each other on a machine that is never quite idle."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from time import perf_counter


def interleaved_medians(
    functions: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int,
    on_repeat: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Median seconds of one call of each function.

    All functions take turns within each repeat, so that a slow spell of the machine hits all of
    them, and in an order shuffled anew each time, so that none always follows the same other.
    Nothing is synchronised: for CPU functions, or for those that wait for their device.
    ``on_repeat`` is called after each repeat but those of the warm-up.

    Raises:
        ValueError: functions is empty, repeats < 1 or warmup < 0.
    """
    if not functions:
        raise ValueError("functions must not be empty")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, received {repeats}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, received {warmup}")
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for repeat in range(-warmup, repeats):
        for name in order.sample(names, len(names)):
            function = functions[name]
            start = perf_counter()
            function()
            elapsed = perf_counter() - start
            if repeat >= 0:
                seconds[name].append(elapsed)
        if repeat >= 0 and on_repeat is not None:
            on_repeat()
    return {name: statistics.median(values) for name, values in seconds.items()}
