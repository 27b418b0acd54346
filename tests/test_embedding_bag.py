"""``functional.embedding_bag``: values, gradients, and what a caller may rely on besides."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfh_kernels import HashSpec, Reconstruction, dispatch, functional
from tests.lookups import BAGS, LOOKUPS, Leaves, Lookup, assert_matches_everything, results, run
from tests.samples import BFLOAT16, FLOAT64, assert_matches
from tests.test_embedding import random_lookups

needs_extension = pytest.mark.skipif(
    dispatch.can_run("cpu", torch.ones(1)) is not None, reason="needs the compiled extension"
)
DEFAULT = dataclasses.replace(LOOKUPS[0], mode="sum")
EVERYTHING = dataclasses.replace(LOOKUPS[1], mode="sum", weighted=True)
# What sums have limits for: rows before g's last layer, rows hashed at once, rows waiting.
LONG_BAGS = [(33, 0, 31, 32, 64, 65), (127, 129, 128, 1), (2, 513, 511, 1100)]
# Of whole blocks, which are added up before g's last layer; every network that differs there.
WHOLE_BLOCKS = [
    Lookup(
        name="window",
        hash_spec=HashSpec(
            seed=1, num_hashes=4, pool_size=4096, block=64, window=512, rows_per_window=8
        ),
        embedding_dim=128,
        row_offset=5,
        col_offset=192,
    ),
    Lookup(
        name="wide, long blocks, dense rows",
        hash_spec=HashSpec(seed=2, num_hashes=2, pool_size=4096, block=256),
        reconstruction=Reconstruction(width=8),
        embedding_dim=768,
        dense_rows=40,
        padding_idx=3,
    ),
    Lookup(
        name="deep relu",
        hash_spec=HashSpec(seed=3, num_hashes=3, pool_size=640, block=32),
        reconstruction=Reconstruction(depth=3, width=4),
        embedding_dim=64,
    ),
    Lookup(
        name="deep tanh in a window",
        hash_spec=HashSpec(
            seed=4, num_hashes=4, pool_size=2048, block=64, window=256, rows_per_window=4
        ),
        reconstruction=Reconstruction(depth=3, width=5, activation="tanh"),
        embedding_dim=64,
    ),
    Lookup(
        name="hashednets",
        hash_spec=HashSpec(seed=5, num_hashes=1, pool_size=640, block=32),
        reconstruction=Reconstruction(depth=0),
        embedding_dim=96,
    ),
    Lookup(
        name="linear",
        hash_spec=HashSpec(seed=6, num_hashes=4, pool_size=1280, block=128),
        reconstruction=Reconstruction(depth=1),
        embedding_dim=128,
    ),
]


@needs_extension
@pytest.mark.parametrize("lookup", BAGS, ids=lambda lookup: lookup.name)
def test_bags(lookup: Lookup, poisoned_memory: None) -> None:
    assert_matches_everything(lookup)


@needs_extension
@pytest.mark.parametrize("bag_sizes", LONG_BAGS, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("base", [LOOKUPS[0], LOOKUPS[1]], ids=lambda lookup: lookup.name)
def test_long_bags(base: Lookup, weighted: bool, bag_sizes: tuple[int, ...]) -> None:
    assert_matches_everything(
        dataclasses.replace(base, mode="sum", weighted=weighted, bag_sizes=bag_sizes)
    )


@needs_extension
@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False)], ids=str
)
@pytest.mark.parametrize("base", WHOLE_BLOCKS, ids=lambda lookup: lookup.name)
def test_sums_of_whole_blocks(base: Lookup, mode: str, weighted: bool) -> None:
    assert_matches_everything(dataclasses.replace(base, mode=mode, weighted=weighted))


@needs_extension
@pytest.mark.parametrize("embedding_dim", [64, 70], ids=["whole blocks", "parts of blocks"])
def test_mean_of_bfloat16_without_padding(embedding_dim: int) -> None:
    lookup = next(lookup for lookup in BAGS if lookup.name == "mean, bfloat16")
    lookup = dataclasses.replace(lookup, embedding_dim=embedding_dim, bag_sizes=(4, 90, 0, 2))
    assert lookup.padding_idx in lookup.indices()[4:94]
    assert_matches_everything(lookup)


@needs_extension
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("base", [*LOOKUPS[:2], *WHOLE_BLOCKS], ids=lambda lookup: lookup.name)
def test_sums_keep_what_is_not_finite(base: Lookup, weighted: bool, number: float) -> None:
    lookup = dataclasses.replace(base, mode="sum", weighted=weighted, bag_sizes=(1, 40, 3, 2, 9))
    spoilt = 0
    for element in (0, 77, 501):
        leaves = lookup.leaves()
        leaves.pool[element] = number
        expected = lookup.run(leaves.double(), "reference")
        output = lookup.run(leaves).double()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(output), kind(expected))
        finite = expected.isfinite()
        assert_matches(output[finite], expected[finite], lookup.dtype)
        assert finite.any()
        spoilt += int((~finite).sum())
    assert spoilt


@st.composite
def random_bags(draw: st.DrawFn) -> Lookup:
    lookup = draw(random_lookups())
    mode = draw(st.sampled_from(("sum", "mean", "max")))
    rounds = lookup.dtype == BFLOAT16
    return dataclasses.replace(
        lookup,
        mode=mode,
        weighted=mode == "sum" and not rounds and draw(st.booleans()),
        # A bag longer than what is read at once among them.
        bag_sizes=tuple(draw(st.lists(st.sampled_from((0, 1, 3, 30, 700)), max_size=9))),
        include_last_offset=draw(st.booleans()),
        padding_idx=None if rounds else lookup.padding_idx,
    )


@needs_extension
@settings(deadline=None, derandomize=True, max_examples=20)
@given(random_bags())
def test_random_bags(lookup: Lookup) -> None:
    assert_matches_everything(lookup)


@needs_extension
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_gradcheck(mode: str) -> None:
    lookup = dataclasses.replace(
        EVERYTHING,
        mode=mode,
        weighted=mode == "sum",
        dtype=FLOAT64,
        embedding_dim=9,
        hash_spec=HashSpec(pool_size=256, block=32),
        bag_sizes=(3, 0, 2),
    )
    leaves = [torch.randn_like(x, requires_grad=True) for x in lookup.leaves().given().values()]

    def bags(*tensors: torch.Tensor) -> torch.Tensor:
        return lookup.run(Leaves(**dict(zip(lookup.leaves().given(), tensors, strict=True))))

    assert torch.autograd.gradcheck(bags, leaves, fast_mode=True)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("shape", [(4, 5), (0, 5), (4, 0), (3, 1)])
def test_two_dimensions(shape: tuple[int, int], mode: str, backend: str) -> None:
    leaves = DEFAULT.leaves().require_grad()
    arguments = DEFAULT.table_arguments(leaves, backend) | {"mode": mode}
    indices = torch.arange(shape[0] * shape[1]).view(shape) % 7
    for include_last_offset in (False, True):
        output = functional.embedding_bag(
            indices, leaves.pool, leaves.theta, include_last_offset=include_last_offset, **arguments
        )
        expected = torch.nn.functional.embedding_bag(
            indices.reshape(-1),
            DEFAULT.table(leaves),
            torch.arange(shape[0]) * shape[1],
            mode=mode,
        )
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_two_dimensions_with_weights(backend: str) -> None:
    leaves = DEFAULT.leaves()
    arguments = DEFAULT.table_arguments(leaves, backend) | {"mode": "sum"}
    indices, weights = torch.arange(6).view(2, 3), torch.randn(2, 3, requires_grad=True)
    output = functional.embedding_bag(
        indices, leaves.pool, leaves.theta, per_sample_weights=weights, **arguments
    )
    expected = (weights[..., None] * DEFAULT.table(leaves)[indices]).sum(1)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(output.sum(), weights)
    torch.testing.assert_close(
        gradient, DEFAULT.table(leaves)[indices].sum(-1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_padding_is_left_out(mode: str, backend: str) -> None:
    lookup = dataclasses.replace(DEFAULT, mode=mode, padding_idx=9, bag_sizes=(4, 2, 1))
    leaves = lookup.leaves()
    table = lookup.table(leaves)
    output = lookup.run(leaves, backend, torch.tensor([9, 3, 9, 4, 9, 9, 8]))
    expected = getattr(torch, "amax" if mode == "max" else mode)(table[[3, 4]], 0)
    torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)
    assert not output[1].any()
    torch.testing.assert_close(output[2], table[8], rtol=1e-4, atol=1e-5)


def test_the_first_maximum_gets_the_gradient(backend: str) -> None:
    """As in torch, where indices repeat and where rows are equal."""
    lookup = dataclasses.replace(DEFAULT, mode="max", dense_rows=3, bag_sizes=(4, 3))
    leaves = lookup.leaves()
    assert leaves.dense is not None
    leaves.dense.fill_(100.0)
    leaves = leaves.require_grad()
    output = lookup.run(leaves, backend, torch.tensor([7, 1, 0, 1, 2, 2, 0]))
    (gradient,) = torch.autograd.grad(output.sum(), leaves.given()["dense"])
    assert torch.equal(gradient, torch.tensor([0.0, 1.0, 1.0])[:, None].expand(3, 64))


@needs_extension
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_winners(mode: str) -> None:
    """The operator's second result: ranks, as a gradient needs them."""
    lookup = dataclasses.replace(EVERYTHING, mode=mode, weighted=False)
    leaves = lookup.leaves()
    output, winners = torch.ops.hfh.embedding_bag(
        lookup.indices(), lookup.offsets, leaves.pool, leaves.theta, leaves.dense,
        lookup.permutation, None, 500, 70, mode, False, 497, *lookup.weight,
    )  # fmt: skip
    if mode == "sum":
        assert winners.shape == (0, 70)
        return
    permutation = lookup.permutation
    assert permutation is not None
    by_rank = lookup.table(leaves)[permutation.argsort()]
    empty = winners < 0
    assert torch.equal(empty, (output == 0).all(1, keepdim=True).expand_as(empty))
    expected = by_rank.gather(0, winners.clamp(min=0)).masked_fill(empty, 0)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64])
