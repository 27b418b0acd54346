"""Learning rates of every method, from one grid and by validation error alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import product

from hfh.demo.accuracy import LearningRates, Split, held_out_error, stratified_split
from hfh.demo.methods import Case

GRID = tuple(
    LearningRates(weights, others)
    for weights, others in product(
        (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        (3e-3, 1e-2, 3e-2),
    )
)
NUM_SEEDS = 5

CHOSEN = {
    ("dense", 1): LearningRates(0.01, 0.003),
    ("dense, narrower", 16): LearningRates(0.03, 0.003),
    ("HashedNets", 16): LearningRates(1.0, 0.03),
    ("HFH U4 depth 1, block 1", 16): LearningRates(1.0, 0.01),
    ("HFH U4 depth 1, block 32", 16): LearningRates(1.0, 0.03),
    ("HFH U4 depth 2, block 1", 16): LearningRates(0.3, 0.003),
    ("HFH U4 depth 2, block 32", 16): LearningRates(0.3, 0.03),
    ("dense, narrower", 64): LearningRates(0.03, 0.03),
    ("HashedNets", 64): LearningRates(0.1, 0.03),
    ("HFH U4 depth 1, block 1", 64): LearningRates(1.0, 0.01),
    ("HFH U4 depth 1, block 32", 64): LearningRates(1.0, 0.03),
    ("HFH U4 depth 2, block 1", 64): LearningRates(0.3, 0.03),
    ("HFH U4 depth 2, block 32", 64): LearningRates(0.3, 0.01),
}
"""By method and compression: the best of GRID at the demo's number of epochs, found as
``hfh demo --tune`` does. The test images played no part in it."""


def validation_errors(
    case: Case, split: Split, epochs: int, on_trained: Callable[[], None]
) -> dict[LearningRates, float]:
    """Mean error in percent at every point of the grid, over NUM_SEEDS seeds.

    Each seed holds another quarter of the training images out. The test images stay unseen.
    """
    splits = [stratified_split(split.images, split.labels, seed) for seed in range(NUM_SEEDS)]
    errors = {}
    for learning_rates in GRID:
        of_seeds = []
        for seed, validation in enumerate(splits):
            of_seeds.append(held_out_error(case, validation, learning_rates, epochs, seed))
            on_trained()
        errors[learning_rates] = statistics.mean(of_seeds)
    return errors
