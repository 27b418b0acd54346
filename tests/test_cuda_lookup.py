"""The CUDA embedding and bags against the reference, on a GPU or emulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction
from tests.cuda_device import DEVICE, needs_cuda
from tests.lookups import LOOKUPS, Leaves, Lookup, narrow_window, operator_calls, results
from tests.samples import BFLOAT16, FLOAT32, FLOAT64, SAMPLES, assert_matches, grid

pytestmark = needs_cuda
FLOAT16 = torch.float16
EVERYTHING = dataclasses.replace(LOOKUPS[1], shape=(2, 3))
BAG_SIZES = (0, 3, 1, 0, 8, 0)
BAGS = dataclasses.replace(EVERYTHING, mode="sum", weighted=True, bag_sizes=BAG_SIZES)
SMALL_TABLE = dataclasses.replace(SAMPLES[0], in_features=20, out_features=6)
MODES = (("sum", False), ("sum", True), ("mean", False))

# Every option; then every dtype, network and way in which rows fall on lanes.
TABLES = [
    *[
        dataclasses.replace(lookup, embedding_dim=min(lookup.embedding_dim, 300))
        for lookup in LOOKUPS
        if lookup.dtype != FLOAT64 and lookup.reconstruction.depth < 3
    ],
    *[
        dataclasses.replace(EVERYTHING, name=f"everything, {dtype}", dtype=dtype, shape=(30,))
        for dtype in (FLOAT16, BFLOAT16)
    ],
    *[
        narrow_window(
            f"{num_hashes} hashes, block {block}, {network}, {dtype}, {dim} columns",
            num_hashes,
            block,
            window,
            reconstruction=network,
            embedding_dim=dim,
            dtype=dtype,
            col_offset=col_offset,
        )
        for num_hashes, block, network, dtype, dim, window, col_offset in (
            (1, 1, Reconstruction(depth=1), FLOAT32, 1, 20, 2**32 - 1),
            (2, 4, Reconstruction(depth=1), FLOAT32, 3, None, 2),
            (4, 2, Reconstruction(depth=1), BFLOAT16, 40, None, 1),
            (8, 64, Reconstruction(depth=1), BFLOAT16, 129, 640, 63),
            (8, 32, Reconstruction(depth=1), FLOAT32, 128, None, 64),
            (4, 256, Reconstruction(width=8), FLOAT32, 140, 1024, 250),
            (4, 32, Reconstruction(width=4, activation="tanh"), FLOAT16, 64, None, 8),
            (4, 64, Reconstruction(width=4, activation="tanh"), FLOAT32, 600, None, 0),
        )
    ],
    *[
        Lookup(
            name=f"{num_embeddings} rows",
            hash_spec=HashSpec(pool_size=640, block=32),
            num_embeddings=num_embeddings,
            embedding_dim=16,
            shape=(11,),
            padding_idx=-1,
            dense_rows=1,
        )
        for num_embeddings in (1, 2**31 + 1, 2**32 - 1)
    ],
]
SWEEP = [
    *TABLES,
    *[
        dataclasses.replace(
            lookup,
            name=f"{mode}, {weighted=}, {lookup.name}",
            mode=mode,
            weighted=weighted,
            bag_sizes=BAG_SIZES if lookup.num_indices else (),
            include_last_offset=i % 2 == 0,
        )
        for i, lookup in enumerate(TABLES)
        for mode, weighted in MODES
    ],
    # A block a bag.
    *[
        dataclasses.replace(
            BAGS,
            name=f"long bags, {mode}, {weighted=}, {dtype}, {dim} columns",
            mode=mode,
            weighted=weighted,
            dtype=dtype,
            embedding_dim=dim,
            bag_sizes=(0, 41, 3, 70),
        )
        for (mode, weighted), dtype, dim in zip(
            MODES, (FLOAT32, BFLOAT16, FLOAT16), (300, 70, 16), strict=True
        )
    ],
]
each_lookup = pytest.mark.parametrize("lookup", SWEEP, ids=lambda lookup: lookup.name)


def run_operator(
    lookup: Lookup, leaves: Leaves, indices: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """The kernels' output, whatever dispatch would choose."""
    padding_idx = -1 if lookup.padding_idx is None else lookup.padding_idx % lookup.num_embeddings
    permutation = None if lookup.permutation is None else lookup.permutation.to(DEVICE)
    indices = (lookup.indices() if indices is None else indices).to(DEVICE)
    size = lookup.num_embeddings, lookup.embedding_dim
    weight = lookup.weight._replace(backend="cuda")
    if lookup.mode is None:
        output: Tensor = torch.ops.hfh.embedding(
            indices, *leaves[:3], permutation, *size, padding_idx, *weight
        )
        return output
    bags: Tensor = torch.ops.hfh.embedding_bag(
        indices, (lookup.offsets if offsets is None else offsets).to(DEVICE), *leaves[:3],
        permutation, leaves.per_sample_weights, *size, lookup.mode, lookup.include_last_offset,
        padding_idx, *weight,
    )[0]  # fmt: skip
    return bags


