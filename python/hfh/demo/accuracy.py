"""Test errors on scikit-learn's handwritten digits, with one training budget for every method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from hfh.demo.methods import Case

BATCH_SIZE = 128
EPOCHS = 60


class LearningRates(NamedTuple):
    """Adam's, by role: weights are dense matrices or the pool, others biases and theta."""

    weights: float
    others: float


class Split(NamedTuple):
    """Images [N, 64] in [0, 1] and labels [N], to train on and to evaluate on."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


@dataclass(frozen=True)
class Accuracy:
    """Test errors of one case in percent, one a seed."""

    method: str
    compression: int
    num_parameters: int
    learning_rates: LearningRates
    test_errors: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.test_errors)

    @property
    def standard_error(self) -> float | None:
        """Of the mean over seeds; None for a single seed."""
        if len(self.test_errors) == 1:
            return None
        return statistics.stdev(self.test_errors) / math.sqrt(len(self.test_errors))


def digits() -> Split:
    """All 1797 images, a quarter held out for testing; the same split always."""
    data, target = load_digits(return_X_y=True)
    images, labels = torch.tensor(data / 16, dtype=torch.float32), torch.tensor(target)
    return stratified_split(images, labels, seed=0)


def stratified_split(images: Tensor, labels: Tensor, seed: int) -> Split:
    """Three quarters and one quarter, with the same share of every label."""
    kept, held_out = train_test_split(
        range(len(labels)), test_size=0.25, stratify=labels, random_state=seed
    )
    return Split(images[kept], labels[kept], images[held_out], labels[held_out])


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# Too small to gain from more threads, which would also change how sums are rounded.
@_one_thread()
def held_out_error(
    case: Case, split: Split, learning_rates: LearningRates, epochs: int, seed: int
) -> float:
    """Error in percent on the held-out images after training on the others.

    Adam on the cross-entropy, with learning rates that fall to zero along a cosine. The seed
    decides initial parameters and order of the data, the latter alike for every method.
    """
    torch.manual_seed(seed)
    network = case.build()
    parameters: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        parameters[name.endswith("weight")].append(parameter)
    optimizer = torch.optim.Adam(
        [
            {"params": parameters[True], "lr": learning_rates.weights},
            {"params": parameters[False], "lr": learning_rates.others},
        ],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(split.labels), generator=order).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(network(split.images[batch]), split.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.inference_mode():
        predictions = network(split.held_out_images).argmax(dim=1)
    return 100 * float((predictions != split.held_out_labels).double().mean())
