"""What the default hash costs in accuracy: prints a table, writes results/default-hash.json.

`python -m bench.default_hash [--quick]`, one thread, about ten minutes. Three networks on
scikit-learn's digits, compressed by blocks of 1, 32 and 64 columns, the latter two also in windows
of a quarter of the pool: what the default, 64 KiB, is of the pool of the widest network, the only
one to get windows by default. Learning rates are those that are best for blocks of 1 by validation
error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hfh import machine
from hfh.compression.compress import compress
from hfh.demo.accuracy import (
    Accuracy,
    LearningRates,
    Split,
    digits,
    held_out_error,
    stratified_split,
)
from hfh.demo.methods import Case, Method, dense

RESULTS = Path(__file__).parent / "results" / "default-hash.json"
SEEDS = 5
EPOCHS = 20
POOL_RATES = (0.1, 0.3, 1.0)
DENSE_RATES = (0.001, 0.003, 0.01)
OTHERS_RATE = 0.01


def cnn(budget: int) -> nn.Sequential:
    """Three convolutions and a linear layer for images of 8 x 8; 64,938 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


@dataclass(frozen=True)
class Network:
    """A dense network and the compression it is tried at."""

    name: str
    build: Callable[[int], nn.Sequential]
    compression: int


@dataclass(frozen=True)
class Hash:
    """A way to compress."""

    depth: int
    block: int
    window_share: float | None = None
    """Of the pool."""

    def __str__(self) -> str:
        window = "" if self.window_share is None else f", windows of {self.window_share:g} pools"
        return f"depth {self.depth}, block {self.block}{window}"

    def compress(self, model: nn.Sequential, ratio: float) -> nn.Sequential:
        options: dict[str, Any] = {"depth": self.depth, "block": self.block, "window": None}
        if self.window_share is not None:
            # A trial at the same ratio tells the size of the pool.
            pool_size = compress(model, ratio, **options)[1].pool_size
            options["window"] = int(pool_size * self.window_share) // self.block * self.block
        return compress(model, ratio, **options)[0]


NETWORKS = (
    Network("MLP 64-256-256-10", dense, 16),
    Network("MLP 64-1024-1024-10", lambda budget: dense(budget, (64, 1024, 1024, 10)), 16),
    Network("CNN 32-64-64", cnn, 8),
)
HASHES = tuple(
    Hash(depth, block, share)
    for depth in (1, 2)
    for block, share in ((1, None), (32, None), (64, None), (32, 0.25), (64, 0.25))
)


def case(network: Network, hash: Hash | None) -> Case:
    """As the demo's training takes it; without a hash, the dense network."""

    def build(budget: int) -> nn.Sequential:
        model = network.build(budget)
        return model if hash is None else hash.compress(model, 1 / network.compression)

    return Case(Method(str(hash or "dense"), build), network.compression if hash else 1)


def best_rates(case: Case, split: Split, rates: tuple[float, ...], epochs: int) -> LearningRates:
    """By the mean error of two seeds on images held out of the training images."""
    splits = [stratified_split(split.images, split.labels, seed) for seed in range(2)]
    errors = {
        learning_rates: statistics.mean(
            held_out_error(case, validation, learning_rates, epochs, seed)
            for seed, validation in enumerate(splits)
        )
        for learning_rates in (LearningRates(rate, OTHERS_RATE) for rate in rates)
    }
    return min(errors, key=lambda learning_rates: errors[learning_rates])


def measure(network: Network, split: Split, epochs: int, seeds: int) -> list[Accuracy]:
    rows = []
    rates: dict[int | None, LearningRates] = {}
    for hash in (None, *HASHES):
        tried = case(network, hash)
        depth = hash.depth if hash else None
        if depth not in rates:
            grid = POOL_RATES if hash else DENSE_RATES
            rates[depth] = best_rates(tried, split, grid, epochs)
        errors = [held_out_error(tried, split, rates[depth], epochs, seed) for seed in range(seeds)]
        size = sum(parameter.numel() for parameter in tried.build().parameters())
        rows.append(Accuracy(str(tried.method.name), tried.compression, size, rates[depth], errors))
        error = f" ± {rows[-1].standard_error:.2f}" if seeds > 1 else ""
        print(f"{network.name:20} {tried!s:50} {rows[-1].mean:5.2f}{error}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs: a check")
    quick = parser.parse_args().quick
    start = time.perf_counter()
    epochs, seeds = (2, 1) if quick else (EPOCHS, SEEDS)
    split = digits()
    results = {
        network.name: [
            {**asdict(row), "mean": row.mean, "standard_error": row.standard_error}
            for row in measure(network, split, epochs, seeds)
        ]
        for network in NETWORKS
    }
    fields = {
        "machine": machine.describe(),
        "quick": quick,
        "epochs": epochs,
        "seconds": time.perf_counter() - start,
        "test_errors_percent": results,
    }
    if not quick:
        RESULTS.write_text(json.dumps(fields, indent=1) + "\n")
        print(f"Wrote {RESULTS}")


if __name__ == "__main__":
    main()
