"""Tile sizes of the Triton kernels, by kernel, regime and device.

They change no model: a weight is the same in every tile. HFH_AUTOTUNE says how they are chosen:
"table" (the default) takes TABLE's, "off" takes the same for every device, "full" times the
neighbours of TABLE's at the first call of each kind and keeps the fastest for the process.
"""

from __future__ import annotations

import dataclasses
import functools
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


@dataclasses.dataclass(frozen=True)
class Device:
    """What the choice depends on."""

    kind: str
    """"sm80", "sm90" or "sm100" for that architecture and those after it; else "other"."""
    processors: int
    shared_memory: int
    """Bytes a program may have."""


# Chosen by what the compiler makes of them (bench/compiled.py): the largest tiles without spills in
# float32 accumulators, and enough programs to fill the device. Untimed.
DEFAULTS: dict[tuple[str, str], Tiles] = {
    ("linear", "small"): Tiles(16, 64, 64, 4, 3),
    ("linear", "middle"): Tiles(64, 64, 64, 4, 3),
    ("linear", "large"): Tiles(128, 128, 64, 8, 3),
    ("linear_backward_input", "small"): Tiles(16, 64, 64, 4, 3),
    ("linear_backward_input", "middle"): Tiles(64, 64, 64, 4, 3),
    ("linear_backward_input", "large"): Tiles(128, 64, 128, 8, 3),
    ("linear_backward_weight", "small"): Tiles(16, 64, 64, 4, 2),
    ("linear_backward_weight", "middle"): Tiles(32, 64, 64, 4, 3),
    ("linear_backward_weight", "large"): Tiles(64, 64, 64, 4, 3),
    ("conv2d", "small"): Tiles(16, 64, 32, 4, 3),
    ("conv2d", "middle"): Tiles(64, 64, 32, 4, 3),
    ("conv2d", "large"): Tiles(256, 64, 32, 8, 3),
    ("conv2d_backward_input", "small"): Tiles(16, 32, 64, 4, 3),
    ("conv2d_backward_input", "middle"): Tiles(64, 32, 64, 4, 3),
    ("conv2d_backward_input", "large"): Tiles(256, 32, 64, 8, 3),
    ("conv2d_backward_weight", "small"): Tiles(16, 64, 32, 8, 2),
    ("conv2d_backward_weight", "middle"): Tiles(32, 64, 32, 8, 3),
    ("conv2d_backward_weight", "large"): Tiles(64, 64, 32, 8, 3),
    ("materialize", "any"): Tiles(1, 32, 128, 4, 1),
    ("materialize_backward", "any"): Tiles(1, 32, 64, 4, 1),
}
"""By kernel and regime, where TABLE has nothing."""

TABLE: dict[tuple[str, str, str], Tiles] = {
    ("linear", "large", "sm90"): Tiles(256, 128, 32, 8, 3),
}
"""By kernel, regime and kind of device: H100 and H200 are "sm90", A100 "sm80"."""


def batch_regime(batch: int) -> str:
    """Which tiles suit a batch.

    A small one has a single tile of rows, and making V is the whole cost; in a middle one few rows
    share it; in a large one the product counts as much.
    """
    if batch <= 16:
        return "small"
    return "middle" if batch <= 256 else "large"


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
        properties.shared_memory_per_block_optin,
    )


def tiles(kernel: str, regime: str, device: Device) -> Tiles:
    """The entry of TABLE, or of DEFAULTS."""
    default = DEFAULTS[kernel, regime]
    return default if mode() == "off" else TABLE.get((kernel, regime, device.kind), default)


Result = TypeVar("Result")
_tuned: dict[tuple[Any, ...], Tiles] = {}


def run(
    kernel: str,
    regime: str,
    virtual: VirtualWeight,
    activations: torch.Tensor,
    launch: Callable[[Tiles, Device], Result],
) -> Result:
    """Call ``launch`` with the tiles of a kernel for these activations; "full" tunes them first."""
    on = device(activations.device.index if activations.is_cuda else None)
    chosen = fitted(tiles(kernel, regime, on), virtual, activations.element_size(), on)
    if mode() == "full" and activations.is_cuda and not torch.cuda.is_current_stream_capturing():
        key = (
            kernel, regime, activations.device, activations.dtype, virtual.pool.dtype,
            *(field.value for field in virtual if isinstance(field, tl.constexpr)),
        )  # fmt: skip
        if key not in _tuned:
            candidates = {
                fitted(candidate, virtual, activations.element_size(), on)
                for candidate in neighbours(chosen)
            }
            _tuned[key] = min(
                candidates,
                key=lambda candidate: float(
                    triton.testing.do_bench(lambda: launch(candidate, on), return_mode="median")
                ),
            )
        chosen = _tuned[key]
    return launch(chosen, on)


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


def fitted(start: Tiles, virtual: VirtualWeight, itemsize: int, device: Device) -> Tiles:
    """The same with fewer stages, then fewer columns, until what they hold fits shared memory."""
    pool_itemsize = virtual.pool.element_size()
    # Copies of less than four bytes are not asynchronous and wait in registers.
    is_copied = virtual.BLOCK.value * pool_itemsize >= 4
    gathered = virtual.NUM_HASHES.value * pool_itemsize if is_copied else 0
    result = start
    while True:
        stage = result.m * max(result.n, result.k) * itemsize + result.n * result.k * gathered
        if stage * result.stages <= device.shared_memory - _MARGIN:
            return result
        if result.stages > 2:
            result = dataclasses.replace(result, stages=result.stages - 1)
        elif result.k > 32:
            result = dataclasses.replace(result, k=result.k // 2)
        elif result.stages > 1:
            result = dataclasses.replace(result, stages=1)
        else:
            return result


_MARGIN = 32 * 1024
"""Bytes for what the compiler itself keeps in shared memory, to change layouts and to reduce."""


def num_parts(programs: int, steps: int, device: Device) -> int:
    """In how many parts to split a sum of so many steps, so that programs fill the device."""
    parts = 1
    while parts < 16 and programs * parts < 2 * device.processors and steps >= 4 * parts:
        parts *= 2
    return parts
