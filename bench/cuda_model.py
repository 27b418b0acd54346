"""What the CUDA kernels can at best reach on an H200: counted, not measured.

`python -m bench.cuda_model` prints the tables that README has. A kernel takes at least as long as
the slowest of four units: instructions (results/compiled_cuda.json), shared memory, tensor cores
and memory. How close to it the kernels come is for a GPU to tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bench import compiled_cuda
from bench.compiled_cuda import Kernel
from bench.gpu_timer import Ceilings, Work
from bench.shapes import (
    GPU_SMALL_BATCH_LINEARS,
    GPU_TRAINING_LINEARS,
    TRAINING_BATCH,
    GPULinear,
)

PROCESSORS, CLOCK = 132, 1.98e9
H200 = Ceilings(copy_bytes=4.3e12, product_flops=790e12, instructions=PROCESSORS * 4 * 32 * CLOCK)
"""Measured elsewhere: a copy and a bfloat16 product; 132 processors at the highest clock."""
SHARED_BYTES = PROCESSORS * 128 * CLOCK
CACHE_BYTES = 5.5e12
"""A second out of the second-level cache, measured elsewhere."""
TENSOR_FLOPS = 0.62 * 990e12
"""Of mma.sync, as measured elsewhere: the full rate is that of wgmma."""
TENSOR_INSTRUCTION = 2 * 16 * 8 * 16
"""Multiplications and additions of the largest; smaller ones count as this."""

ARCH = "sm_90a"
BATCHES = (1, 4, 8, 16)
TARGETS = {(4, 1): 0.5, (2, 1): 0.35, (4, 2): 0.95}
"""Time relative to the dense layer at these batches, by hashes and depth."""
GROUP_ROWS = 32
"""kGroupRows in csrc/cuda/row_groups.h: what a block of threads makes, by tiles."""
ELEMENT_GROUPS = 2
"""kGroups in csrc/cuda/linear_elements.cu."""
SLOT_ROWS = 256
"""That a block of threads takes at most: kMaxRows in csrc/cuda/slot_products_sums.h."""
BLOCK_SHARED_BYTES = 227 * 1024
"""That a block of threads can have."""


def window_shared_bytes(kernel: str) -> int:
    """Of a block of threads, with windows of 64 KiB in blocks of 64: as the launchers plan it."""
    elements, block = 2**15, 64
    if kernel in ("linear_small", "linear_elements", "write_panel"):
        # The window, and its negative; or the windows of two groups of rows.
        return 4 * elements
    if kernel == "slot_products":
        # For batches up to 4: twice as much beyond.
        words = compiled_cuda.chunk_words(("BFloat16", "64", "4"))
        return 2 * words * elements // block + 2 * 2 * words * block
    # The window's gradient.
    return 4 * elements if kernel == "weight_backward" else 0


@dataclasses.dataclass(frozen=True)
class Units:
    """Seconds that each unit needs."""

    instructions: float
    shared_memory: float
    tensor_cores: float
    memory: float

    @property
    def seconds(self) -> float:
        return float(max(dataclasses.astuple(self)))

    @property
    def binding(self) -> str:
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name]).replace("_", " ")


class Kernels:
    """Rows of results/compiled_cuda.json by their names."""

    def __init__(self) -> None:
        self._rows = {row.kernel: row for row in compiled_cuda.load() if row.arch == ARCH}

    def __getitem__(self, name: str) -> Kernel:
        return self._rows[name]


def network(layer: GPULinear) -> str:
    """g as kernels are named."""
    width = f" width {layer.width} relu" if layer.depth > 1 else ""
    return f"U{layer.num_hashes} depth {max(layer.depth, 1)}{width}"


def dense_seconds(layer: GPULinear, batch: int) -> float:
    weights = layer.num_weights
    activations = 2 * batch * (layer.in_features + layer.out_features)
    return Work(2 * weights + activations, 2 * batch * weights).floor(H200)[0]


def memory_seconds(layer: GPULinear, batch: int, cache_bytes: float) -> float:
    """The pool and the activations out of memory, and what is read again out of the cache."""
    activations = 2 * batch * (layer.in_features + layer.out_features)
    dram = 2 * layer.num_weights / layer.compression + activations
    return max(dram / H200.copy_bytes, cache_bytes / CACHE_BYTES)


def by_tiles(kernels: Kernels, layer: GPULinear, batch: int) -> Units:
    """Tiles of windows of elements in shared memory (csrc/cuda/linear.cu, linear_elements.cu).

    A gather reads every element of every weight once, from all banks. The input is read by each
    block of threads, and passes through shared memory's unit on its way from the cache. A window is
    written there, and where g is not linear read and written again to negate it.
    """
    tiles = 1 if batch <= 8 else 2 if batch <= 16 else 4
    if layer.depth <= 1:
        arguments = f"shared once, {str(layer.block < 64).lower()}, {tiles}"
        name, rows, passes = "linear_elements", ELEMENT_GROUPS * GROUP_ROWS, 1
    else:
        arguments, name, rows, passes = f"shared, {tiles}", "linear_small", GROUP_ROWS, 3
    kernel = kernels[f"{name}<BFloat16, {network(layer)}, {arguments}>"]
    weights = layer.num_weights
    assert layer.window is not None
    assert layer.rows_per_window is not None
    windows = 2 * layer.window * layer.out_features / min(rows, layer.rows_per_window)
    inputs = 2 * batch * layer.in_features * layer.out_features / rows
    return Units(
        instructions=weights * kernel.lane_instructions / H200.instructions,
        shared_memory=(2 * layer.num_hashes * weights + inputs + passes * windows) / SHARED_BYTES,
        tensor_cores=weights
        / kernel.numbers
        * kernel.tensor_instructions
        * TENSOR_INSTRUCTION
        / TENSOR_FLOPS,
        memory=memory_seconds(layer, batch, windows + inputs),
    )


def read_cycles(batch: int) -> float:
    """Of a warp whose lanes each read the products that one draws, in bfloat16.

    In a clock cycle, lanes that fill all banks read, of 16 bytes each at most. Those that read the
    same words of a plane's slots, four of each, meet where their slots are equal modulo 4
    (ProductTable in csrc/cuda/slot_products_sums.h), and the cycle takes as often as they meet
    most: of 256 ways for four lanes 24, 204 and 252 have at most 1, 2 and 3 meet.
    """
    cycles = max(batch, 4) // 2 if batch >= 4 else 1
    meeting = max(32 // cycles, 8) // 4
    return cycles * (1 + sum(1 - (ways / 256) ** meeting for ways in (24, 204, 252)))


def by_slot_products(kernels: Kernels, layer: GPULinear, batch: int) -> Units:
    """Products of slots and column blocks, then sums of those drawn (slot_products_kernel.h)."""
    kernel = kernels[f"slot_products<BFloat16, {layer.block}, {batch}>"]
    assert layer.window is not None
    assert layer.rows_per_window is not None
    rows = min(layer.rows_per_window, SLOT_ROWS)
    slots = layer.window // layer.block
    words = compiled_cuda.chunk_words(kernel.arguments)
    draws = rows * words // batch
    chunks = layer.num_weights / (draws * layer.block)
    instructions = 8 * 32 * compiled_cuda.slot_pass(kernel.parts, layer.num_hashes, words, rows)
    products = 2 * slots * words
    drawn = 128 * draws / 32 * layer.num_hashes * read_cycles(batch)
    # Written once, and read by each of 8 warps.
    inputs = 2 * words * layer.block
    # The sums of 4 samples, or of 4 draws, take a tensor instruction of a warp.
    added = TENSOR_INSTRUCTION * draws / 32 * batch / 4
    cache = layer.out_features / rows * (2 * layer.window + 2 * batch * layer.in_features)
    return Units(
        instructions=chunks * instructions / H200.instructions,
        shared_memory=chunks * (products + drawn + 9 * inputs) / SHARED_BYTES,
        tensor_cores=chunks * (2 * slots * words * layer.block + added) / TENSOR_FLOPS,
        memory=memory_seconds(layer, batch, cache),
    )


@dataclasses.dataclass(frozen=True)
class Small:
    """A product of a small batch."""

    layer: GPULinear
    batch: int
    kernel: str
    units: Units
    dense: float

    @property
    def ratio(self) -> float:
        return self.units.seconds / self.dense

    @property
    def target(self) -> float:
        return TARGETS[self.layer.num_hashes, self.layer.depth]


def small_batches() -> list[Small]:
    """By the faster kernel, which is the one that csrc/cuda/crossovers.h chooses (tested)."""
    kernels = Kernels()
    found = []
    for layer in GPU_SMALL_BATCH_LINEARS:
        for batch in BATCHES:
            ways = {"tiles": by_tiles(kernels, layer, batch)}
            if layer.depth <= 1:
                ways["slot products"] = by_slot_products(kernels, layer, batch)
            kernel = min(ways, key=lambda way: ways[way].seconds)
            found.append(Small(layer, batch, kernel, ways[kernel], dense_seconds(layer, batch)))
    return found


@dataclasses.dataclass(frozen=True)
class Large:
    """A product of a large batch by panels, or with its gradients."""

    layer: GPULinear
    backward: bool
    reconstruction: float
    """Seconds for panels, and for the pool's gradient."""
    dense: float

    @property
    def ratio(self) -> float:
        return (self.dense + self.reconstruction) / self.dense


