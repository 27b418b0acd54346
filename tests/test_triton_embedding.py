"""Triton's embedding against the reference, on a GPU or interpreted."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction
from hfh_kernels.nn import HFHEmbedding, Pool
from hfh_kernels.ops import tuning
from tests.lookups import (
    LOOKUPS,
    Lookup,
    assert_matches_reference,
    narrow_window,
    operator_calls,
    results,
    run,
)
from tests.samples import BFLOAT16, FLOAT32, FLOAT64, SAMPLES
from tests.triton_device import DEVICE, needs_triton

pytestmark = needs_triton
FLOAT16 = torch.float16
EVERYTHING = dataclasses.replace(LOOKUPS[1], shape=(2, 3))
SMALL_TABLE = dataclasses.replace(SAMPLES[0], in_features=20, out_features=6)

# Every option; then every dtype, kind of hash and of g, and shape of a tile.
SWEEP = [
    *[
        dataclasses.replace(
            lookup,
            embedding_dim=min(lookup.embedding_dim, 200),
            shape=lookup.shape[:-1] if len(lookup.shape) > 1 else lookup.shape,
        )
        for lookup in LOOKUPS
        if lookup.dtype != FLOAT64
    ],
    *[
        dataclasses.replace(
            EVERYTHING, name=f"everything, {dtype}", dtype=dtype, shape=(30,), dense_rows=250
        )
        for dtype in (FLOAT16, BFLOAT16)
    ],
    *[
        narrow_window(
            f"{num_hashes} hashes, block {block}, depth {depth}, {dim} columns",
            num_hashes,
            block,
            window,
            reconstruction=Reconstruction(depth, width=3),
            embedding_dim=dim,
            col_offset=col_offset,
        )
        for num_hashes, block, depth, dim, window, col_offset in (
            (1, 1, 1, 1, 20, 2**32 - 1),
            (2, 4, 2, 3, None, 2),
            (5, 16, 0, 8, 64, 40),
            (2, 64, 2, 129, None, 63),
            (1, 256, 3, 140, 1024, 250),
        )
    ],
    *[
        Lookup(
            name=f"{num_embeddings} rows",
            hash_spec=HashSpec(num_hashes=2, pool_size=640, block=32),
            num_embeddings=num_embeddings,
            embedding_dim=16,
            shape=(11,),
            padding_idx=-1,
            dense_rows=1,
        )
        for num_embeddings in (1, 2**31 + 1, 2**32 - 1)
    ],
]
each_lookup = pytest.mark.parametrize("lookup", SWEEP, ids=lambda lookup: lookup.name)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes through several tiles."""
    monkeypatch.setattr(tuning, "num_programs", lambda tiles, device: min(tiles, 3))


@each_lookup
def test_embedding(lookup: Lookup) -> None:
    assert_matches_reference(lookup, "triton", DEVICE)


@each_lookup
def test_deterministic_embedding(lookup: Lookup, few_programs: None, poisoned_memory: None) -> None:
    """Integers are summed, so that gradients come out the same whatever adds first."""
    assert torch.are_deterministic_algorithms_enabled()
    assert_matches_reference(lookup, "triton", DEVICE)