def test_offsets_and_indices_of_two_dtypes(offset_dtype: torch.dtype, backend: str) -> None:
    leaves = DEFAULT.leaves()
    arguments = DEFAULT.table_arguments(leaves, backend) | {"mode": "sum"}
    offsets = DEFAULT.offsets.to(offset_dtype)
    output = functional.embedding_bag(
        DEFAULT.indices().int(), leaves.pool, leaves.theta, offsets, **arguments
    )
    assert torch.equal(output, DEFAULT.run(leaves, backend))


def test_entries_behind_the_last_offset_are_in_no_bag(backend: str) -> None:
    lookup = dataclasses.replace(EVERYTHING, include_last_offset=True)
    leaves = lookup.leaves().require_grad()
    arguments = lookup.table_arguments(leaves, backend) | {"mode": "sum"}
    output = functional.embedding_bag(
        lookup.indices(),
        leaves.pool,
        leaves.theta,
        torch.tensor([0, 2, 5]),
        include_last_offset=True,
        per_sample_weights=leaves.per_sample_weights,
        **arguments,
    )
    assert output.shape == (2, 70)
    gradient = results(output, leaves)["per_sample_weights"]
    assert not gradient[5:].any()
    assert gradient[:5].any()


def test_second_derivative_is_right_or_refused(backend: str) -> None:
    leaves = EVERYTHING.leaves().require_grad()
    weights = leaves.given()["per_sample_weights"]
    output = EVERYTHING.run(leaves, backend)
    (grad,) = torch.autograd.grad(output.square().sum(), weights, create_graph=True)
    if backend == "reference":
        assert torch.autograd.grad(grad.square().sum(), leaves.pool)[0].any()
    else:
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(grad.square().sum(), leaves.pool)