def in_shared_memory(layer: GPULinear) -> bool:
    """Whether what a row draws from fits, with its negative, or as a gradient in float32."""
    elements = layer.window or layer.num_weights // layer.compression
    return 4 * elements <= BLOCK_SHARED_BYTES


def panel_seconds(kernels: Kernels, layer: GPULinear) -> float:
    """To write the weight; the product reads it out of the second-level cache."""
    alone = layer.block < 32
    shared = in_shared_memory(layer)
    source = "shared" if shared else "global"
    kernel = kernels[f"write_panel<BFloat16, {network(layer)}, {source}, {str(alone).lower()}>"]
    weights = layer.num_weights
    gathered = 2 * layer.num_hashes * weights
    if alone and shared:
        # 32 lanes read 32 banks at random: of one of them about 3.5 words.
        gathered = int(3.5 * 4 * layer.num_hashes * weights)
    return max(
        weights * kernel.lane_instructions / H200.instructions,
        gathered / (SHARED_BYTES if shared else CACHE_BYTES),
        2 * weights / CACHE_BYTES,
        weights / kernel.numbers * kernel.tensor_instructions * TENSOR_INSTRUCTION / TENSOR_FLOPS,
    )


def gradient_seconds(kernels: Kernels, layer: GPULinear) -> float:
    """To add up the pool's gradient, given the weight's, without the hashes of blocks."""
    shared = in_shared_memory(layer)
    source = "shared" if shared else "global"
    kernel = kernels[f"weight_backward<{network(layer)}, {source}, BFloat16>"]
    weights = layer.num_weights
    # A read and a write of four bytes for each element; the elements, and the weight's gradient.
    added = (4 + 4) * layer.num_hashes * weights
    return max(
        weights * kernel.lane_instructions / H200.instructions,
        added / (SHARED_BYTES if shared else CACHE_BYTES),
        (2 * layer.num_hashes + 2) * weights / CACHE_BYTES,
    )