def run(lookup: Lookup) -> dict[str, Tensor]:
    """Everything, brought home."""
    leaves = lookup.leaves().map(on_device).require_grad()
    outcome = results(run_operator(lookup, leaves), leaves)
    return {name: result.cpu() for name, result in outcome.items()}


def on_device(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(DEVICE).requires_grad_(value.requires_grad)


def assert_matches_reference(lookup: Lookup) -> None:
    actual = run(lookup)
    leaves = lookup.leaves().double().require_grad()
    expected = results(lookup.run(leaves, "reference"), leaves)
    for name, result in actual.items():
        assert_matches(result, expected[name], lookup.dtype)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@each_lookup
def test_lookup(lookup: Lookup, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFH_EMULATOR_ORDER", order)
    assert_matches_reference(lookup)


@pytest.mark.parametrize("lookup", SWEEP[::2], ids=lambda lookup: lookup.name)
def test_deterministic_lookup(lookup: Lookup, poisoned_memory: None) -> None:
    """Integers are summed."""
    assert torch.are_deterministic_algorithms_enabled()
    assert_matches_reference(lookup)


def hot(dtype: torch.dtype, mode: str | None = None, **changes: Any) -> tuple[Lookup, Tensor]:
    """A look-up, one row of which is in half of the entries, the others falling off; and those."""
    generator = torch.Generator().manual_seed(0)
    size = 9000
    lookup = dataclasses.replace(
        EVERYTHING, dtype=dtype, shape=(size,), embedding_dim=64, mode=mode, bag_sizes=(25,) * 360,
        dense_rows=3, **changes,
    )  # fmt: skip
    tail = torch.rand(size, generator=generator).pow(4).mul(lookup.num_embeddings).long()
    is_hot = torch.rand(size, generator=generator) < 0.5
    return lookup, torch.where(is_hot, 77, tail)


def gradients_of_hot(lookup: Lookup, indices: Tensor, scale: Tensor) -> dict[str, Tensor]:
    leaves = lookup.leaves().map(on_device).require_grad()
    output = run_operator(lookup, leaves, indices)
    grad = grid(*output.shape, generator=torch.Generator().manual_seed(1))
    grad = (grad * scale[: len(output), None]).to(output)
    given = leaves.given()
    gradients = torch.autograd.grad(output, list(given.values()), grad)
    return {name: x.cpu() for name, x in zip(given, gradients, strict=True)}


@pytest.mark.parametrize("mode", [None, "sum", "mean"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_hot_rows(dtype: torch.dtype, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of entries, and so rows that begin in one and end in another."""
    monkeypatch.setenv("HFH_EMULATOR_PROCESSORS", "1")
    lookup, indices = hot(dtype, mode)
    ones = torch.ones(len(indices))
    actual = gradients_of_hot(lookup, indices, ones)
    leaves = lookup.leaves().double().require_grad()
    output = lookup.run(leaves, "reference", indices)
    grad = grid(*output.shape, generator=torch.Generator().manual_seed(1)).double()
    given = leaves.given()
    for name, expected in zip(
        given, torch.autograd.grad(output, list(given.values()), grad), strict=True
    ):
        assert_matches(actual[name], expected, dtype)


@pytest.mark.parametrize("mode", [None, "sum"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_order_of_a_sum(
    deterministic: bool, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float sums of numbers unlike in size depend on it, which shows what the test can see."""
    monkeypatch.setenv("HFH_EMULATOR_PROCESSORS", "1")
    lookup, indices = hot(FLOAT32, mode)
    scale = torch.logspace(-3, 3, len(indices))
    outcomes = []
    torch.use_deterministic_algorithms(deterministic)
    try:
        for order in ("forward", "reverse"):
            monkeypatch.setenv("HFH_EMULATOR_ORDER", order)
            outcomes.append(gradients_of_hot(lookup, indices, scale))
    finally:
        torch.use_deterministic_algorithms(False)
    there, back = outcomes
    same = all(torch.equal(there[name], back[name]) for name in there)
    assert same if deterministic else (not same or DEVICE == "cuda")


def test_more_than_there_are_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp goes from one stretch of a row to one of another."""
    monkeypatch.setenv("HFH_EMULATOR_PROCESSORS", "1")
    table = Lookup(
        name="", hash_spec=HashSpec(pool_size=2560, block=64), embedding_dim=600, shape=(120,)
    )
    assert_matches_reference(table)
    assert_matches_reference(dataclasses.replace(table, mode="mean", bag_sizes=(2,) * 100))


def test_largest_sum_of_integers(poisoned_memory: None) -> None:
    """All gradients go to one element, and all with one sign."""
    lookup = Lookup(
        name="", hash_spec=HashSpec(num_hashes=1, pool_size=1), reconstruction=Reconstruction(0),
        embedding_dim=1, scale=1.0,
    )  # fmt: skip
    leaves = lookup.leaves().map(on_device).require_grad()
    output = run_operator(lookup, leaves, torch.full((1000,), 7))
    (gradient,) = torch.autograd.grad(output.sum(), leaves.pool)
    assert gradient.abs().item() == 1000


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("lookup", [EVERYTHING, BAGS], ids=["rows", "bags"])
def test_deterministic_gradient_of_what_is_not_finite(
    lookup: Lookup, bad: float, poisoned_memory: None
) -> None:
    leaves = lookup.leaves().map(on_device).require_grad()
    output = run_operator(lookup, leaves)
    grad = torch.ones_like(output)
    grad.view(-1, grad.shape[-1])[1, 5] = bad
    given = leaves.given()
    for gradient in torch.autograd.grad(output, [given["pool"], given["dense"]], grad):
        assert gradient.isnan().all()


@pytest.mark.parametrize("lookup", [EVERYTHING, BAGS], ids=["rows", "bags"])
def test_deterministic_gradient_of_a_pool_that_is_not_finite(
    lookup: Lookup, poisoned_memory: None
) -> None:
    network = Reconstruction(depth=2, width=4, activation="tanh")
    spec = dataclasses.replace(lookup.hash_spec, num_hashes=4)
    lookup = dataclasses.replace(lookup, hash_spec=spec, reconstruction=network)
    leaves = lookup.leaves().map(on_device).require_grad()
    with torch.no_grad():
        leaves.pool.fill_(torch.nan)
    output = run_operator(lookup, leaves)
    (gradient,) = torch.autograd.grad(output, [leaves.pool], torch.ones_like(output))
    assert gradient.isnan().all()


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: torch.cat((x[:1], x))[1:],
    ],
    ids=["strided", "transposed", "unaligned"],
)
@pytest.mark.parametrize("lookup", [EVERYTHING, BAGS], ids=["rows", "bags"])
def test_layouts(lookup: Lookup, layout: Callable[[Tensor], Tensor]) -> None:
    # Rows of 70 columns would be unaligned wherever the tensors begin.
    lookup = dataclasses.replace(lookup, embedding_dim=64)
    expected = run(lookup)
    leaves = lookup.leaves().map(lambda tensor: layout(tensor.to(DEVICE))).require_grad()
    offsets = layout(lookup.offsets) if lookup.mode else None
    output = run_operator(lookup, leaves, layout(lookup.indices()), offsets)
    grad_output = layout(grid(*output.shape, generator=torch.Generator().manual_seed(1)).to(output))
    given = leaves.given()
    gradients = torch.autograd.grad(output, list(given.values()), grad_output)
    actual = {"output": output.detach(), **dict(zip(given, gradients, strict=True))}
    # Atomic additions come in any order.
    found = {name: x.cpu() for name, x in actual.items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_infinite_elements_beside_a_row() -> None:
    """Columns that a row does not have do not reach g's gradient."""
    lookup = Lookup(
        name="", hash_spec=HashSpec(pool_size=64, block=64), embedding_dim=6, shape=(4,)
    )
    leaves = lookup.leaves()
    leaves.pool[6:] = torch.inf
    leaves = leaves.map(on_device).require_grad()
    for gradient in torch.autograd.grad(run_operator(lookup, leaves).sum(), leaves[:2]):
        assert gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize(
    "operator", ["embedding", "embedding_backward", "embedding_bag", "embedding_bag_backward"]
)
@pytest.mark.parametrize("pool_dtype", [FLOAT32, BFLOAT16])
def test_opcheck(pool_dtype: torch.dtype, operator: str) -> None:
    sample = dataclasses.replace(SMALL_TABLE, pool_dtype=pool_dtype)
    arguments = map(on_device, operator_calls(sample)[operator])
    call = getattr(torch.ops.hfh, operator).default
    torch.library.opcheck(call, tuple(arguments), rtol=1e-4, atol=1e-4)
