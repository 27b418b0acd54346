"""Triton's embedding_bag against the reference, on a GPU or interpreted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import HashSpec, functional
from hfh_kernels.nn import HFHEmbeddingBag, Pool
from tests.lookups import (
    BAGS,
    LOOKUPS,
    Leaves,
    Lookup,
    assert_matches_reference,
    bag_arguments,
    operator_calls,
    results,
    run,
)
from tests.samples import BFLOAT16, FLOAT32, FLOAT64
from tests.test_triton_embedding import (
    FLOAT16,
    SMALL_TABLE,
    by_message,
    compile_anew,  # noqa: F401  (a fixture)
    few_programs,  # noqa: F401  (a fixture)
    on_device,
)
from tests.triton_device import DEVICE, needs_triton

pytestmark = needs_triton
SIZES = (0, 3, 1, 0, 8, 0)
EVERYTHING = dataclasses.replace(LOOKUPS[1], mode="sum", weighted=True, bag_sizes=SIZES)
MODES = (("sum", False), ("sum", True), ("mean", False), ("max", False))

# Every mode of every kind of table; then every dtype, number of bags and of columns.
SWEEP = [
    *[
        dataclasses.replace(
            lookup,
            embedding_dim=min(lookup.embedding_dim, 140),
            bag_sizes=SIZES if lookup.bag_sizes else (),
        )
        for lookup in BAGS
        if lookup.dtype == FLOAT32 and not lookup.name.endswith("one index")
    ],
    *[
        dataclasses.replace(
            EVERYTHING,
            name=f"{mode}, {weighted=}, {dtype}",
            mode=mode,
            weighted=weighted,
            dtype=dtype,
            dense_rows=250,
        )
        for dtype in (FLOAT16, BFLOAT16)
        for mode, weighted in MODES
    ],
    *[
        Lookup(
            name=f"{mode}, {weighted=}, {num_bags} bags, {dim} columns, {num_embeddings} rows",
            hash_spec=HashSpec(num_hashes=2, pool_size=1280, block=64),
            mode=mode,
            weighted=weighted,
            bag_sizes=(2,) * num_bags,
            num_embeddings=num_embeddings,
            embedding_dim=dim,
            dense_rows=num_embeddings if num_embeddings < 9 else 0,
            col_offset=dim,
        )
        for mode, weighted in MODES
        for num_bags, dim, num_embeddings in ((1, 1, 3), (8, 9, 2**32 - 1), (3, 130, 2**31 + 1))
    ],
]


@pytest.mark.parametrize("lookup", SWEEP, ids=lambda lookup: lookup.name)
def test_bags(lookup: Lookup) -> None:
    assert_matches_reference(lookup, "triton", DEVICE)


@pytest.mark.usefixtures("few_programs", "poisoned_memory")
# Every mode, of which there are four.
@pytest.mark.parametrize("lookup", SWEEP[::5], ids=lambda lookup: lookup.name)
def test_deterministic_bags(lookup: Lookup) -> None:
    """Integers are summed, so that gradients come out the same whatever adds first."""
    assert torch.are_deterministic_algorithms_enabled()
    assert_matches_reference(lookup, "triton", DEVICE)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.usefixtures("poisoned_memory")
def test_deterministic_gradient_of_what_is_not_finite(mode: str, bad: float) -> None:
    lookup = dataclasses.replace(EVERYTHING, mode=mode, weighted=False)
    leaves = lookup.leaves().map(on_device).require_grad()
    output = lookup.run(leaves, "triton")
    grad = torch.ones_like(output)
    grad[1, 5] = bad
    given = leaves.given()
    for gradient in torch.autograd.grad(output, [given["pool"], given["dense"]], grad):
        assert gradient.isnan().all()


def test_the_first_maximum_gets_the_gradient() -> None:
    """As in torch, where indices repeat and where rows are equal."""
    lookup = dataclasses.replace(EVERYTHING, mode="max", weighted=False, permuted=False)
    lookup = dataclasses.replace(lookup, dense_rows=3, padding_idx=None, bag_sizes=(4, 3))
    leaves = lookup.leaves().map(on_device)
    assert leaves.dense is not None
    leaves.dense.fill_(100.0)
    leaves = leaves.require_grad()
    output = lookup.run(leaves, "triton", torch.tensor([7, 1, 0, 1, 2, 2, 0]))
    (gradient,) = torch.autograd.grad(output.sum(), leaves.given()["dense"])
    assert torch.equal(gradient.cpu(), torch.tensor([0.0, 1.0, 1.0])[:, None].expand(3, 70))


def test_maxima_below_zero_and_infinite() -> None:
    lookup = dataclasses.replace(EVERYTHING, mode="max", weighted=False, permuted=False)
    lookup = dataclasses.replace(lookup, dense_rows=3, bag_sizes=(2, 1, 0))
    leaves = lookup.leaves().map(on_device)
    assert leaves.dense is not None
    leaves.dense.copy_(torch.tensor([-3.0, -2.0, -torch.inf])[:, None])
    arguments = (
        torch.tensor([0, 1, 2]), lookup.offsets, *leaves[:3], None, None, 500, 70, "max", False,
        -1, *lookup.weight,
    )  # fmt: skip
    output, winners = torch.ops.hfh.embedding_bag(*map(on_device, arguments))
    assert output[:, 0].tolist() == [-2.0, -torch.inf, 0.0]
    assert winners[:, 0].tolist() == [1, 2, -1]


def _look_up(
    lookup: Lookup, leaves: Leaves, backend: str, indices: Tensor, offsets: Tensor
) -> dict[str, Tensor]:
    assert lookup.mode is not None
    output = functional.embedding_bag(
        indices,
        leaves.pool,
        leaves.theta,
        offsets,
        mode=lookup.mode,
        per_sample_weights=leaves.per_sample_weights,
        include_last_offset=lookup.include_last_offset,
        **lookup.table_arguments(leaves, backend),
    )
    return {name: result.cpu() for name, result in results(output, leaves).items()}


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_entries_behind_the_last_offset_are_in_no_bag(mode: str) -> None:
    lookup = dataclasses.replace(
        EVERYTHING, mode=mode, weighted=mode == "sum", include_last_offset=True
    )
    leaves = lookup.leaves()
    indices, offsets = lookup.indices(), torch.tensor([0, 2, 5], dtype=torch.int32)
    expected = _look_up(lookup, leaves.require_grad(), "reference", indices, offsets)
    actual = _look_up(
        lookup,
        leaves.map(on_device).require_grad(),
        "triton",
        indices.long().to(DEVICE),
        offsets.to(DEVICE),
    )
    assert actual["output"].shape == (2, 70)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_layouts() -> None:
    """Every tensor with a stride."""

    def spread(tensor: Tensor) -> Tensor:
        return tensor.to(DEVICE).repeat_interleave(2, dim=-1)[..., ::2]

    actual = _look_up(
        EVERYTHING,
        EVERYTHING.leaves().map(spread).require_grad(),
        "triton",
        spread(EVERYTHING.indices()),
        spread(EVERYTHING.offsets),
    )
    # Atomic additions come in any order, here and below.
    expected = run(EVERYTHING, "triton", DEVICE)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("operator", ["embedding_bag", "embedding_bag_backward"])
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_opcheck(operator: str, mode: str) -> None:
    arguments = map(on_device, operator_calls(SMALL_TABLE, mode)[operator])
    call = getattr(torch.ops.hfh, operator).default
    torch.library.opcheck(call, tuple(arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.usefixtures("compile_anew")
def test_compiled_layer(mode: str) -> None:
    layer = HFHEmbeddingBag(50, 40, mode=mode, padding_idx=3, pool=Pool(640), dense_rows=4)
    layer = layer.to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    indices = torch.arange(12, device=DEVICE).view(3, 4)
    outcomes = []
    for call in (layer, compiled):
        output = call(indices)
        gradients = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        outcomes.append([output, *gradients])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels assert, and the device is lost")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indices": torch.tensor([3, 500, 1])}, IndexError, r"indices .*num_embeddings=500.* 500"),
        ({"offsets": torch.tensor([1, 2])}, ValueError, r"offsets must start at 0.* received .*1"),
        ({"offsets": torch.tensor([0, 2, 1])}, ValueError, r"offsets must .*not decrease"),
        ({"offsets": torch.tensor([0, 4])}, ValueError, r"not exceed the 3 indices; received .*4"),
    ],
    ids=by_message,
)
def test_out_of_range(changes: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _bag(changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mode": "min"}, ValueError, r"mode must be 'sum', 'mean' or 'max', received 'min'"),
        ({"mode": "max"}, ValueError, "per_sample_weights must be None unless mode is 'sum'"),
        ({"factors": torch.ones(2)}, ValueError, r"per_sample_weights must have the shape"),
        ({"factors": torch.ones(3).double()}, TypeError, "per_sample_weights must have pool's"),
        ({"offsets": torch.tensor([0.0])}, TypeError, "offsets must be int32 or int64"),
        ({"offsets": torch.tensor([[0]])}, ValueError, "offsets must be 1-d"),
        (
            {"pool": torch.ones(640, dtype=FLOAT64), "factors": None},
            TypeError,
            "pool must have one of the dtypes",
        ),
    ],
    ids=by_message,
)
def test_invalid(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _bag(changes)


def _bag(changes: dict[str, Any]) -> None:
    arguments = bag_arguments(EVERYTHING.leaves(), changes)
    torch.ops.hfh.embedding_bag(*map(on_device, arguments.values()), *EVERYTHING.weight)


def test_backward_needs_winners_of_the_shape() -> None:
    leaves = EVERYTHING.leaves().map(on_device)
    grad = torch.ones(2, 70, device=DEVICE)
    indices, offsets = (torch.tensor(x, device=DEVICE) for x in ([4, 5, 6], [0, 2]))
    for given, message in ((grad[:1], "grad must have shape"), (grad, "winners must be int64")):
        with pytest.raises(ValueError, match=message):
            torch.ops.hfh.embedding_bag_backward(
                given, torch.empty(0, 70, dtype=torch.int64, device=DEVICE), indices, offsets,
                *leaves[:3], None, None, 500, "max", False, -1, *EVERYTHING.weight,
            )  # fmt: skip