def large_batches() -> list[Large]:
    """Forward, then forward and backward: two panels, three products and the pool's gradient."""
    kernels = Kernels()
    found = []
    for layer in _training_layers():
        product = 2 * TRAINING_BATCH * layer.num_weights / H200.product_flops
        panel = panel_seconds(kernels, layer)
        found.append(Large(layer, False, panel, product))
        if layer.block > 1:
            gradient = gradient_seconds(kernels, layer)
            found.append(Large(layer, True, 2 * panel + gradient, 3 * product))
    return found


def _training_layers() -> Iterator[GPULinear]:
    for layer in GPU_TRAINING_LINEARS:
        yield layer
        if layer.depth == 0:
            yield dataclasses.replace(layer, num_hashes=4, depth=2)
        else:
            yield dataclasses.replace(layer, depth=1)


@dataclasses.dataclass(frozen=True)
class Fused:
    """A product that makes its weights itself, a cluster of processors sharing each."""

    layer: GPULinear
    rows: int
    """Of the batch that a cluster multiplies with a weight that it has made."""
    reconstruction: float
    """Seconds of making weights, for all clusters; under the product at best."""
    needed: float
    """Share of cuBLAS's speed at which it would be as fast as panels."""


def fused(rows: int) -> list[Fused]:
    return [
        Fused(
            large.layer,
            rows,
            TRAINING_BATCH / rows * large.reconstruction,
            large.dense / (large.dense + large.reconstruction),
        )
        for large in large_batches()
        if not large.backward and large.layer.block > 1
    ]


def main() -> None:
    for small in small_batches():
        times = "  ".join(f"{1e6 * t:6.1f}" for t in dataclasses.astuple(small.units))
        print(
            f"{small.layer.name:66} {small.batch:3} {small.kernel:14} {times}  "
            f"{small.units.binding:14} {small.ratio:5.2f} (at most {small.target})"
        )
    for large in large_batches():
        kind = "forward + backward" if large.backward else "forward"
        print(
            f"{large.layer.name:66} {kind:20} {1e6 * large.dense:6.1f} us and "
            f"{1e6 * large.reconstruction:6.1f}  {large.ratio:5.2f}"
        )
    for rows in (256, 512):
        for one in fused(rows):
            print(
                f"{one.layer.name:66} fused, weights shared by {rows} rows: "
                f"{1e6 * one.reconstruction:5.1f} us of making weights; pays from "
                f"{one.needed:.3f} of cuBLAS on"
            )


if __name__ == "__main__":
    main()
