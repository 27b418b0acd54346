"""Layers and inputs that every way of running the operators is tried on, and what is expected.

SAMPLES are few and unlike each other; tests/sweep.py has the long, systematic list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction, functional
from hfh_kernels.ops.library import Weight
from tests.tolerances import TOLERANCE, relative_error

AnySample = TypeVar("AnySample", bound="Sample")
RELU_NETWORK = Reconstruction(depth=2, width=4, activation="relu")


class Arguments(NamedTuple):
    """The tensors of one call."""

    input: Tensor
    pool: Tensor
    theta: Tensor
    bias: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        bias = None if self.bias is None else function(self.bias)
        return Arguments(function(self.input), function(self.pool), function(self.theta), bias)

    def double(self) -> Arguments:
        return self.map(Tensor.double)

    def require_grad(self) -> Arguments:
        """Leaves that share these tensors' memory."""
        return self.map(lambda tensor: tensor.detach().requires_grad_())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A layer, where it lies in its virtual weight, and the shape and dtypes of a call."""

    name: str
    hash_spec: HashSpec
    reconstruction: Reconstruction = RELU_NETWORK
    batch: tuple[int, ...] = (5,)
    in_features: int = 70
    out_features: int = 37
    dtype: torch.dtype = torch.float32
    pool_dtype: torch.dtype = torch.float32
    theta_dtype: torch.dtype = torch.float32
    row_offset: int = 0
    col_offset: int = 0
    scale: float = 0.7
    has_bias: bool = True

    @property
    def weight(self) -> Weight:
        """The operators' trailing arguments."""
        return Weight(
            seed=self.hash_spec.seed,
            num_hashes=self.hash_spec.num_hashes,
            block=self.hash_spec.block,
            window=self.hash_spec.window or 0,
            rows_per_window=self.hash_spec.rows_per_window or 0,
            depth=self.reconstruction.depth,
            width=self.reconstruction.width,
            activation=self.reconstruction.activation,
            scale=self.scale,
            row_offset=self.row_offset,
            col_offset=self.col_offset,
        )

    def arguments(self) -> Arguments:
        generator = torch.Generator().manual_seed(0)
        num_parameters = self.reconstruction.num_parameters(self.hash_spec.num_hashes)
        return Arguments(
            input=grid(*self.batch, self.in_features, generator=generator).to(self.dtype),
            pool=grid(self.hash_spec.pool_size, generator=generator).to(self.pool_dtype),
            theta=grid(num_parameters, generator=generator).div(2).to(self.theta_dtype),
            bias=grid(self.out_features, generator=generator).to(self.dtype)
            if self.has_bias
            else None,
        )

    def grad_output(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return grid(*self.batch, self.out_features, generator=generator).to(self.dtype)

    def linear(self, arguments: Arguments, backend: str = "cpu") -> Tensor:
        return functional.linear(
            *arguments,
            out_features=self.out_features,
            hash_spec=self.hash_spec,
            reconstruction=self.reconstruction,
            scale=self.scale,
            row_offset=self.row_offset,
            col_offset=self.col_offset,
            backend=backend,
        )

    def materialize(self, arguments: Arguments, backend: str = "cpu") -> Tensor:
        return functional.materialize(
            arguments.pool,
            arguments.theta,
            self.out_features,
            self.in_features,
            hash_spec=self.hash_spec,
            reconstruction=self.reconstruction,
            scale=self.scale,
            row_offset=self.row_offset,
            col_offset=self.col_offset,
            backend=backend,
        )

    def in_dtype(self: AnySample, dtype: torch.dtype) -> AnySample:
        """The same with every tensor in `dtype`."""
        return dataclasses.replace(self, dtype=dtype, pool_dtype=dtype, theta_dtype=dtype)


def grid(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal numbers rounded to multiples of 1/32.

    They are exact in bfloat16, and g's hidden sums of them exact in float32, so these fall on the
    side of relu's kink where they fall in float64.
    """
    numbers = torch.randn(shape, generator=generator)
    return numbers.mul_(32).round_().clamp_(-127, 127).div_(32)


def differentiate(output: Tensor, arguments: Arguments, grad_output: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of each tensor that requires one, by name."""
    leaves = {
        name: tensor
        for name, tensor in arguments._asdict().items()
        if tensor is not None and tensor.requires_grad
    }
    gradients = torch.autograd.grad(
        output, list(leaves.values()), grad_output, materialize_grads=True
    )
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def run(sample: Sample, arguments: Arguments, backend: str = "cpu") -> dict[str, Tensor]:
    """:func:`differentiate` of the sample's linear."""
    leaves = arguments.require_grad()
    output = sample.linear(leaves, backend)
    return differentiate(output, leaves, sample.grad_output().to(output.dtype))


def assert_matches(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """`actual`, computed in `dtype`, against the reference in float64."""
    assert expected.dtype == torch.float64
    tolerance = max(TOLERANCE[dtype], TOLERANCE[actual.dtype])
    assert relative_error(actual, expected) <= tolerance
    if expected.numel():
        # One wrong element among many would hide in the norm.
        error = (actual.double() - expected).abs().max()
        assert error <= 2 * tolerance * expected.abs().max()


def assert_matches_reference(sample: Sample) -> None:
    arguments = sample.arguments()
    actual = run(sample, arguments)
    expected = run(sample, arguments.double(), backend="reference")
    assert actual.keys() == expected.keys()
    dtypes = arguments._asdict() | {"output": arguments.input}
    for name, result in actual.items():
        assert result.dtype == dtypes[name].dtype, name
        assert_matches(result, expected[name], sample.dtype)


BFLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64

SAMPLES = [
    Sample(
        name="default",
        hash_spec=HashSpec(seed=1, num_hashes=4, pool_size=640, block=32),
    ),
    Sample(
        name="hashednets",
        hash_spec=HashSpec(seed=2**32 - 1, num_hashes=1, pool_size=97),
        reconstruction=Reconstruction(depth=0),
        batch=(2, 3),
    ),
    Sample(
        name="mix",
        hash_spec=HashSpec(seed=3, num_hashes=4, pool_size=1024, block=64),
        reconstruction=Reconstruction(depth=1),
        batch=(1,),
        has_bias=False,
    ),
    Sample(
        name="deep tanh in a window, vector",
        hash_spec=HashSpec(
            seed=4, num_hashes=3, pool_size=800, block=16, window=160, rows_per_window=8
        ),
        reconstruction=Reconstruction(depth=3, width=5, activation="tanh"),
        batch=(),
    ),
    Sample(
        name="past 2**31, unaligned",
        hash_spec=HashSpec(seed=5, num_hashes=2, pool_size=512, block=128),
        reconstruction=Reconstruction(width=8),
        batch=(64,),
        row_offset=2**32 - 37,
        col_offset=2**31 + 61,
    ),
    Sample(
        name="generic shape, to the last column",
        hash_spec=HashSpec(seed=6, num_hashes=16, pool_size=300, block=4),
        reconstruction=Reconstruction(depth=3, width=16),
        row_offset=2**31 - 20,
        col_offset=2**32 - 70,
    ),
    Sample(
        name="bfloat16",
        hash_spec=HashSpec(seed=7, num_hashes=4, pool_size=640, block=64),
        batch=(33,),
        dtype=BFLOAT16,
        pool_dtype=BFLOAT16,
    ),
    Sample(
        name="bfloat16 pool and theta, block 2",
        hash_spec=HashSpec(seed=8, num_hashes=8, pool_size=400, block=2),
        reconstruction=Reconstruction(width=3, activation="tanh"),
        batch=(130,),
        pool_dtype=BFLOAT16,
        theta_dtype=BFLOAT16,
    ),
    Sample(
        name="bfloat16 activations",
        hash_spec=HashSpec(seed=9, num_hashes=2, pool_size=640, block=16),
        batch=(3,),
        dtype=BFLOAT16,
        col_offset=7,
    ),
    Sample(
        name="float64",
        hash_spec=HashSpec(seed=10, num_hashes=5, pool_size=256, block=8),
        reconstruction=Reconstruction(depth=3, width=4, activation="tanh"),
        dtype=FLOAT64,
        pool_dtype=FLOAT64,
        theta_dtype=FLOAT64,
    ),
    Sample(
        name="no samples",
        hash_spec=HashSpec(pool_size=64, block=8),
        batch=(0,),
    ),
    Sample(
        name="no inputs",
        hash_spec=HashSpec(pool_size=64, block=8),
        in_features=0,
    ),
    Sample(
        name="no outputs",
        hash_spec=HashSpec(pool_size=64, block=8),
        out_features=0,
    ),
]
