"""Tiles of a virtual weight in Triton: hash, gather, g and their gradients, once for every kernel.

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
def _gather(weight, offsets, negatives):
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
def _unit(weight, theta, START: tl.constexpr, INPUTS: tl.constexpr, INDEX: tl.constexpr, x):
    """One unit of the hidden layer whose parameters begin at START, for inputs x."""
    total = x[0] * theta[START + INDEX * INPUTS] + theta[START + weight.WIDTH * INPUTS + INDEX]
    for i in tl.static_range(1, INPUTS):
        total += x[i] * theta[START + INDEX * INPUTS + i]
    return _tanh(total) if weight.TANH else _relu(total)


@triton.jit
def _hidden(weight, theta, START: tl.constexpr, INPUTS: tl.constexpr, x):
    """A hidden layer."""
    units = ()
    for j in tl.static_range(weight.WIDTH):
        units = units + (_unit(weight, theta, START, INPUTS, j, x),)
    return units


@triton.jit
def _linear_mix(weight, theta, elements):
    total = elements[0] * theta[0]
    for u in tl.static_range(1, weight.NUM_HASHES):
        total += elements[u] * theta[u]
    return total


@triton.jit
def _reconstruct(weight, theta, elements):
    """V = scale * g(a), float32 [R, G, PER]."""
    if weight.DEPTH < 2:
        values = _linear_mix(weight, theta, elements)
    else:
        FIRST: tl.constexpr = (weight.NUM_HASHES + 1) * weight.WIDTH
        LAST: tl.constexpr = weight.NUM_PARAMETERS - weight.WIDTH - 1
        hidden = _hidden(weight, theta, 0, weight.NUM_HASHES, elements)
        if weight.DEPTH == 3:
            hidden = _hidden(weight, theta, FIRST, weight.WIDTH, hidden)
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
        values = _reconstruct(weight, theta, _gather(weight, offsets, negatives))
    return values


@triton.jit
def _columns(weight, first_col, COLS: tl.constexpr):
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
    blocks, inner = _columns(weight, first_col, COLS)
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


class Gradients(NamedTuple):
    """Where kernels add up the gradients of pool and theta."""

    pool: Any
    """float32 [pool_size], or int64 with FIXED_POINT."""
    theta: Any
    """float32 [programs, NUM_PARAMETERS]."""
    units: Any
    """float32, with FIXED_POINT: how many units of the integers make 1."""
    FIXED_POINT: Any
    """Whether sums are of integers, which come out the same in any order."""


@triton.jit
def _add_to_theta(weight, gradients, INDEX: tl.constexpr, terms):
    # Each program has numbers of its own, so the order of the sums is that of the program.
    first = gradients.theta + tl.program_id(0).to(tl.int64) * weight.NUM_PARAMETERS
    tl.atomic_add(first + INDEX, tl.sum(terms), sem="relaxed")


@triton.jit
def _unit_backward(
    weight, theta, gradients, START: tl.constexpr, INPUTS: tl.constexpr, INDEX: tl.constexpr,
    x, unit, grad, grad_x,
):  # fmt: skip
    """Adds to the gradient of one hidden unit's parameters, and returns grad_x with its part.

    Args:
        unit: its value, and grad: the gradient of that.
        grad_x: the gradients of its inputs from the units before it, or ().
    """
    slope = 1 - unit * unit if weight.TANH else tl.where(unit > 0, 1.0, 0.0)
    grad *= slope
    results = ()
    for i in tl.static_range(INPUTS):
        _add_to_theta(weight, gradients, START + INDEX * INPUTS + i, grad * x[i])
        part = grad * theta[START + INDEX * INPUTS + i]
        if INDEX > 0:
            part += grad_x[i]
        results = results + (part,)
    _add_to_theta(weight, gradients, START + weight.WIDTH * INPUTS + INDEX, grad)
    return results


@triton.jit
def _last_layers_backward(
    weight, theta, gradients, START: tl.constexpr, INPUTS: tl.constexpr, x, grad
):
    """The output and the hidden layer before it, unit by unit: few tiles are held at a time."""
    LAST: tl.constexpr = weight.NUM_PARAMETERS - weight.WIDTH - 1
    scaled = grad * weight.scale
    _add_to_theta(weight, gradients, LAST + weight.WIDTH, scaled)
    grad_x = ()
    for j in tl.static_range(weight.WIDTH):
        unit = _unit(weight, theta, START, INPUTS, j, x)
        _add_to_theta(weight, gradients, LAST + j, scaled * unit)
        grad_x = _unit_backward(
            weight, theta, gradients, START, INPUTS, j, x, unit, grad * theta[LAST + j], grad_x
        )
    return grad_x


@triton.jit
def _reconstruct_backward(weight, theta, gradients, elements, grad):
    """Adds to theta's gradient and returns that of the elements, given V's."""
    grad_elements = ()
    if weight.DEPTH < 2:
        for u in tl.static_range(weight.NUM_HASHES):
            grad_elements = grad_elements + (grad * theta[u],)
            if weight.DEPTH == 1:
                _add_to_theta(weight, gradients, u, grad * elements[u] * weight.scale)
    elif weight.DEPTH == 2:
        grad_elements = _last_layers_backward(
            weight, theta, gradients, 0, weight.NUM_HASHES, elements, grad
        )
    else:
        FIRST: tl.constexpr = (weight.NUM_HASHES + 1) * weight.WIDTH
        hidden = _hidden(weight, theta, 0, weight.NUM_HASHES, elements)
        grads = _last_layers_backward(weight, theta, gradients, FIRST, weight.WIDTH, hidden, grad)
        for j in tl.static_range(weight.WIDTH):
            grad_elements = _unit_backward(
                weight, theta, gradients, 0, weight.NUM_HASHES, j,
                elements, hidden[j], grads[j], grad_elements,
            )  # fmt: skip
    return grad_elements


@triton.jit
def add_gradient(pointers, values, mask, units, FIXED_POINT: tl.constexpr):
    """Adds float32 values to a gradient that may be fixed-point, see Gradients."""
    if FIXED_POINT:
        values = (values * tl.load(units)).to(tl.int64)
    tl.atomic_add(pointers, values, mask=mask, sem="relaxed")


@triton.jit
def _gather_backward(weight, theta, gradients, offsets, negatives, grad, mask):
    """Adds to the gradients, given V's and what is behind it, see draws; returns V."""
    elements = _gather(weight, offsets, negatives)
    grad = tl.reshape(grad, elements[0].shape)
    grad_elements = _reconstruct_backward(weight, theta, gradients, elements, grad)
    for u in tl.static_range(weight.NUM_HASHES):
        values = tl.where(negatives[u], -grad_elements[u], grad_elements[u])
        add_gradient(
            gradients.pool + offsets[u], values, mask, gradients.units, gradients.FIXED_POINT
        )
    return _reconstruct(weight, theta, elements)


