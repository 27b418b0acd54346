"""Tile sizes of the Triton kernels, by kernel, regime and device.

They change no model: a weight is the same in every tile. HFH_AUTOTUNE says how they are chosen:
"table" (the default) takes TABLE's, "off" takes the same for every device, "full" times the
neighbours of TABLE's at the first call of each kind and keeps the fastest for the process.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from hfh_kernels.ops.tile import VirtualWeight

MODES = ("off", "table", "full")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: rows of activations x rows of V x columns of V, and who works on it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Of a launch. Multiply-adds are fused by every Triton: defaults have changed."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    @property
    def chunk(self) -> int:
        """Columns that g's backward pass takes at a time: over 8 weights a thread it spills."""
        return max(8, 8 * 32 * self.warps // self.n)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the choice depends on."""

    kind: str
    """"sm80", "sm90" or "sm100" for that architecture and those after it; else "other"."""
    processors: int
    shared_memory: int
    """Bytes a program may have."""


ROWS = (16, 64, 128, 256)
"""Regimes of a product: its tiles have the fewest of these rows that hold all activations, since
each tile makes V anew. The smallest is the least that matrix units take."""

# Chosen by what the compiler makes of them (bench/compiled.py): no spills, and as many columns as
# leave registers for the sums. Untimed.
DEFAULTS: dict[tuple[str, int], Tiles] = {
    ("linear", 16): Tiles(16, 64, 64, 4, 3),
    ("linear", 64): Tiles(64, 64, 64, 4, 3),
    ("linear", 128): Tiles(128, 128, 64, 8, 3),
    ("linear", 256): Tiles(256, 128, 32, 8, 3),
    ("linear_backward_input", 16): Tiles(16, 64, 64, 4, 3),
    ("linear_backward_input", 64): Tiles(64, 64, 64, 4, 3),
    ("linear_backward_input", 128): Tiles(128, 64, 128, 8, 3),
    ("linear_backward_input", 256): Tiles(256, 32, 128, 8, 3),
    ("linear_backward_weight", 16): Tiles(16, 64, 64, 8, 2),
    ("linear_backward_weight", 64): Tiles(32, 64, 64, 8, 3),
    ("linear_backward_weight", 128): Tiles(64, 128, 64, 8, 3),
    ("linear_backward_weight", 256): Tiles(64, 128, 128, 8, 3),
    ("conv2d", 16): Tiles(16, 64, 32, 4, 3),
    ("conv2d", 64): Tiles(64, 64, 32, 4, 3),
    ("conv2d", 128): Tiles(128, 64, 32, 8, 3),
    ("conv2d", 256): Tiles(256, 64, 32, 8, 3),
    ("conv2d_backward_input", 16): Tiles(16, 32, 64, 4, 3),
    ("conv2d_backward_input", 64): Tiles(64, 32, 64, 4, 3),
    ("conv2d_backward_input", 128): Tiles(128, 32, 64, 8, 3),
    ("conv2d_backward_input", 256): Tiles(256, 32, 64, 8, 3),
    ("conv2d_backward_weight", 16): Tiles(16, 64, 32, 8, 2),
    ("conv2d_backward_weight", 64): Tiles(32, 64, 32, 8, 3),
    ("conv2d_backward_weight", 128): Tiles(64, 64, 32, 8, 3),
    ("conv2d_backward_weight", 256): Tiles(64, 64, 32, 8, 3),
    ("materialize", 0): Tiles(1, 32, 128, 4, 1),
    ("materialize_backward", 0): Tiles(1, 32, 64, 4, 1),
    ("embedding", 0): Tiles(1, 16, 128, 4, 1),
    ("embedding_backward", 0): Tiles(1, 4, 128, 2, 1),
    ("embedding_bag", 0): Tiles(1, 1, 128, 1, 1),
    ("embedding_bag_backward", 0): Tiles(1, 4, 128, 2, 1),
    ("embedding_bag_backward_max", 0): Tiles(1, 4, 128, 4, 1),
}
"""By kernel and regime, 0 where there are no activations; where TABLE has nothing."""

FLOAT32: dict[tuple[str, int], Tiles] = {
    ("linear", 128): Tiles(128, 64, 64, 8, 2),
    ("linear", 256): Tiles(128, 64, 64, 8, 2),
    ("linear_backward_input", 128): Tiles(128, 32, 128, 8, 2),
    ("linear_backward_input", 256): Tiles(128, 32, 128, 8, 2),
    ("linear_backward_weight", 128): Tiles(32, 128, 128, 8, 3),
    ("linear_backward_weight", 256): Tiles(32, 128, 128, 8, 3),
}
"""The same for activations in float32, whose products take registers for parts of each number."""

TABLE: dict[tuple[str, int, str], Tiles] = {
    # Spills in the size of DEFAULTS.
    ("linear_backward_weight", 256, "sm80"): Tiles(64, 128, 64, 8, 3),
}
"""By kernel, regime and kind of device: H100 and H200 are "sm90", A100 "sm80"."""


def rows_regime(rows: int) -> int:
    """Which tiles suit so many rows of activations, see ROWS."""
    return next((size for size in ROWS if rows <= size), ROWS[-1])


def mode() -> str:
    """HFH_AUTOTUNE, checked."""
    value = os.environ.get("HFH_AUTOTUNE", "table")
    if value not in MODES:
        raise ValueError(f"HFH_AUTOTUNE must be one of {MODES}, received {value!r}")
    return value


@functools.lru_cache
def device(index: int | None) -> Device:
    """The CUDA device of that index; None for the interpreter."""
    if index is None:
        return Device("other", 2, 227 * 1024)
    properties: Any = torch.cuda.get_device_properties(index)
    kinds = {8: "sm80", 9: "sm90", 10: "sm100", 12: "other"}
    return Device(
        kinds.get(properties.major, "other"),
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
    )


def tiles(kernel: str, regime: int, itemsize: int, device: Device) -> Tiles:
    """The entry of TABLE, or of DEFAULTS, for activations of that many bytes."""
    default = DEFAULTS[kernel, regime]
    if itemsize == torch.float32.itemsize:
        return FLOAT32.get((kernel, regime), default)
    return default if mode() == "off" else TABLE.get((kernel, regime, device.kind), default)


Result = TypeVar("Result")
_tuned: dict[tuple[Any, ...], Tiles] = {}


def run(
    kernel: str,
    regime: int,
    virtual: VirtualWeight,
    activations: torch.Tensor,
    launch: Callable[[Tiles, Device], Result],
) -> Result:
    """Call ``launch`` with the tiles of a kernel for these activations; "full" tunes them first."""
    on = device(activations.device.index if activations.is_cuda else None)
    chosen = fitted(
        kernel,
        tiles(kernel, regime, activations.element_size(), on),
        virtual,
        activations.element_size(),
        on,
    )
    if mode() == "full" and activations.is_cuda:
        key = (
            kernel, regime, activations.device, activations.dtype, virtual.pool.dtype,
            *(field.value for field in virtual if isinstance(field, tl.constexpr)),
        )  # fmt: skip
        if key not in _tuned and not torch.cuda.is_current_stream_capturing():
            candidates = {
                fitted(kernel, candidate, virtual, activations.element_size(), on)
                for candidate in neighbours(chosen)
            }
            _tuned[key] = min(
                candidates, key=lambda candidate: _milliseconds(lambda: launch(candidate, on))
            )
        chosen = _tuned.get(key, chosen)
    return launch(chosen, on)


def _milliseconds(run: Callable[[], object]) -> float:
    """inf for tiles that need more registers or memory than a program may have."""
    try:
        return float(triton.testing.do_bench(run, return_mode="median"))
    except triton.OutOfResources:
        return math.inf


def neighbours(start: Tiles) -> list[Tiles]:
    """Those that differ by a factor of two in one size, or by a stage; ``start`` comes first."""
    choices = [start]
    for name in ("m", "n", "k", "warps"):
        value = getattr(start, name)
        smallest = 1 if value < 16 else 4 if name == "warps" else 16
        for other in (value // 2, value * 2):
            if smallest <= other <= 256 and (name != "warps" or other <= 8):
                choices.append(dataclasses.replace(start, **{name: other}))
    for stages in (start.stages - 1, start.stages + 1):
        if stages >= 1:
            choices.append(dataclasses.replace(start, stages=stages))
    return choices


def fitted(
    kernel: str, start: Tiles, virtual: VirtualWeight, itemsize: int, device: Device
) -> Tiles:
    """The same with fewer stages, then fewer columns, until what they hold fits shared memory."""
    result = start
    while _stage_bytes(kernel, result, virtual, itemsize) * result.stages > device.shared_memory:
        if result.stages > 2:
            result = dataclasses.replace(result, stages=result.stages - 1)
        elif result.k > 32:
            result = dataclasses.replace(result, k=result.k // 2)
        elif result.stages > 1:
            result = dataclasses.replace(result, stages=1)
        else:
            break
    return result


def _stage_bytes(kernel: str, tiles: Tiles, virtual: VirtualWeight, itemsize: int) -> int:
    """What the loop of a kernel copies to shared memory ahead of a product."""
    if kernel.endswith("backward_weight"):
        return tiles.m * (tiles.n + tiles.k) * itemsize
    activations = tiles.n if kernel.endswith("backward_input") else tiles.k
    pool_itemsize = virtual.pool.element_size()
    # Copies of less than four bytes are not asynchronous and wait in registers.
    is_copied = virtual.BLOCK.value * pool_itemsize >= 4
    gathered = virtual.NUM_HASHES.value * pool_itemsize if is_copied else 0
    return tiles.m * activations * itemsize + tiles.n * tiles.k * gathered


def num_parts(programs: int, steps: int, warps: int, device: Device) -> int:
    """In how many parts to split a sum of so many steps, so that programs fill the device.

    Registers and shared memory leave each processor room for about eight warps. So the parts, where
    there are several, are of no more elements than the tiles that the device holds at once.
    """
    parts = 1
    while 2 * parts * programs * warps <= 8 * device.processors and 8 * parts <= steps:
        parts *= 2
    return parts


def num_programs(tiles: int, device: Device) -> int:
    """How many programs share so many tiles: those that run at once twice over, at most."""
    return min(tiles, 16 * device.processors)