@pytest.mark.parametrize("deterministic", [False, True])
def test_order_of_a_sum(deterministic: bool) -> None:
    """Float sums of numbers unlike in size depend on it, which shows what the test can see."""
    lookup = dataclasses.replace(EVERYTHING, shape=(40,), num_embeddings=5, dense_rows=2)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(40, 70, generator=generator) * torch.logspace(-3, 3, 40)[:, None]

    def gradients(order: Tensor) -> list[Tensor]:
        leaves = lookup.leaves().map(lambda tensor: tensor.to(DEVICE)).require_grad()
        output = lookup.run(leaves, "triton", lookup.indices()[order])
        given = leaves.given()
        return list(
            torch.autograd.grad(output, [given["pool"], given["dense"]], grad[order].to(output))
        )

    torch.use_deterministic_algorithms(deterministic)
    try:
        there, back = gradients(torch.arange(40)), gradients(torch.arange(40).flip(0))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(there, back, rtol=1e-3, atol=1e-3)
    assert deterministic == all(map(torch.equal, there, back))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_deterministic_gradient_of_what_is_not_finite(bad: float, poisoned_memory: None) -> None:
    lookup = dataclasses.replace(EVERYTHING, shape=(7,))
    leaves = lookup.leaves().map(lambda tensor: tensor.to(DEVICE)).require_grad()
    output = lookup.run(leaves, "triton")
    grad = torch.ones_like(output)
    grad[3, 5] = bad
    given = leaves.given()
    for gradient in torch.autograd.grad(output, [given["pool"], given["dense"]], grad):
        assert gradient.isnan().all()


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: torch.stack((x, x))[1],
    ],
    ids=["strided", "transposed", "offset"],
)
def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    expected = run(EVERYTHING, "triton", DEVICE)
    leaves = EVERYTHING.leaves().map(lambda tensor: layout(tensor.to(DEVICE))).require_grad()
    output = EVERYTHING.run(leaves, "triton", layout(EVERYTHING.indices()))
    actual = results(output, leaves)
    # Atomic additions come in any order, here and below.
    found = {name: x.cpu() for name, x in actual.items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def by_message(value: Any) -> str:
    """Names cases of bad input."""
    return value if isinstance(value, str) else ""


def on_device(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(DEVICE).requires_grad_(value.requires_grad)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("operator", ["embedding", "embedding_backward"])
@pytest.mark.parametrize("pool_dtype", [FLOAT32, BFLOAT16])
def test_opcheck(pool_dtype: torch.dtype, operator: str) -> None:
    sample = dataclasses.replace(SMALL_TABLE, pool_dtype=pool_dtype)
    arguments = map(on_device, operator_calls(sample)[operator])
    call = getattr(torch.ops.hfh, operator).default
    torch.library.opcheck(call, tuple(arguments), rtol=1e-4, atol=1e-4)


@pytest.fixture
def compile_anew() -> Iterator[None]:
    config: Any = torch.compiler.config
    with config.patch(force_disable_caches=True):
        yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_compiled_layer(compile_anew: None) -> None:
    layer = HFHEmbedding(
        50, 40, padding_idx=3, pool=Pool(640), dense_rows=4, permutation=torch.arange(50).flip(0)
    ).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    indices = torch.arange(12, device=DEVICE).view(3, 4)
    outcomes = []
    for call in (layer, compiled):
        output = call(indices)
        gradients = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        outcomes.append([output, *gradients])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels assert, and the device is lost")
def test_out_of_range() -> None:
    leaves = EVERYTHING.leaves()
    for bad in (-1, 500):
        with pytest.raises(IndexError, match=rf"indices .*num_embeddings=500.* {bad}"):
            EVERYTHING.run(leaves, "triton", torch.tensor([3, bad]))
    permutation = EVERYTHING.permutation
    assert permutation is not None
    permutation[7] = 500
    try:
        with pytest.raises(IndexError, match=r"permutation must be in .* 500"):
            EVERYTHING.run(leaves, "triton", torch.tensor([7]))
    finally:
        permutation[7] = 0


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_out_of_range_is_asserted() -> None:
    """In a process of its own, which loses the device."""
    script = """
import torch
from hfh_kernels.nn import HFHEmbedding, Pool
HFHEmbedding(500, 70, pool=Pool(640)).cuda()(torch.tensor([3, 500]).cuda()).cpu()
"""
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert outcome.returncode != 0
    assert "indices must be in [0, num_embeddings)" in outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indices": torch.ones(3)}, TypeError, "indices must be int32 or int64"),
        ({"pool": torch.ones(640).double()}, TypeError, r"pool must have one of the dtypes"),
        ({"theta": torch.ones(3)}, ValueError, "theta must have shape"),
        ({"dense": torch.ones(501, 70)}, ValueError, r"dense must have shape .*501, 70"),
        ({"dense": torch.ones(5, 70).half()}, TypeError, "dense must have pool's dtype"),
        ({"permutation": torch.ones(500)}, TypeError, "permutation must be int64"),
        ({"num_embeddings": 2**32 + 1}, ValueError, r"rows must be in .*4294967297"),
        ({"padding_idx": 500}, ValueError, "padding_idx must be below"),
    ],
    ids=by_message,
)
def test_invalid(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    leaves = EVERYTHING.leaves()
    arguments = {
        "indices": EVERYTHING.indices(),
        "pool": leaves.pool,
        "theta": leaves.theta,
        "dense": leaves.dense,
        "permutation": None,
        "num_embeddings": 500,
        "embedding_dim": 70,
        "padding_idx": -1,
        **changes,
    }
    with pytest.raises(error, match=message):
        torch.ops.hfh.embedding(*map(on_device, arguments.values()), *EVERYTHING.weight)


def test_backward_needs_a_gradient_of_the_shape() -> None:
    leaves = EVERYTHING.leaves().map(lambda tensor: tensor.to(DEVICE))
    grad = torch.ones(3, 70, device=DEVICE, dtype=FLOAT32)
    with pytest.raises(ValueError, match=r"grad must have .*\[2, 3\].*received \[3, 70\]"):
        torch.ops.hfh.embedding_backward(
            grad, EVERYTHING.indices().to(DEVICE), *leaves[:3], None, 500, -1, *EVERYTHING.weight
        )
