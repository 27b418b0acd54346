"""Tiles of a virtual weight in Triton: hash, gather and g, once for every kernel.

Inside, a tile is [rows, groups, PER]: a group is PER neighbouring columns of one block, which share
their draws and lie side by side in the pool. Kernels see it as [rows, columns].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hfh_kernels import _triton
from hfh_kernels.ops.hash_index.reference import GOLDEN

_GOLD = tl.constexpr(GOLDEN)
_INTERPRETED = tl.constexpr(_triton.interpreted())


class VirtualWeight(NamedTuple):
    """A virtual weight as a kernel receives it. The upper-case fields are constants."""

    pool: Any
    theta: Any
    seed: Any
    num_slots: Any
    """pool_size / block."""
    draw_slots: Any
    """The slots that a row draws from: num_slots, or window / block."""
    rows_per_window: Any
    row_offset: Any
    col_offset: Any
    scale: Any
    NUM_HASHES: Any
    BLOCK: Any
    WINDOWED: Any
    DEPTH: Any
    WIDTH: Any
    TANH: Any
    NUM_PARAMETERS: Any


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b, in float32."""
    if _INTERPRETED:
        # The interpreter multiplies the bits of bfloat16 as integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _unsigned(number):
    """A scalar argument as uint32: Triton types those by value, and makes 1 a constant."""
    return tl.full((), number, tl.uint32)


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def logical_rows(weight, rows):
    """Where rows of a kernel's lie in the virtual weight, uint32."""
    return _unsigned(weight.row_offset) + rows.to(tl.uint32)


@triton.jit
def first_col(weight, col):
    """Where a kernel's column, a scalar, lies in the virtual weight, uint32."""
    return _unsigned(weight.col_offset) + col.to(tl.uint32)


@triton.jit
def hash_rows(weight, rows):
    """Key and first slot of the window of logical rows, uint32 of any shape."""
    seed = _unsigned(weight.seed)
    keys = _mix(_mix(rows) ^ seed)
    bases = tl.zeros_like(keys)
    if weight.WINDOWED:
        group = rows // _unsigned(weight.rows_per_window)
        window_key = _mix(seed ^ 0xC2B2AE35) + group * _GOLD
        bases = tl.umulhi(window_key, _unsigned(weight.num_slots) + tl.zeros_like(keys))
    return keys, bases


@triton.jit
def _draw(weight, keys, bases, HASH: tl.constexpr):
    """Slot, and whether the sign is negative, of one hash function, for the keys of weights."""
    lane = _mix(tl.full((), HASH + 1, tl.uint32) * _GOLD) | 1
    draw_slots = _unsigned(weight.draw_slots)
    hashes = keys * lane
    hashes ^= hashes >> 15
    hashes *= 0x2C1B3C6D
    slots = tl.umulhi(hashes, draw_slots)
    negative = (hashes * draw_slots) >> 31 != 0
    if weight.WINDOWED:
        num_slots = _unsigned(weight.num_slots)
        slots += bases
        slots = tl.where(slots >= num_slots, slots - num_slots, slots)
    return slots.to(tl.int32), negative


@triton.jit
def draws(weight, keys, bases, blocks, inner):
    """What is behind each weight, by hash function.

    Args:
        keys, bases: of the rows, uint32 [R], see hash_rows; [R, G] where each group has its own.
        blocks: column // BLOCK of each group, uint32 [G].
        inner: column % BLOCK, int32 [1, G, 1] or [1, 1, PER].

    Returns:
        Offsets into the pool, tuple of int32 [R, G, PER], and which are negated, tuple of bool
        [R, G, 1].
    """
    if len(keys.shape) == 1:
        keys, bases = keys[:, None], bases[:, None]
    keys = _mix(keys + (blocks * _GOLD)[None, :])
    offsets = ()
    negatives = ()
    for u in tl.static_range(weight.NUM_HASHES):
        slots, negative = _draw(weight, keys, bases, u)
        offsets = offsets + ((slots * weight.BLOCK)[:, :, None] + inner,)
        negatives = negatives + (negative[:, :, None],)
    return offsets, negatives


@triton.jit
def _load(weight, offsets, HASH: tl.constexpr):
    return tl.load(weight.pool + offsets[HASH]).to(tl.float32)


@triton.jit
def gather(weight, offsets, negatives):
    """The signed elements a, tuple of float32 [R, G, PER]."""
    elements = ()
    for u in tl.static_range(weight.NUM_HASHES):
        values = _load(weight, offsets, u)
        elements = elements + (tl.where(negatives[u], -values, values),)
    return elements


