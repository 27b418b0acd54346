"""What the Triton launchers share: a checked virtual weight, and the buffers of its gradients."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from hfh_kernels.ops.library import Weight, require_same_device
from hfh_kernels.ops.materialize.reference import require_parameters, split_theta
from hfh_kernels.ops.tile import VirtualWeight
from hfh_kernels.ops.tile_gradients import Gradients
from hfh_kernels.spec import Reconstruction

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of activations, pool and theta."""

MAX_EXTENT = 2**31 - 2**16
"""Rows and columns are counted in int32, and tiles may reach beyond the last."""


def virtual_weight(
    pool: Tensor, theta: Tensor, rows: int, cols: int, weight: tuple[Any, ...]
) -> VirtualWeight:
    """The kernels' argument for a virtual weight of rows x cols, checked.

    Args:
        pool: [pool_size], theta: [num_parameters], each in one of DTYPES.
        weight: the fields of :class:`Weight`.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a shape, a device or a field of ``weight`` is invalid.
    """
    require_dtype("pool", pool)
    require_dtype("theta", theta)
    behind = fields(weight, pool.numel(), rows, cols)
    require_parameters(pool, theta, Weight(*weight).reconstruction(), weight[1])
    return VirtualWeight(pool.contiguous(), theta.contiguous(), *behind)


@functools.lru_cache(maxsize=4096)
def fields(weight: tuple[Any, ...], pool_size: int, rows: int, cols: int) -> tuple[Any, ...]:
    """The fields of VirtualWeight behind pool and theta, checked once for each layer."""
    given = Weight(*weight)
    if given.backend.startswith("cuda"):
        raise RuntimeError(f"backend {given.backend!r} cannot run: it has no such operator")
    spec = given.hash_spec(pool_size)
    network = given.reconstruction()
    given.require_coordinates(rows, cols)
    for name, extent in (("rows", rows), ("cols", cols)):
        if extent > MAX_EXTENT:
            raise ValueError(f"{name} must be at most {MAX_EXTENT} here, received {extent}")
    return (
        _signed(spec.seed),
        spec.pool_size // spec.block,
        (spec.window or spec.pool_size) // spec.block,
        _signed(spec.rows_per_window or 0),
        _signed(given.row_offset),
        _signed(given.col_offset),
        float(given.scale),
        # HashedNets' depth has no use for the others.
        tl.constexpr(spec.num_hashes if network.depth > 0 else 1),
        tl.constexpr(spec.block),
        tl.constexpr(spec.window is not None),
        tl.constexpr(network.depth),
        tl.constexpr(network.width),
        tl.constexpr(network.activation == "tanh"),
        tl.constexpr(network.num_parameters(spec.num_hashes)),
    )


def _signed(number: int) -> int:
    """A uint32 as the int32 of the same bits: kernels are compiled for each type of argument."""
    return number - 2**32 if number >= 2**31 else number


def require_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {DTYPES}, received {tensor.dtype}")


def require_inputs(**tensors: Tensor) -> None:
    """Raise unless each tensor has a dtype of the kernels and the device of the first."""
    (first_name, first), *others = tensors.items()
    require_dtype(first_name, first)
    for name, tensor in others:
        require_dtype(name, tensor)
        require_same_device(name, tensor, first_name, first)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the tensor's device, whatever the current one is."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def lead(virtual: VirtualWeight, tile_cols: int) -> int:
    """How far before the first column tiles begin, so that groups do not straddle blocks."""
    return int(virtual.col_offset % min(virtual.BLOCK.value, tile_cols))


def num_tiles(extent: int, size: int) -> int:
    """triton.cdiv, which takes microseconds outside a kernel."""
    return -(-extent // size)


def dot_precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """Of products of float32: TF32 where torch allows it, else three of them, which are as precise
    as one of float32 and use the matrix units too."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


class Sum:
    """A gradient, while kernels add to it: zeros in float32.

    Under torch.use_deterministic_algorithms it is a sum of integers, the same in any order: a term
    is added in units so small that an int64 just holds the largest sum there can be.

    Args:
        like: a tensor of the gradient's shape, dtype and device.
        num_terms: at most how many are added up.
        bound: a function that gives a number, float32 [], that no term exceeds; it is called where
            integers are summed.
    """

    def __init__(self, like: Tensor, num_terms: int, bound: Callable[[], Tensor]) -> None:
        self._dtype = like.dtype
        self._bound: Tensor | None = None
        self.is_fixed_point = torch.are_deterministic_algorithms_enabled()
        if self.is_fixed_point:
            # Twice: products of rounded numbers may exceed that of their bounds by a little.
            self._bound = 2 * bound()
            exponent = 62 - num_terms.bit_length() - torch.frexp(self._bound).exponent
            self.units = torch.ldexp(torch.ones_like(self._bound), exponent.clamp(-120, 120))
            self.total = like.new_zeros(like.shape, dtype=torch.int64)
        else:
            self.total = self.units = like.new_zeros(like.shape, dtype=torch.float32)

    def result(self) -> Tensor:
        """The gradient in its dtype."""
        total = self.total
        if self._bound is not None:
            total = torch.where(self._bound.isfinite(), total / self.units.double(), torch.nan)
        return total.to(self._dtype)


class GradientSums:
    """The gradients of pool and theta, while kernels add to them.

    Args:
        virtual: of the kernel.
        num_programs: along the kernel's first axis, the only one.
        num_terms: at most how many gradients of elements are added up.
        bound: a function that gives a number, float32 [], that no gradient of V exceeds, see Sum.
    """

    def __init__(
        self,
        virtual: VirtualWeight,
        num_programs: int,
        num_terms: int,
        bound: Callable[[], Tensor],
    ) -> None:
        theta = virtual.theta
        self._pool = Sum(virtual.pool, num_terms, lambda: bound() * _slope(virtual))
        self._theta = theta.new_zeros((num_programs, theta.numel()), dtype=torch.float32)
        self._theta_dtype = theta.dtype

    def argument(self) -> Gradients:
        """What the kernel receives."""
        pool = self._pool
        return Gradients(pool.total, self._theta, pool.units, tl.constexpr(pool.is_fixed_point))

    def result(self) -> tuple[Tensor, Tensor]:
        """The gradients of pool and theta, each in its dtype."""
        return self._pool.result(), self._theta.sum(0).to(self._theta_dtype)


def _slope(virtual: VirtualWeight) -> Tensor:
    """At most how much V changes with an element: the activations' slopes are at most 1."""
    theta = virtual.theta.float()
    network = Reconstruction(virtual.DEPTH.value, virtual.WIDTH.value)
    slopes = torch.eye(virtual.NUM_HASHES.value, device=theta.device)
    for weight, _ in split_theta(theta, virtual.NUM_HASHES.value, network):
        # No matrix product: cuBLAS's refuse where algorithms have to be deterministic.
        slopes = (weight.abs()[:, :, None] * slopes).sum(1)
    return slopes.max() * math.fabs(virtual.scale)
