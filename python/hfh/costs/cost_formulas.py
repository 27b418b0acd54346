"""What one layer costs, by method. COST.md derives the formulas."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar

from hfh_kernels.spec import HashSpec, Reconstruction

INDEX_BYTES = 4
"""Of a column's index and of a row's start in a sparse matrix: int32."""
ADAM_MOMENTS = 2

Sum = TypeVar("Sum", bound="_Summable")


class _Summable:
    """Base of dataclasses that add up field by field."""

    def __add__(self: Sum, other: Sum) -> Sum:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True)
class Operations(_Summable):
    """Counts of one pass.

    Args:
        multiply_adds: of products and convolutions with activations.
        hash_operations: on 32-bit integers, to compute slots and signs.
        gathers: reads, or additions, at a computed or stored place, each of a run of neighbours: a
            block of the pool, a row of a table, the activations of an input feature.
        reconstruction_operations: of signs, g and scale; a multiply-add is one.
    """

    multiply_adds: int = 0
    hash_operations: int = 0
    gathers: int = 0
    reconstruction_operations: int = 0


@dataclass(frozen=True)
class MethodCost(_Summable):
    """Of a layer, or of a whole network, stored and computed by one method.

    Args:
        parameters: numbers that are learnt.
        bytes: of parameters and indices.
        optimizer_bytes: of Adam's two moments.
        forward, backward_input, backward_weight: the passes; training takes all three.
    """

    parameters: int = 0
    bytes: int = 0
    optimizer_bytes: int = 0
    forward: Operations = Operations()
    backward_input: Operations = Operations()
    backward_weight: Operations = Operations()

    @property
    def training(self) -> Operations:
        return self.forward + self.backward_input + self.backward_weight


@dataclass(frozen=True)
class Weight:
    """A matrix [rows, cols], of which the first ``dense_rows`` are dense in every method."""

    rows: int
    cols: int
    dense_rows: int = 0

    @property
    def size(self) -> int:
        return self.rows * self.cols

    @property
    def compressible(self) -> int:
        """Elements that are not dense in every method."""
        return (self.rows - self.dense_rows) * self.cols


@dataclass(frozen=True)
class Use(_Summable):
    """What one pass of the network does with a weight, in all calls of its layer.

    Args:
        calls: of the layer.
        rows: that are multiplied with something, but for dense ones; each call counts its own.
        multiply_adds: of the products by the whole matrix.
        lookups: rows that are looked up.
    """

    calls: int = 0
    rows: int = 0
    multiply_adds: int = 0
    lookups: int = 0


def stored(parameters: int, itemsize: int, index_bytes: int = 0) -> MethodCost:
    """The storage of parameters, apart from any pass."""
    num_bytes = parameters * itemsize
    return MethodCost(parameters, num_bytes + index_bytes, ADAM_MOMENTS * num_bytes)


def dense(use: Use) -> MethodCost:
    """The passes of a dense matrix."""
    return _passes(use, Operations(use.multiply_adds, gathers=use.lookups))


def virtual(
    weight: Weight, use: Use, hash_spec: HashSpec, reconstruction: Reconstruction
) -> MethodCost:
    """The passes of a virtual matrix, which each pass and each call computes anew."""
    rows = use.rows + use.lookups
    blocks = math.ceil(weight.cols / hash_spec.block)
    look_up = Operations(gathers=rows * blocks * hash_spec.num_hashes)
    per_weight, per_gradient = _operations_per_weight(hash_spec.num_hashes, reconstruction)
    hashed = Operations(hash_operations=_hash_operations(rows, blocks, use.calls, hash_spec))
    elements = look_up + Operations(reconstruction_operations=rows * weight.cols * per_weight)
    gradient = look_up + Operations(reconstruction_operations=rows * weight.cols * per_gradient)
    if reconstruction.depth > 0:
        # The gradients of g's parameters need its inputs and hidden units.
        gradient = gradient + elements
    product = Operations(use.multiply_adds)
    return _passes(use, product + hashed + elements, product + hashed + gradient)


def sparse(weight: Weight, use: Use, nonzero: int) -> MethodCost:
    """The passes of a matrix in compressed sparse rows with ``nonzero`` elements left."""
    total = weight.size - weight.compressible + nonzero
    gathers = (use.rows + use.lookups) * weight.cols * nonzero // max(1, weight.compressible)
    multiply_adds = use.multiply_adds * total // max(1, weight.size)
    return _passes(use, Operations(multiply_adds, gathers=gathers))


def sparse_index_bytes(weight: Weight, nonzero: int) -> int:
    """Of every element's column and every row's start, the end of the last row too."""
    return INDEX_BYTES * (nonzero + weight.rows - weight.dense_rows + 1)


def _passes(use: Use, forward: Operations, backward_weight: Operations | None = None) -> MethodCost:
    """Look-ups have no backward pass to their input; otherwise it costs what the forward does."""
    return MethodCost(
        forward=forward,
        backward_input=forward if use.rows or use.multiply_adds else Operations(),
        backward_weight=forward if backward_weight is None else backward_weight,
    )


def _hash_operations(rows: int, blocks: int, calls: int, hash_spec: HashSpec) -> int:
    """For ``rows`` rows over all calls, each of ``blocks`` blocks."""
    windowed = hash_spec.window is not None
    mix = 8
    of_row = 2 * mix + 1 + 5 * windowed
    of_block = 1
    of_key = 1 + mix
    of_slot = 8 + 4 * windowed
    keys = of_key + hash_spec.num_hashes * of_slot
    return rows * of_row + calls * blocks * of_block + rows * blocks * keys


def _operations_per_weight(num_hashes: int, reconstruction: Reconstruction) -> tuple[int, int]:
    """Of signs, g and scale: forward, and backward to g's parameters and the pool's elements."""
    shapes = reconstruction.layer_shapes(num_hashes)
    products = sum(outputs * inputs for outputs, inputs in shapes)
    biases = sum(outputs for outputs, _ in shapes) if reconstruction.depth > 1 else 0
    activations = sum(outputs for outputs, _ in shapes[:-1])
    others = num_hashes + biases + activations + 1
    return products + others, 2 * products + others