@triton.jit
def load_theta(weight):
    """g's parameters as a tuple of numbers, with the scale folded into the last layer."""
    theta = ()
    if weight.DEPTH == 0:
        theta = theta + (tl.full((), weight.scale, tl.float32),)
    for i in tl.static_range(weight.NUM_PARAMETERS):
        parameter = tl.load(weight.theta + i).to(tl.float32)
        if weight.DEPTH == 1 or i >= weight.NUM_PARAMETERS - weight.WIDTH - 1:
            parameter *= weight.scale
        theta = theta + (parameter,)
    return theta


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tanh(x):
    """To within 2e-7 of |x| near 0, where the quotient of exponentials cancels."""
    square = x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    power = tl.exp(-2 * tl.abs(x))
    quotient = (1 - power) / (1 + power)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def hidden_unit(weight, theta, START: tl.constexpr, INPUTS: tl.constexpr, INDEX: tl.constexpr, x):
    """One unit of the hidden layer whose parameters begin at START, for inputs x."""
    total = x[0] * theta[START + INDEX * INPUTS] + theta[START + weight.WIDTH * INPUTS + INDEX]
    for i in tl.static_range(1, INPUTS):
        total += x[i] * theta[START + INDEX * INPUTS + i]
    return _tanh(total) if weight.TANH else _relu(total)


@triton.jit
def hidden_layer(weight, theta, START: tl.constexpr, INPUTS: tl.constexpr, x):
    """A hidden layer."""
    units = ()
    for j in tl.static_range(weight.WIDTH):
        units = units + (hidden_unit(weight, theta, START, INPUTS, j, x),)
    return units


@triton.jit
def _linear_mix(weight, theta, elements):
    total = elements[0] * theta[0]
    for u in tl.static_range(1, weight.NUM_HASHES):
        total += elements[u] * theta[u]
    return total


@triton.jit
def reconstruct(weight, theta, elements):
    """V = scale * g(a), float32 [R, G, PER]."""
    if weight.DEPTH < 2:
        values = _linear_mix(weight, theta, elements)
    else:
        FIRST: tl.constexpr = (weight.NUM_HASHES + 1) * weight.WIDTH
        LAST: tl.constexpr = weight.NUM_PARAMETERS - weight.WIDTH - 1
        hidden = hidden_layer(weight, theta, 0, weight.NUM_HASHES, elements)
        if weight.DEPTH == 3:
            hidden = hidden_layer(weight, theta, FIRST, weight.WIDTH, hidden)
        values = hidden[0] * theta[LAST] + theta[LAST + weight.WIDTH]
        for j in tl.static_range(1, weight.WIDTH):
            values += hidden[j] * theta[LAST + j]
    return values


@triton.jit
def _made(weight, theta, offsets, negatives):
    """V, float32 [R, G, PER], from what is behind it, see draws."""
    if weight.DEPTH < 2:
        # The signs go to g's few weights, not to the elements.
        values = _load(weight, offsets, 0) * tl.where(negatives[0], -theta[0], theta[0])
        for u in tl.static_range(1, weight.NUM_HASHES):
            values += _load(weight, offsets, u) * tl.where(negatives[u], -theta[u], theta[u])
    else:
        values = reconstruct(weight, theta, gather(weight, offsets, negatives))
    return values


@triton.jit
def columns(weight, first_col, COLS: tl.constexpr):
    """Blocks and inner columns, see draws, of COLS columns from a multiple of PER on."""
    PER: tl.constexpr = min(weight.BLOCK, COLS)
    blocks = first_col // weight.BLOCK + tl.arange(0, COLS // PER).to(tl.uint32)
    inner = tl.arange(0, PER)
    if PER < weight.BLOCK:
        inner += tl.multiple_of((first_col % weight.BLOCK).to(tl.int32), PER)
    return blocks, inner[None, None, :]


@triton.jit
def virtual_tile(weight, theta, keys, bases, first_col, COLS: tl.constexpr):
    """V at some rows and COLS neighbouring columns.

    Args:
        theta: of load_theta.
        keys, bases: of the rows, uint32 [R], see hash_rows.
        first_col: uint32, a multiple of min(BLOCK, COLS).

    Returns:
        float32 [R, COLS]
    """
    blocks, inner = columns(weight, first_col, COLS)
    offsets, negatives = draws(weight, keys, bases, blocks, inner)
    values = _made(weight, theta, offsets, negatives)
    return tl.reshape(values, (keys.shape[0], COLS))


@triton.jit
def virtual_columns(weight, theta, keys, bases, cols):
    """V at some rows and any columns.

    Args:
        theta, keys, bases: of virtual_tile.
        cols: where they lie in the virtual weight, uint32 [C].

    Returns:
        float32 [R, C]
    """
    inner = (cols % weight.BLOCK).to(tl.int32)[None, :, None]
    offsets, negatives = draws(weight, keys, bases, cols // weight.BLOCK, inner)
    values = _made(weight, theta, offsets, negatives)
    return tl.reshape(values, (keys.shape[0], cols.shape[0]))
