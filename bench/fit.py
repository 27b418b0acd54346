"""Does it help to start from a trained network? Prints the answer and writes results/fit.json.

`python -m bench.fit [--quick]`. A dense network is trained on scikit-learn's digits and compressed
in two ways: from scratch, and fitted to the dense weights. Both then train for the same number of
steps, plainly or distilled from the dense network. Every seed splits the images anew into those to
train on and those to test. A fifth of the images belongs to no split: on these alone the learning
rates are chosen, for each method, size and number of steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from bench.linear import RESULTS
from hfh import machine
from hfh.demo.methods import dense as dense_mlp
from hfh.fitting.finetune import finetune
from hfh.fitting.fit import FitReport, fit
from hfh.fitting.moments import second_moments
from hfh_kernels.nn import HFHConv2d, HFHLinear, Pool
from hfh_kernels.spec import Reconstruction

NUM_HASHES = 4
BLOCK = 8
BATCH_SIZE = 128
DENSE_STEPS = 400
DENSE_LEARNING_RATE = 3e-3
POOL_LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FITS = (
    (1, 0, False),
    (1, 0, True),
    (NUM_HASHES, 1, False),
    (NUM_HASHES, 1, True),
    (NUM_HASHES, 2, True),
)
"""Number of hashes, depth, and whether the fit knows the moments. One hash is HashedNets."""
OTHERS_LEARNING_RATE = 1 / 30
"""Of theta and biases, relative to the pool's."""
TUNING_SEEDS = 2


@dataclass(frozen=True)
class Images:
    """Pixels [N, 64] in [0, 1] and labels [N], as batches in an order that torch's generator
    decides."""

    pixels: Tensor
    labels: Tensor

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(len(self.labels)).split(BATCH_SIZE):
            yield self.pixels[batch], self.labels[batch]


class Split(NamedTuple):
    train: Images
    validation: Images
    test: Images


class Method(NamedTuple):
    """How a compressed network starts, and what it learns from."""

    is_fitted: bool
    is_distilled: bool

    def __str__(self) -> str:
        start = "fitted" if self.is_fitted else "from scratch"
        return f"{start}, distilled" if self.is_distilled else start


METHODS = tuple(
    Method(fitted, distilled) for fitted in (False, True) for distilled in (False, True)
)


def split(seed: int) -> Split:
    """Validation images are the same for every seed."""
    data, target = load_digits(return_X_y=True)
    rest, validation = train_test_split(
        range(len(target)), test_size=0.2, stratify=target, random_state=0
    )
    train, test = train_test_split(rest, test_size=0.25, stratify=target[rest], random_state=seed)

    def images(indices: list[int]) -> Images:
        return Images(
            torch.tensor(data[indices] / 16, dtype=torch.float32), torch.tensor(target[indices])
        )

    return Split(images(train), images(validation), images(test))


def dense_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


NETWORKS = {"MLP": lambda: dense_mlp(0), "CNN": dense_cnn}


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def compressed(
    dense: nn.Sequential, ratio: int, *, num_hashes: int, depth: int, block: int = BLOCK
) -> nn.Sequential:
    """The network at 1 / ratio of its parameters; biases and g count, and start at random."""
    layers = [layer for layer in dense if isinstance(layer, (nn.Linear, nn.Conv2d))]
    num_biases = sum(len(layer.weight) for layer in layers)
    num_theta = len(layers) * Reconstruction(depth).num_parameters(num_hashes)
    size = num_parameters(dense) // ratio - num_biases - num_theta
    hashed: dict[str, Any] = {
        "pool": Pool(size // block * block),
        "num_hashes": num_hashes,
        "depth": depth,
        "block": block,
    }

    def replaced(layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Linear):
            return HFHLinear(layer.in_features, layer.out_features, **hashed)
        if isinstance(layer, nn.Conv2d):
            return HFHConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, padding=1, **hashed
            )
        return copy.deepcopy(layer)

    return nn.Sequential(*map(replaced, dense))


def fit_to(network: nn.Sequential, dense: nn.Sequential, calibration: Tensor | None) -> FitReport:
    """Fit to the dense weights, on the moments of these inputs if there are any; copy biases."""
    pairs: dict[HFHLinear | HFHConv2d, nn.Linear | nn.Conv2d] = {
        ours: theirs
        for ours, theirs in zip(network, dense, strict=True)
        if isinstance(ours, (HFHLinear, HFHConv2d)) and isinstance(theirs, (nn.Linear, nn.Conv2d))
    }
    for ours, theirs in pairs.items():
        # A g of depth 0 cannot scale the pool for its layer.
        if ours.reconstruction.depth == 0:
            ours.scale = float(theirs.weight.detach().std())
        ours.load_state_dict({"bias": theirs.bias}, strict=False)
    moments = {} if calibration is None else second_moments(dense, [calibration])
    return fit(
        {ours: theirs.weight.detach().flatten(1) for ours, theirs in pairs.items()},
        importance={ours: moments[theirs] for ours, theirs in pairs.items() if theirs in moments},
    )


def error(network: nn.Module, images: Images) -> float:
    """Wrong answers in percent."""
    with torch.inference_mode():
        answers = network(images.pixels).argmax(dim=1)
    return 100 * float((answers != images.labels).double().mean())


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and its standard error over seeds."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"values": values, "mean": statistics.mean(values), "standard_error": spread}


