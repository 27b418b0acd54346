"""The floor of each row: what the vector units and the memory must at least do for it.

Instructions. One operation is one vector instruction on as many lanes of float32 as the machine
has, at the rate at which a large product of matrices does its multiply-adds. A vector of weights of
U hashes, depth d and width H costs U multiply-adds at depth 1, and U H + (d - 2) H^2 + H of them
with (d - 1) H activations beyond (24 for U 4, depth 2, H 4); its block's hash costs 10 operations
and 12 more a hash function, for all the block's vectors. Each sample then costs a multiply-add.
The backward pass makes the weights twice, for the gradients of the input and of the weights, and
goes back through g at three times the cost of g, with two multiply-adds a sample.

Bytes. U pool elements a weight, at the rate at which a buffer of the pool's size is read; backward
reads it twice and adds to its gradient. (Where elements are gathered one by one, as with block 1,
each lane is a load, which counts as an operation.)

Linear g (depth 1) has a second way: the products of all slots with all blocks of a sample,
pool_size / block * columns multiply-adds a sample, then U loads and additions of a product for each
block and row. The floor is that of the cheaper way.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from bench.shapes import IN_FEATURES, NUM_WEIGHTS, Row
from hfh_kernels import build_info

_LANES = {"baseline": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16, "avx512_amx": 16}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of this machine, all threads together."""

    operations: float
    """Vector instructions a second."""
    pool_bytes: float
    """Bytes a second read from a buffer of the pool's size."""
    memory_bytes: float
    """Bytes a second read from memory."""


@dataclasses.dataclass(frozen=True)
class Floor:
    instructions: float
    """Seconds."""
    bytes: float
    """Seconds."""

    @property
    def seconds(self) -> float:
        return max(self.instructions, self.bytes)

    @property
    def binds(self) -> str:
        return "instructions" if self.instructions >= self.bytes else "bytes"


def lanes() -> int:
    return _LANES[build_info().get("cpu_capability", "baseline")]


def floor(row: Row, batch: int, rates: Rates) -> Floor:
    u, width, depth = row.num_hashes, row.width, row.depth
    hidden = (depth - 2) * width**2 + (depth - 1) * width
    network = u if depth == 1 else u * width + hidden + width
    gathers = u * lanes() if row.block == 1 else 0
    weights = network + gathers + (10 + 12 * u) / row.block
    operations = weights + batch
    pool_passes = 1
    if row.backward:
        operations += 2 * weights + 2 * network + 2 * batch
        pool_passes += 4  # read twice; the gradient is read and written
    vectors = NUM_WEIGHTS / lanes()
    traffic = NUM_WEIGHTS * u * row.dtype.itemsize * pool_passes
    making_weights = Floor(vectors * operations / rates.operations, traffic / rates.pool_bytes)
    if depth != 1 or row.backward or row.block == 1:
        return making_weights
    products = batch * row.pool_size * (IN_FEATURES // row.block) / lanes()
    additions = NUM_WEIGHTS / row.block * u * batch * (1 + 1 / lanes())
    adding_products = Floor(
        (products + additions) / rates.operations,
        row.pool_size * row.dtype.itemsize / rates.pool_bytes,
    )
    return min(making_weights, adding_products, key=lambda floor: floor.seconds)


def measure_rates(memory_bytes: int, repeats: int) -> Rates:
    """The best of `repeats` each; `memory_bytes` is the size of a buffer that no cache holds."""
    size = 2048
    a, b, product = (torch.randn(size, size) for _ in range(3))
    pool, memory = torch.zeros(NUM_WEIGHTS // 16), torch.zeros(memory_bytes // 4)

    def best_seconds(function: Callable[[], object]) -> float:
        def seconds() -> float:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start

        return min(seconds() for _ in range(repeats))

    threads = torch.get_num_threads()
    operations = size**3 / lanes() / best_seconds(lambda: torch.mm(a, b, out=product))
    memory_rate = memory.nbytes / best_seconds(lambda: torch.sum(memory))
    # One thread at a time: to wake the others takes longer than to read the pool.
    torch.set_num_threads(1)
    pool_rate = threads * pool.nbytes / best_seconds(lambda: torch.sum(pool))
    torch.set_num_threads(threads)
    return Rates(operations, pool_rate, memory_rate)
