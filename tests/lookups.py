"""Look-ups that every way of running the embedding operators is tried on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction, functional
from hfh_kernels.ops.library import Weight
from tests.samples import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    RELU_NETWORK,
    Sample,
    assert_matches,
    grid,
)


class Leaves(NamedTuple):
    """The tensors of one call that gradients can reach."""

    pool: Tensor
    theta: Tensor
    dense: Tensor | None = None
    per_sample_weights: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Leaves:
        return Leaves(**{name: function(tensor) for name, tensor in self.given().items()})

    def require_grad(self) -> Leaves:
        """Leaves that share these tensors' memory."""
        return self.map(lambda x: x.detach().requires_grad_())

    def double(self) -> Leaves:
        return self.map(Tensor.double)

    def given(self) -> dict[str, Tensor]:
        return {name: x for name, x in self._asdict().items() if x is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup:
    """A table, what is looked up in it, and, with a mode, in which bags."""

    name: str
    hash_spec: HashSpec
    reconstruction: Reconstruction = RELU_NETWORK
    num_embeddings: int = 500
    embedding_dim: int = 70
    shape: tuple[int, ...] = (6, 7)
    index_dtype: torch.dtype = torch.int64
    dtype: torch.dtype = FLOAT32
    padding_idx: int | None = None
    dense_rows: int = 0
    permuted: bool = False
    row_offset: int = 0
    col_offset: int = 0
    scale: float = 0.7
    mode: str | None = None
    bag_sizes: tuple[int, ...] = (0, 5, 1, 0, 17, 12, 7, 0)
    include_last_offset: bool = False
    weighted: bool = False

    @property
    def num_indices(self) -> int:
        return sum(self.bag_sizes) if self.mode else torch.Size(self.shape).numel()

    def indices(self) -> Tensor:
        """Some of them the first rows, the last, and padding."""
        generator = torch.Generator().manual_seed(2)
        indices = torch.randint(self.num_embeddings, (self.num_indices,), generator=generator)
        special = [0, self.num_embeddings - 1, self.padding_idx or 0, 1 % self.num_embeddings]
        indices[::5] = torch.tensor(special * len(indices))[: len(indices[::5])]
        indices %= self.num_embeddings
        return indices.view((-1,) if self.mode else self.shape).to(self.index_dtype)

    @functools.cached_property
    def offsets(self) -> Tensor:
        ends = torch.tensor((0, *self.bag_sizes)).cumsum(0)
        return (ends if self.include_last_offset else ends[:-1]).to(self.index_dtype)

    @functools.cached_property
    def permutation(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(3)
        return torch.randperm(self.num_embeddings, generator=generator) if self.permuted else None

    def leaves(self) -> Leaves:
        generator = torch.Generator().manual_seed(0)
        num_parameters = self.reconstruction.num_parameters(self.hash_spec.num_hashes)
        theta_dtype = FLOAT64 if self.dtype == FLOAT64 else FLOAT32
        dense = grid(self.dense_rows, self.embedding_dim, generator=generator).to(self.dtype)
        weights = grid(self.num_indices, generator=generator).to(self.dtype)
        return Leaves(
            grid(self.hash_spec.pool_size, generator=generator).to(self.dtype),
            grid(num_parameters, generator=generator).div(2).to(theta_dtype),
            dense if self.dense_rows else None,
            weights if self.weighted else None,
        )

    @property
    def weight(self) -> Weight:
        """The operators' trailing arguments."""
        spec, network = self.hash_spec, self.reconstruction
        return Weight(
            spec.seed, spec.num_hashes, spec.block, spec.window or 0, spec.rows_per_window or 0,
            network.depth, network.width, network.activation, self.scale, self.row_offset,
            self.col_offset,
        )  # fmt: skip

    def table_arguments(self, leaves: Leaves, backend: str) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "hash_spec": self.hash_spec,
            "reconstruction": self.reconstruction,
            "scale": self.scale,
            "row_offset": self.row_offset,
            "col_offset": self.col_offset,
            "padding_idx": self.padding_idx,
            "dense": leaves.dense,
            "permutation": _beside(leaves, self.permutation),
            "backend": backend,
        }

    def run(self, leaves: Leaves, backend: str = "cpu", indices: Tensor | None = None) -> Tensor:
        """The embedding, or with a mode the bags."""
        indices = _beside(leaves, self.indices() if indices is None else indices)
        arguments = self.table_arguments(leaves, backend)
        if self.mode is None:
            return functional.embedding(indices, leaves.pool, leaves.theta, **arguments)
        return functional.embedding_bag(
            indices,
            leaves.pool,
            leaves.theta,
            _beside(leaves, self.offsets),
            mode=self.mode,
            per_sample_weights=leaves.per_sample_weights,
            include_last_offset=self.include_last_offset,
            **arguments,
        )

    def table(self, leaves: Leaves) -> Tensor:
        """All of it, by the materialize reference: row i is what index i looks up."""
        rows = functional.materialize(
            leaves.pool,
            leaves.theta,
            self.num_embeddings,
            self.embedding_dim,
            hash_spec=self.hash_spec,
            reconstruction=self.reconstruction,
            scale=self.scale,
            row_offset=self.row_offset,
            col_offset=self.col_offset,
            backend="reference",
        )
        if leaves.dense is not None:
            rows = torch.cat((leaves.dense, rows[self.dense_rows :]))
        permutation = self.permutation
        return rows if permutation is None else rows[permutation]

    def run_torch(self, leaves: Leaves) -> Tensor:
        """torch's own operator on the table."""
        table = self.table(leaves)
        padding = None if self.padding_idx is None else self.padding_idx % self.num_embeddings
        if self.mode is None:
            if padding is not None:
                keep = torch.arange(self.num_embeddings) != padding
                table = table * keep[:, None]
            return torch.nn.functional.embedding(self.indices(), table, padding)
        return torch.nn.functional.embedding_bag(
            self.indices(),
            table,
            self.offsets,
            mode=self.mode,
            per_sample_weights=leaves.per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )


@overload
def _beside(leaves: Leaves, tensor: Tensor) -> Tensor: ...


@overload
def _beside(leaves: Leaves, tensor: Tensor | None) -> Tensor | None: ...


def _beside(leaves: Leaves, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(leaves.pool.device)


def results(output: Tensor, leaves: Leaves) -> dict[str, Tensor]:
    """The output and every gradient."""
    grad_output = grid(*output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    given = leaves.given()
    gradients = torch.autograd.grad(
        output, list(given.values()), grad_output, materialize_grads=True
    )
    return {"output": output.detach(), **dict(zip(given, gradients, strict=True))}


def run(lookup: Lookup, backend: str = "cpu", device: str = "cpu") -> dict[str, Tensor]:
    """Everything, computed on the device and brought home."""
    leaves = lookup.leaves().map(lambda tensor: tensor.to(device)).require_grad()
    outcome = results(lookup.run(leaves, backend), leaves)
    return {name: result.cpu() for name, result in outcome.items()}


def assert_matches_reference(lookup: Lookup, backend: str, device: str) -> dict[str, Tensor]:
    """A backend on a device against the reference in float64; returns the latter's."""
    actual = run(lookup, backend, device)
    leaves = lookup.leaves().double().require_grad()
    expected = results(lookup.run(leaves, "reference"), leaves)
    given = lookup.leaves().given()
    for name, result in actual.items():
        assert result.dtype == (lookup.dtype if name == "output" else given[name].dtype), name
        assert_matches(result, expected[name], lookup.dtype)
    return expected


def assert_matches_everything(lookup: Lookup) -> None:
    """The CPU's kernels against the reference, and that against torch on the whole table."""
    expected = assert_matches_reference(lookup, "cpu", "cpu")
    leaves = lookup.leaves().double().require_grad()
    by_torch = results(lookup.run_torch(leaves), leaves)
    torch.testing.assert_close(expected, by_torch, rtol=1e-9, atol=1e-9)


LOOKUPS = [
    Lookup(name="default", hash_spec=HashSpec(seed=1, pool_size=640, block=32), embedding_dim=64),
    Lookup(
        name="everything",
        hash_spec=HashSpec(seed=2, pool_size=640, block=32),
        index_dtype=torch.int32,
        padding_idx=-3,
        dense_rows=40,
        permuted=True,
    ),
    Lookup(
        name="hashednets",
        hash_spec=HashSpec(seed=2**32 - 1, num_hashes=1, pool_size=97),
        reconstruction=Reconstruction(depth=0),
        shape=(13,),
        padding_idx=1,
    ),
    Lookup(
        name="long rows, linear",
        hash_spec=HashSpec(seed=3, pool_size=2560, block=64),
        reconstruction=Reconstruction(depth=1),
        embedding_dim=1300,
        dense_rows=3,
    ),
    Lookup(
        name="deep tanh in a window, unaligned, last row",
        hash_spec=HashSpec(
            seed=4, num_hashes=3, pool_size=800, block=16, window=160, rows_per_window=8
        ),
        reconstruction=Reconstruction(depth=3, width=5, activation="tanh"),
        row_offset=2**32 - 500,
        col_offset=2**31 + 5,
    ),
    Lookup(
        name="bfloat16",
        hash_spec=HashSpec(seed=7, pool_size=640, block=64),
        dtype=BFLOAT16,
        shape=(90,),
        dense_rows=40,
        padding_idx=3,
    ),
    Lookup(
        name="float64",
        hash_spec=HashSpec(seed=10, num_hashes=5, pool_size=256, block=8),
        reconstruction=Reconstruction(depth=3, width=4, activation="tanh"),
        dtype=FLOAT64,
        dense_rows=9,
        permuted=True,
    ),
    Lookup(name="one index", hash_spec=HashSpec(pool_size=64, block=8), shape=()),
    Lookup(name="no indices", hash_spec=HashSpec(pool_size=64, block=8), shape=(3, 0)),
    Lookup(name="no columns", hash_spec=HashSpec(pool_size=64, block=8), embedding_dim=0),
]

BAGS = [
    dataclasses.replace(
        lookup,
        name=f"{mode}{', weighted' if weighted else ''}, {lookup.name}",
        mode=mode,
        weighted=weighted,
        include_last_offset=i % 2 == 1,
        bag_sizes=() if lookup.name == "no indices" else lookup.bag_sizes,
    )
    for i, lookup in enumerate(LOOKUPS)
    for mode, weighted in (("sum", False), ("sum", True), ("mean", False), ("max", False))
]


def operator_calls(sample: Sample, mode: str = "sum") -> dict[str, tuple[Any, ...]]:
    """The operators' arguments for a table that is `sample`'s weight, half of it dense."""
    rows, cols, weight = sample.out_features, sample.in_features, sample.weight
    arguments = sample.arguments()
    indices = torch.arange(2 * rows).view(2, rows) % max(1, rows)
    offsets = torch.tensor([0, rows // 2, rows // 2])
    dense = torch.randn(rows // 2, cols).to(sample.pool_dtype)
    factors = torch.randn(2 * rows).to(sample.pool_dtype) if mode == "sum" else None
    grad = torch.randn(2, rows, cols).to(sample.pool_dtype)
    bag_grad = torch.randn(3, cols).to(sample.pool_dtype)
    winners = torch.randint(-1, max(1, rows), (3 if mode == "max" else 0, cols))
    table = arguments.pool, arguments.theta, dense, torch.arange(rows).flip(0)
    leaves = [x.clone().requires_grad_() for x in table[:3]]
    padding = min(1, rows - 1)
    flat = indices.view(-1)
    differentiable = *leaves, table[3]
    return {
        "embedding": (indices, *differentiable, rows, cols, padding, *weight),
        "embedding_backward": (grad, indices, *table, rows, padding, *weight),
        "embedding_bag": (
            flat, offsets, *differentiable,
            None if factors is None else factors.clone().requires_grad_(),
            rows, cols, mode, False, padding, *weight,
        ),
        "embedding_bag_backward": (
            bag_grad, winners, flat, offsets, *table, factors, rows, mode, False, padding, *weight,
        ),
    }  # fmt: skip


def bag_arguments(leaves: Leaves, changes: dict[str, Any]) -> dict[str, Any]:
    """The arguments before the weight's of hfh::embedding_bag on a table of 500 x 70, by name."""
    return {
        "indices": torch.tensor([499, 0, 4]),
        "offsets": torch.tensor([0, 2]),
        "pool": leaves.pool,
        "theta": leaves.theta,
        "dense": leaves.dense,
        "permutation": None,
        "factors": torch.ones(3),
        "num_embeddings": 500,
        "embedding_dim": 70,
        "mode": "sum",
        "include_last_offset": False,
        "padding_idx": -1,
        **changes,
    }


def narrow_window(
    name: str, num_hashes: int, block: int, window: int | None, **options: Any
) -> Lookup:
    """A few rows, of which every three have a window, the first two of them dense."""
    spec = HashSpec(
        seed=block,
        num_hashes=num_hashes,
        pool_size=30 * block,
        block=block,
        window=window,
        rows_per_window=window and 3,
    )
    return Lookup(name=name, hash_spec=spec, shape=(9,), dense_rows=2, row_offset=block, **options)