class Experiment:
    """All networks of one dense architecture; what is expensive is made once a seed."""

    def __init__(self, name: str, splits: list[Split]) -> None:
        self.name = name
        self.splits = splits
        self.dense = []
        self.fitted: dict[tuple[int, int], list[nn.Sequential]] = {}
        for seed, data in enumerate(splits):
            torch.manual_seed(seed)
            network = NETWORKS[name]()
            finetune(
                network,
                data.train,
                nn.functional.cross_entropy,
                DENSE_STEPS,
                learning_rate=DENSE_LEARNING_RATE,
                seed=seed,
            )
            self.dense.append(network)

    def dense_row(self) -> dict[str, Any]:
        errors = [error(net, data.test) for net, data in zip(self.dense, self.splits, strict=True)]
        return {
            "network": self.name,
            "num_parameters": num_parameters(self.dense[0]),
            "test_error": summary(errors),
        }

    def from_scratch(self, ratio: int, num_hashes: int, depth: int, seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return compressed(self.dense[seed], ratio, num_hashes=num_hashes, depth=depth)

    def fit_rows(self, ratio: int) -> Iterator[dict[str, Any]]:
        """Fitted networks as they are before any training."""
        for num_hashes, depth, with_moments in FITS:
            networks, reports, seconds = [], [], []
            for seed, (dense, data) in enumerate(zip(self.dense, self.splits, strict=True)):
                network = self.from_scratch(ratio, num_hashes, depth, seed)
                start = time.perf_counter()
                report = fit_to(network, dense, data.train.pixels if with_moments else None)
                seconds.append(time.perf_counter() - start)
                networks.append(network)
                reports.append(report)
            if with_moments:
                self.fitted[ratio, depth] = networks
            errors = {
                name: [_root_mean_square(report, name) for report in reports]
                for name in ("relative_error", "weighted_error")
            }
            tests = [
                error(network, data.test)
                for network, data in zip(networks, self.splits, strict=True)
            ]
            yield {
                "network": self.name,
                "ratio": ratio,
                "num_hashes": num_hashes,
                "depth": depth,
                "moments": with_moments,
                "num_parameters": num_parameters(networks[0]),
                **{name: summary(values) for name, values in errors.items()},
                "expected_error": reports[0].expected_error,
                "test_error": summary(tests),
                "seconds": summary(seconds),
            }

    def training_rows(
        self, ratio: int, depth: int, all_steps: tuple[int, ...]
    ) -> Iterator[dict[str, Any]]:
        """Every method and number of steps at its best learning rate; after fit_rows."""
        starts = {
            True: self.fitted[ratio, depth],
            False: [
                self.from_scratch(ratio, NUM_HASHES, depth, seed)
                for seed in range(len(self.splits))
            ],
        }

        def trained(method: Method, steps: int, rate: float, seed: int) -> nn.Sequential:
            network = copy.deepcopy(starts[method.is_fitted][seed])
            finetune(
                network,
                self.splits[seed].train,
                nn.functional.cross_entropy,
                steps,
                pool_learning_rate=rate,
                learning_rate=rate * OTHERS_LEARNING_RATE,
                teacher=self.dense[seed] if method.is_distilled else None,
                seed=seed,
            )
            return network

        for method in METHODS:
            for steps in all_steps:
                validation = {
                    rate: statistics.mean(
                        error(trained(method, steps, rate, seed), self.splits[seed].validation)
                        for seed in range(min(TUNING_SEEDS, len(self.splits)))
                    )
                    for rate in POOL_LEARNING_RATES
                }
                rate = min(validation, key=validation.__getitem__)
                tests = [
                    error(trained(method, steps, rate, seed), data.test)
                    for seed, data in enumerate(self.splits)
                ]
                yield {
                    "network": self.name,
                    "ratio": ratio,
                    "depth": depth,
                    "method": str(method),
                    "steps": steps,
                    "pool_learning_rate": rate,
                    "validation_errors": {str(rate): mean for rate, mean in validation.items()},
                    "test_error": summary(tests),
                }


def _root_mean_square(report: FitReport, name: str) -> float:
    """Root of the mean over the layers of the squared errors."""
    return math.sqrt(statistics.mean(getattr(layer, name) ** 2 for layer in report.layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = (1, (5,)) if arguments.quick else (5, (25, 100))
    report = described([run(name, seeds, steps) for name in NETWORKS])
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / "fit.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {file}")


def run(name: str, seeds: int, steps: tuple[int, ...]) -> dict[str, Any]:
    """All rows of one dense architecture."""
    start = time.perf_counter()
    experiment = Experiment(name, [split(seed) for seed in range(seeds)])
    fits, trainings = [], []
    for ratio in (4, 8):
        for row in experiment.fit_rows(ratio):
            fits.append(row)
            _say(row, f"U{row['num_hashes']} depth {row['depth']}, moments {row['moments']}")
        for depth in (1, 2):
            for row in experiment.training_rows(ratio, depth, steps):
                trainings.append(row)
                _say(row, f"depth {depth}, {row['method']}, {row['steps']} steps")
    return {
        **experiment.dense_row(),
        "fits": fits,
        "trainings": trainings,
        "seconds": time.perf_counter() - start,
    }


def described(networks: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of all networks, with what they depend on."""
    return {
        "machine": machine.describe(),
        "block": BLOCK,
        "batch_size": BATCH_SIZE,
        "dense_steps": DENSE_STEPS,
        "dense_learning_rate": DENSE_LEARNING_RATE,
        "others_learning_rate": OTHERS_LEARNING_RATE,
        "tuning_seeds": TUNING_SEEDS,
        "networks": networks,
    }


def _say(row: dict[str, Any], what: str) -> None:
    tests = row["test_error"]
    spread = tests["standard_error"]
    print(
        f"{row['network']} 1/{row['ratio']}, {what}: {tests['mean']:.2f}"
        + ("" if spread is None else f" ± {spread:.2f}"),
        flush=True,
    )


if __name__ == "__main__":
    main()
