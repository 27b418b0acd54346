"""Gradients of tiles of a virtual weight in Triton, once for every kernel; see tile.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hfh_kernels.ops.tile import columns, draws, gather, hidden_layer, hidden_unit, reconstruct


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
        unit = hidden_unit(weight, theta, START, INPUTS, j, x)
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
        hidden = hidden_layer(weight, theta, 0, weight.NUM_HASHES, elements)
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
    elements = gather(weight, offsets, negatives)
    grad = tl.reshape(grad, elements[0].shape)
    grad_elements = _reconstruct_backward(weight, theta, gradients, elements, grad)
    for u in tl.static_range(weight.NUM_HASHES):
        values = tl.where(negatives[u], -grad_elements[u], grad_elements[u])
        add_gradient(
            gradients.pool + offsets[u], values, mask, gradients.units, gradients.FIXED_POINT
        )
    return reconstruct(weight, theta, elements)


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
    blocks, inner = columns(weight, first_col, COLS)
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