@needs_extension
def test_float64_and_the_reference_agree_to_rounding() -> None:
    lookup = next(lookup for lookup in BAGS if lookup.name == "mean, float64")
    for name, result in run(lookup).items():
        assert_matches(result, run(lookup, "reference")[name], FLOAT64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.tensor([3, 500, 1])}, IndexError, r"indices .*num_embeddings=500.* 500"),
        ({"input": torch.ones(3)}, TypeError, r"indices must be int32 or int64"),
        ({"input": torch.tensor([[3]])}, ValueError, "offsets must be None for a 2-d input"),
        ({"input": torch.tensor(3)}, ValueError, r"input must be 1-d or 2-d, received shape \[\]"),
        ({"offsets": None}, ValueError, r"offsets must be given for an input of shape \[3\]"),
        ({"offsets": torch.tensor([1, 2])}, ValueError, r"offsets must start at 0.* received .*1"),
        ({"offsets": torch.tensor([0, 2, 1])}, ValueError, r"offsets must .*not decrease"),
        ({"offsets": torch.tensor([0, 4])}, ValueError, r"not exceed the 3 indices; received .*4"),
        ({"offsets": torch.tensor([[0]])}, ValueError, r"offsets must be 1-d, received"),
        ({"offsets": torch.tensor([0.0])}, TypeError, r"offsets must be int32 or int64"),
        (
            {"offsets": torch.tensor([], dtype=torch.int64), "include_last_offset": True},
            ValueError,
            "offsets must not be empty with include_last_offset",
        ),
        ({"mode": "min"}, ValueError, r"mode must be 'sum', 'mean' or 'max', received 'min'"),
        (
            {"mode": "mean", "per_sample_weights": torch.ones(3)},
            ValueError,
            "per_sample_weights must be None unless mode is 'sum'",
        ),
        (
            {"per_sample_weights": torch.ones(2)},
            ValueError,
            r"per_sample_weights must have input's shape \[3\], received \[2\]",
        ),
        (
            {"per_sample_weights": torch.ones(3).bfloat16()},
            TypeError,
            "per_sample_weights must have pool's dtype",
        ),
        ({"mode": "max", "scale": torch.tensor(1.0)}, ValueError, "scale must be a float where"),
        ({"padding_idx": 500}, ValueError, r"padding_idx .*received 500"),
        ({"max_norm": 1.0}, ValueError, "max_norm must be None"),
        ({"scale_grad_by_freq": True}, ValueError, "scale_grad_by_freq must be False"),
        ({"sparse": True}, ValueError, "sparse must be False"),
        ({"dense": torch.ones(501, 64)}, ValueError, r"dense must have shape .*501, 64"),
    ],
    ids=str,
)
def test_invalid(
    changes: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    leaves = DEFAULT.leaves()
    arguments: dict[str, Any] = {
        "input": torch.tensor([499, 0, 4]),
        "pool": leaves.pool,
        "theta": leaves.theta,
        "offsets": torch.tensor([0, 2]),
        **DEFAULT.table_arguments(leaves, backend),
        "mode": "sum",
    }
    functional.embedding_bag(**arguments)
    with pytest.raises(error, match=message):
        functional.embedding_bag(**{**arguments, **changes})
