"""``functional.embedding``: values, gradients, and what a caller may rely on besides."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction, dispatch, functional
from tests.lookups import (
    LOOKUPS,
    Leaves,
    Lookup,
    assert_matches_everything,
    results,
    run,
)
from tests.samples import BFLOAT16, FLOAT32, FLOAT64, assert_matches
from tests.sweep import BLOCKS

needs_extension = pytest.mark.skipif(
    dispatch.can_run("cpu", torch.ones(1)) is not None, reason="needs the compiled extension"
)
each_lookup = pytest.mark.parametrize("lookup", LOOKUPS, ids=lambda lookup: lookup.name)
DEFAULT = LOOKUPS[0]
EVERYTHING = LOOKUPS[1]


@needs_extension
@each_lookup
def test_lookups(lookup: Lookup, poisoned_memory: None) -> None:
    assert_matches_everything(lookup)


@st.composite
def random_lookups(draw: st.DrawFn) -> Lookup:
    dtype = draw(st.sampled_from((FLOAT32, FLOAT32, BFLOAT16, FLOAT64)))
    rounds = dtype == BFLOAT16
    block = draw(st.sampled_from(BLOCKS))
    num_slots = draw(st.integers(max(1, 32 // block), 100))
    has_window = draw(st.booleans())
    num_embeddings = draw(st.integers(1, 600))
    dim = draw(st.integers(8 if rounds else 1, 300))
    return Lookup(
        name="random",
        hash_spec=HashSpec(
            seed=draw(st.integers(0, 2**32 - 1)),
            num_hashes=draw(st.integers(4 if rounds else 2, 16)),
            pool_size=num_slots * block,
            block=block,
            window=draw(st.integers(1, num_slots)) * block if has_window else None,
            rows_per_window=draw(st.integers(1, 100)) if has_window else None,
        ),
        reconstruction=Reconstruction(
            draw(st.sampled_from((0, 2, 3) if rounds else (0, 1, 2, 3))),
            draw(st.integers(4 if rounds else 1, 16)),
            draw(st.sampled_from(("relu", "tanh"))),
        ),
        num_embeddings=num_embeddings,
        embedding_dim=dim,
        shape=tuple(draw(st.lists(st.integers(4 if rounds else 0, 20), min_size=1, max_size=2))),
        index_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        dtype=dtype,
        padding_idx=draw(st.none() | st.integers(-num_embeddings, num_embeddings - 1)),
        # Of few rows that cancel, bfloat16 leaves nothing to compare.
        dense_rows=0 if rounds else draw(st.integers(0, num_embeddings)),
        permuted=draw(st.booleans()),
        row_offset=draw(st.integers(0, 2**32 - num_embeddings)),
        col_offset=draw(st.integers(0, 2**32 - dim)),
    )


@needs_extension
@settings(deadline=None, derandomize=True, max_examples=20)
@given(random_lookups())
def test_random_lookups(lookup: Lookup) -> None:
    assert_matches_everything(lookup)


@needs_extension
@pytest.mark.parametrize("name", ["everything", "float64", "long rows, linear"])
def test_gradcheck(name: str) -> None:
    lookup = next(lookup for lookup in LOOKUPS if lookup.name == name)
    spec = dataclasses.replace(lookup.hash_spec, pool_size=8 * lookup.hash_spec.block)
    lookup = dataclasses.replace(
        lookup, dtype=FLOAT64, embedding_dim=9, num_embeddings=50, shape=(5,), hash_spec=spec
    )
    # Off the grid of the samples: finite differences must not meet relu's kink.
    leaves = [torch.randn_like(x, requires_grad=True) for x in lookup.leaves().given().values()]
    assert torch.autograd.gradcheck(lambda *x: lookup.run(Leaves(*x)), leaves, fast_mode=True)


@pytest.mark.parametrize("shape", [(), (4,), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_shape_and_dtype(shape: tuple[int, ...], index_dtype: torch.dtype, backend: str) -> None:
    lookup = dataclasses.replace(DEFAULT, shape=shape, index_dtype=index_dtype)
    output = lookup.run(lookup.leaves(), backend)
    assert output.shape == (*shape, 64)
    assert output.dtype == FLOAT32
    assert output.is_contiguous()


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        lambda x: x.t().contiguous().t(),
        lambda x: x[:1].expand_as(x),
    ],
    ids=["strided", "transposed", "expanded"],
)
def test_layouts(layout: Any, backend: str) -> None:
    lookup = EVERYTHING
    indices = layout(lookup.indices())
    leaves = lookup.leaves().require_grad()
    strided_leaves = lookup.leaves().map(
        lambda x: x.repeat_interleave(3, -1)[..., ::3].requires_grad_()
    )
    output = lookup.run(strided_leaves, backend, indices)
    expected = lookup.run(leaves, backend, indices.contiguous())
    assert torch.equal(output, expected)
    grad = layout(torch.randn(output.shape[:2]))[..., None].expand_as(output)
    for actual, wanted in zip(
        torch.autograd.grad(output, list(strided_leaves.given().values()), grad),
        torch.autograd.grad(expected, list(leaves.given().values()), grad.contiguous()),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_padding_is_zeros_without_a_gradient(backend: str) -> None:
    lookup = dataclasses.replace(DEFAULT, padding_idx=5)
    leaves = lookup.leaves().require_grad()
    output = lookup.run(leaves, backend, torch.tensor([5, 5, 6]))
    assert not output[:2].any()
    assert output[2].all()
    gradients = torch.autograd.grad(output[:2].sum(), [leaves.pool, leaves.theta])
    assert not any(gradient.any() for gradient in gradients)


def test_negative_padding_counts_from_the_end(backend: str) -> None:
    leaves = DEFAULT.leaves()
    from_end = dataclasses.replace(DEFAULT, padding_idx=-1)
    from_start = dataclasses.replace(DEFAULT, padding_idx=499)
    indices = torch.tensor([499, 0])
    output = from_end.run(leaves, backend, indices)
    assert not output[0].any()
    assert torch.equal(output, from_start.run(leaves, backend, indices))


def test_a_table_of_a_billion_rows_costs_the_pool(backend: str) -> None:
    lookup = dataclasses.replace(DEFAULT, num_embeddings=2**32)
    leaves = lookup.leaves().require_grad()
    indices = torch.tensor([0, 10**9, 2**31, 2**32 - 1])
    output = lookup.run(leaves, backend, indices)
    for i, index in enumerate(indices.tolist()):
        shard = dataclasses.replace(lookup, row_offset=index, num_embeddings=1)
        assert_matches(output[i], shard.table(leaves)[0].detach().double(), FLOAT32)
    gradients = torch.autograd.grad(output.sum(), [leaves.pool, leaves.theta])
    assert all(gradient.any() for gradient in gradients)


def test_learnable_scale(backend: str) -> None:
    leaves = DEFAULT.leaves()
    scale = torch.tensor(0.3, requires_grad=True)
    arguments = DEFAULT.table_arguments(leaves, backend) | {"scale": scale}
    output = functional.embedding(DEFAULT.indices(), leaves.pool, leaves.theta, **arguments)
    whole = dataclasses.replace(DEFAULT, scale=1.0).run(leaves, backend)
    torch.testing.assert_close(output, 0.3 * whole)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), scale)[0], whole.sum())


@needs_extension
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_slots", [20, 2**15 + 8], ids=["replicas", "rounds"])
@pytest.mark.parametrize("mode", [None, "mean", "max"])
def test_repeats_bit_for_bit(mode: str | None, num_slots: int, num_threads: int) -> None:
    lookup = dataclasses.replace(
        EVERYTHING,
        mode=mode,
        hash_spec=HashSpec(pool_size=32 * num_slots, block=32),
        shape=(2500,),
        bag_sizes=(30,) * 80,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        first = run(lookup)
        assert all(torch.equal(x, first[name]) for name, x in run(lookup).items())
    finally:
        torch.set_num_threads(before)
    leaves = lookup.leaves().double().require_grad()
    expected = results(lookup.run(leaves, "reference"), leaves)
    for name, result in first.items():
        assert_matches(result, expected[name], FLOAT32)


@needs_extension
def test_a_result_larger_than_the_caches() -> None:
    """Written past them, where that is worth while."""
    for dim in (64, 72, 51):
        lookup = dataclasses.replace(DEFAULT, shape=(20000,), embedding_dim=dim)
        leaves = lookup.leaves()
        assert_matches(lookup.run(leaves), lookup.table(leaves).double()[lookup.indices()], FLOAT32)


@needs_extension
def test_nan_in_the_pool_reaches_its_rows_only() -> None:
    lookup = dataclasses.replace(DEFAULT, dense_rows=50)
    leaves = lookup.leaves()
    leaves.pool[::100] = torch.nan
    output = lookup.run(leaves, "cpu")
    expected = lookup.table(leaves)[lookup.indices()].isnan()
    assert expected.any()
    assert not expected.all()
    assert torch.equal(output.isnan(), expected)


def test_second_derivative_is_right_or_refused(backend: str) -> None:
    lookup = dataclasses.replace(EVERYTHING, reconstruction=Reconstruction(activation="tanh"))
    leaves = lookup.leaves().require_grad()
    output = lookup.run(leaves, backend)
    (grad,) = torch.autograd.grad(output.square().sum(), leaves.pool, create_graph=True)
    if backend == "reference":
        assert torch.autograd.grad(grad.square().sum(), leaves.theta)[0].any()
    else:
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(grad.square().sum(), leaves.theta)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.tensor([3, 500])}, IndexError, r"indices .*num_embeddings=500.* 500"),
        ({"input": torch.tensor([3, -1])}, IndexError, r"indices .*num_embeddings=500.* -1"),
        ({"input": torch.ones(3)}, TypeError, r"indices must be int32 or int64, received"),
        ({"padding_idx": 500}, ValueError, r"padding_idx .*num_embeddings=500; received 500"),
        ({"padding_idx": -501}, ValueError, r"padding_idx .*received -501"),
        ({"max_norm": 1.0}, ValueError, r"max_norm must be None: .*not stored; received 1.0"),
        ({"scale_grad_by_freq": True}, ValueError, r"scale_grad_by_freq must be False: a pool"),
        ({"sparse": True}, ValueError, r"sparse must be False: .*small and dense"),
        ({"num_embeddings": -1}, ValueError, r"num_embeddings .*received -1"),
        ({"embedding_dim": -1}, ValueError, r"embedding_dim .*received -1"),
        ({"num_embeddings": 2**32 + 1}, ValueError, r"2\*\*32.*4294967297"),
        ({"dense": torch.ones(501, 64)}, ValueError, r"dense must have shape .*501, 64"),
        ({"dense": torch.ones(3, 63)}, ValueError, r"dense must have shape .*3, 63"),
        ({"dense": torch.ones(64)}, ValueError, r"dense must have shape .*64"),
        ({"dense": torch.ones(3, 64).double()}, TypeError, r"dense must have pool's dtype"),
        ({"permutation": torch.arange(499)}, ValueError, r"permutation must have .*500.*499"),
        ({"permutation": torch.arange(500).int()}, TypeError, r"permutation must be int64"),
        ({"permutation": torch.arange(500) + 1}, IndexError, r"permutation must be in .* 500"),
        ({"scale": torch.ones(1)}, ValueError, r"scale .* received shape \[1\]"),
        (
            {"scale": torch.tensor(2.0), "dense": torch.ones(3, 64)},
            ValueError,
            "scale must be a float beside dense rows",
        ),
        ({"pool": torch.ones(32)}, ValueError, r"pool .*640.* received 32"),
        ({"theta": torch.ones(24)}, ValueError, r"theta must have shape \[25\].*24"),
    ],
    ids=str,
)
def test_invalid(
    changes: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    leaves = DEFAULT.leaves()
    arguments: dict[str, Any] = {
        "input": torch.tensor([499]),
        "pool": leaves.pool,
        "theta": leaves.theta,
        **DEFAULT.table_arguments(leaves, backend),
    }
    functional.embedding(**arguments)
    with pytest.raises(error, match=message):
        functional.embedding(**{**arguments, **changes})


@needs_extension
@pytest.mark.parametrize("name", ["pool", "theta", "input", "dense", "permutation"])
def test_another_device(name: str) -> None:
    leaves = EVERYTHING.leaves()
    tensors: dict[str, Tensor | None] = {
        "input": EVERYTHING.indices(),
        "pool": leaves.pool,
        "theta": leaves.theta,
        "dense": leaves.dense,
        "permutation": EVERYTHING.permutation,
    }
    tensor = tensors[name]
    assert tensor is not None
    tensors[name] = tensor.to("meta")
    arguments: dict[str, Any] = {**EVERYTHING.table_arguments(leaves, "auto"), **tensors}
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        functional.embedding(**arguments)
