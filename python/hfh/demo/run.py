"""Both experiments of the demo in one go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from hfh import machine
from hfh.demo import accuracy, speed, tuning
from hfh.demo.accuracy import Accuracy, LearningRates
from hfh.demo.methods import CASES, NUM_DENSE, SIZES, num_parameters
from hfh.demo.speed import Timing
from hfh_kernels import build_info

REPEATS = {1: 60, 8: 40, 32: 40, 128: 20, 512: 10}
"""Of each timing, by batch size."""


@dataclass(frozen=True)
class Settings:
    """How much work the demo does.

    Raises:
        ValueError: seeds or threads is less than 1.
    """

    seeds: int = 5
    epochs: int = accuracy.EPOCHS
    features: int = 4096
    max_layers: int = 64
    max_repeats: int = max(REPEATS.values())
    threads: int | None = None
    tune: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, received {value}")


QUICK = Settings(seeds=1, epochs=2, features=512, max_layers=2, max_repeats=3)
"""Only shows that everything works."""


@dataclass(frozen=True)
class Results:
    """Everything the demo measured and what it depends on."""

    settings: Settings
    machine: dict[str, Any]
    accuracies: list[Accuracy]
    timings: list[Timing]
    validation_errors: dict[tuple[str, int], dict[LearningRates, float]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, in full precision."""
        return {
            "machine": self.machine,
            "settings": {
                **asdict(self.settings),
                "batch_size": accuracy.BATCH_SIZE,
                "layer_sizes": SIZES,
                "dense_parameters": NUM_DENSE,
            },
            "accuracy": [
                {
                    "method": result.method,
                    "compression": result.compression,
                    "num_parameters": result.num_parameters,
                    "ratio": result.num_parameters / NUM_DENSE,
                    "learning_rates": result.learning_rates._asdict(),
                    "test_errors_percent": result.test_errors,
                    "mean": result.mean,
                    "standard_error": result.standard_error,
                }
                for result in self.accuracies
            ],
            "speed": [
                {
                    "layers": timing.num_layers,
                    "batch": timing.batch,
                    "dense_seconds": timing.dense,
                    "hfh": [
                        {**asdict(kind), "seconds": seconds, "ratio": timing.ratio(kind)}
                        for kind, seconds in timing.hfh.items()
                    ],
                }
                for timing in self.timings
            ],
            "tuning": [
                {
                    "method": method,
                    "compression": compression,
                    "validation_errors_percent": [
                        {**learning_rates._asdict(), "mean": error}
                        for learning_rates, error in errors.items()
                    ],
                }
                for (method, compression), errors in self.validation_errors.items()
            ],
            "seconds": self.seconds,
        }


def num_steps(settings: Settings) -> int:
    """How often :func:`run` calls ``on_step``."""
    trainings = settings.seeds + settings.tune * tuning.NUM_SEEDS * len(tuning.GRID)
    timings = 2 * len(REPEATS) if build_info()["extension"] else 0
    return len(CASES) * trainings + timings


def run(settings: Settings, on_step: Callable[[str], None]) -> Results:
    """Train and time everything; ``on_step`` hears what each step was about once it is done.

    Sets torch's number of threads if the settings name one.
    """
    start = time.perf_counter()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    accuracies, validation_errors = _train(settings, on_step)
    timings = _time(settings, on_step)
    seconds = time.perf_counter() - start
    return Results(settings, machine.describe(), accuracies, timings, validation_errors, seconds)


def _train(
    settings: Settings, on_step: Callable[[str], None]
) -> tuple[list[Accuracy], dict[tuple[str, int], dict[LearningRates, float]]]:
    """Every case with every seed, after its tuning where that is asked for."""
    split = accuracy.digits()
    accuracies, validation_errors = [], {}
    for case in CASES:
        learning_rates = tuning.CHOSEN[case.key]
        if settings.tune:
            errors = tuning.validation_errors(
                case, split, settings.epochs, partial(on_step, f"tuning {case}")
            )
            validation_errors[case.key] = errors
            learning_rates = min(errors, key=errors.__getitem__)
        test_errors = []
        for seed in range(settings.seeds):
            test_errors.append(
                accuracy.held_out_error(case, split, learning_rates, settings.epochs, seed)
            )
            on_step(f"training {case}")
        accuracies.append(
            Accuracy(*case.key, num_parameters(case.build()), learning_rates, test_errors)
        )
    return accuracies, validation_errors


def _time(settings: Settings, on_step: Callable[[str], None]) -> list[Timing]:
    """One layer, then a network; nothing without the extension, whose stand-in is not fused."""
    if not build_info()["extension"]:
        return []
    timings = []
    for num_layers in speed.layer_counts(settings.features, settings.max_layers):
        label = "timing one layer" if num_layers == 1 else f"timing {num_layers} layers"
        network = speed.Network(settings.features, num_layers)
        for batch, repeats in REPEATS.items():
            timings.append(network.time(batch, min(repeats, settings.max_repeats)))
            on_step(f"{label}, batch {batch}")
    return timings
