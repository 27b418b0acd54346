"""What the CUDA embedding and bags refuse, on a GPU or emulated."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from hfh_kernels import Reconstruction
from tests.cuda_device import DEVICE, needs_cuda
from tests.lookups import bag_arguments
from tests.test_cuda_lookup import EVERYTHING, on_device, run_operator

pytestmark = needs_cuda
WEIGHT = EVERYTHING.weight._replace(backend="cuda")


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels assert, and the device is lost")
def test_out_of_range() -> None:
    leaves = EVERYTHING.leaves()
    for bad in (-1, 500, 2**32):
        with pytest.raises(RuntimeError, match=r"indices must be in \[0, num_embeddings\)"):
            run_operator(EVERYTHING, leaves, torch.tensor([3, bad]))
        with pytest.raises(RuntimeError, match=r"indices must be in \[0, num_embeddings\)"):
            torch.ops.hfh.embedding_backward(
                torch.ones(2, 70), torch.tensor([3, bad]), *leaves[:3], None, 500, -1,
                *WEIGHT,
            )  # fmt: skip
    permutation = EVERYTHING.permutation
    assert permutation is not None
    permutation[7] = 500
    try:
        with pytest.raises(RuntimeError, match=r"permutation must be in \[0, num_embeddings\)"):
            run_operator(EVERYTHING, leaves, torch.tensor([7]))
    finally:
        permutation[7] = 0


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_out_of_range_is_asserted() -> None:
    """In a process of its own, which loses the device."""
    script = """
import torch
from hfh_kernels.nn import HFHEmbedding, Pool
table = HFHEmbedding(500, 70, pool=Pool(640)).cuda()
table(torch.tensor([3, 500]).cuda()).cpu()
"""
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert outcome.returncode != 0
    assert "indices must be in [0, num_embeddings)" in outcome.stdout + outcome.stderr


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels assert, and the device is lost")
@pytest.mark.parametrize("offsets", [[1, 2], [0, 2, 1], [0, 4], [-1, 2]], ids=str)
def test_offsets_out_of_range(offsets: list[int]) -> None:
    with pytest.raises(RuntimeError, match="offsets must start at 0, not decrease and not exceed"):
        call({"offsets": torch.tensor(offsets)}, "embedding_bag")


def by_message(value: Any) -> str:
    """Names cases of bad input."""
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indices": torch.ones(3)}, TypeError, "indices must be int32 or int64"),
        ({"pool": torch.ones(640).double()}, TypeError, "the cuda kernels take pool in float32"),
        ({"theta": torch.ones(3)}, ValueError, "theta must have shape"),
        ({"dense": torch.ones(501, 70)}, ValueError, r"dense must have shape .*501, 70"),
        ({"dense": torch.ones(5, 70).half()}, TypeError, "dense must have pool's dtype"),
        ({"permutation": torch.ones(500)}, TypeError, "permutation must be int64"),
        ({"permutation": torch.arange(9)}, ValueError, "permutation must have shape .*500"),
        ({"num_embeddings": 2**32 + 1}, ValueError, "rows"),
        ({"num_embeddings": -1}, ValueError, "num_embeddings must not be negative"),
        ({"padding_idx": 500}, ValueError, "padding_idx must be below"),
    ],
    ids=by_message,
)
@pytest.mark.parametrize("operator", ["embedding", "embedding_bag"])
def test_invalid_table(
    operator: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call({"factors": None, **changes}, operator)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mode": "min"}, ValueError, r"mode must be 'sum', 'mean' or 'max', received 'min'"),
        ({"mode": "mean"}, ValueError, "per_sample_weights must be None unless mode is 'sum'"),
        ({"factors": torch.ones(2)}, ValueError, "per_sample_weights must have the shape"),
        ({"factors": torch.ones(3).double()}, TypeError, "per_sample_weights must have pool's"),
        ({"offsets": torch.tensor([0.0])}, TypeError, "offsets must be int32 or int64"),
        ({"offsets": torch.tensor([[0]])}, ValueError, "offsets must be 1-d"),
        ({"indices": torch.tensor([[0]])}, ValueError, "indices must be 1-d"),
        (
            {"mode": "max", "factors": None},
            RuntimeError,
            "backend 'cuda' cannot run: mode 'max' has no kernel",
        ),
    ],
    ids=by_message,
)
def test_invalid_bags(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(changes, "embedding_bag")


def call(changes: dict[str, Any], operator: str) -> None:
    arguments = bag_arguments(EVERYTHING.leaves(), changes)
    if operator == "embedding":
        for name in ("offsets", "factors", "mode", "include_last_offset"):
            del arguments[name]
    getattr(torch.ops.hfh, operator)(*map(on_device, arguments.values()), *WEIGHT)


def test_networks_without_a_kernel() -> None:
    lookup = dataclasses.replace(EVERYTHING, reconstruction=Reconstruction(depth=3, width=5))
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run: .*depth 3, width 5"):
        run_operator(lookup, lookup.leaves().map(on_device))


def test_backward_needs_a_gradient_of_the_shape() -> None:
    leaves = EVERYTHING.leaves().map(on_device)
    grad = torch.ones(3, 70, device=DEVICE)
    with pytest.raises(ValueError, match=r"grad must have shape \[2, 3, 70\].*received \[3, 70\]"):
        torch.ops.hfh.embedding_backward(
            grad, EVERYTHING.indices().to(DEVICE), *leaves[:3], None, 500, -1, *WEIGHT
        )
