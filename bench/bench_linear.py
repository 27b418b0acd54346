"""The rows of bench/shapes.py as pytest-benchmark cases, a group for each comparison.

`pytest bench`, or with `-k "depth_1 and 128"` and the like for a part.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.candidates import candidates, overhead_candidates, training_step
from bench.shapes import BATCHES, FORWARD_BACKWARD, ROWS, Row


@pytest.mark.parametrize("candidate", ["dense", "materialize + linear", "hfh"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_linear(benchmark: Any, row: Row, batch: int, candidate: str) -> None:
    benchmark.group = f"{row.name}, batch {batch}"
    functions = candidates(row, batch, [row.layer(row.pool())], [row.dense_weight()])
    benchmark(functions[candidate])


@pytest.mark.parametrize("candidate", ["dense", "hfh"])
def test_training_step(benchmark: Any, candidate: str) -> None:
    row = FORWARD_BACKWARD
    benchmark.group = "training step, batch 128"
    functions = training_step(row, 128, row.layer(row.pool()), row.dense_weight())
    benchmark(functions[candidate])


@pytest.mark.parametrize("candidate", list(overhead_candidates()))
def test_call_overhead(benchmark: Any, candidate: str) -> None:
    benchmark.group = "one call on 64 x 64, batch 1"
    with torch.no_grad():
        benchmark(overhead_candidates()[candidate])