@triton.jit
def virtual_tile_backward(
    weight, theta, gradients, keys, bases, first_col, COLS: tl.constexpr, grad, rows=None
):
    """Adds to the gradients of pool and theta.

    Args:
        theta, keys, bases, first_col: of virtual_tile.
        grad: of V, float32 [R, COLS], zero at what is not part of V.
        rows: bool [R], those whose grad is not all zeros: the others then add nothing to the pool's
            gradient instead of zeros. None for all.

    Returns:
        What virtual_tile does; it costs nothing where it is not used.
    """
    blocks, inner = _columns(weight, first_col, COLS)
    offsets, negatives = draws(weight, keys, bases, blocks, inner)
    if rows is not None:
        rows = rows[:, None, None]
    values = _gather_backward(weight, theta, gradients, offsets, negatives, grad, rows)
    return tl.reshape(values, (keys.shape[0], COLS))


@triton.jit
def _halves(x):
    """The left and the right columns of x [R, COLS]."""
    pair = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(pair, (0, 2, 1)))


@triton.jit
def wide_tile_backward(
    weight, theta, gradients, keys, bases, first_col, COLS: tl.constexpr, CHUNK: tl.constexpr, grad
):
    """virtual_tile_backward, CHUNK columns at a time for what registers hold of each."""
    if COLS > CHUNK:
        HALF: tl.constexpr = COLS // 2
        left, right = _halves(grad)
        wide_tile_backward(weight, theta, gradients, keys, bases, first_col, HALF, CHUNK, left)
        wide_tile_backward(
            weight, theta, gradients, keys, bases, first_col + HALF, HALF, CHUNK, right
        )
    else:
        virtual_tile_backward(weight, theta, gradients, keys, bases, first_col, COLS, grad)


@triton.jit
def virtual_elements_backward(weight, theta, gradients, keys, bases, first_col, grad, inside):
    """The same for neighbouring columns that have a row each.

    Args:
        keys, bases: of the rows, uint32 [R, COLS].
        first_col: uint32, of any alignment.
        grad: float32 [R, COLS], zero outside.
        inside: bool [R, COLS], what is part of V.
    """
    cols = first_col + tl.arange(0, grad.shape[1]).to(tl.uint32)
    inner = (cols % weight.BLOCK).to(tl.int32)[None, :, None]
    offsets, negatives = draws(weight, keys, bases, cols // weight.BLOCK, inner)
    _gather_backward(weight, theta, gradients, offsets, negatives, grad, inside[:, :, None])
