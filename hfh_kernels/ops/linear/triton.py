"""``linear`` in Triton: the virtual weight is made tile by tile inside the products."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfh_kernels.ops import tuning
from hfh_kernels.ops.launch import (
    MAX_EXTENT,
    GradientSums,
    dot_precision,
    lead,
    num_tiles,
    on_device,
    require_inputs,
    virtual_weight,
)
from hfh_kernels.ops.library import require_bias
from hfh_kernels.ops.tile import (
    first_col,
    hash_rows,
    load_theta,
    logical_rows,
    product,
    virtual_tile,
)
from hfh_kernels.ops.tile_gradients import wide_tile_backward
from hfh_kernels.ops.tuning import Device, Tiles


@triton.jit
def _linear_fwd_kernel(
    input, weight, bias, output, batch, out_features, in_features, lead,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output [PARTS, batch, out_features], whose sum is input [batch, in_features] V^T + bias."""
    num_m, num_n = tl.cdiv(batch, TILE_M), tl.cdiv(out_features, TILE_N)
    part = tl.program_id(0) // (num_m * num_n)
    tile = tl.program_id(0) % (num_m * num_n)
    tile_m, tile_n = tl.swizzle2d(tile // num_n, tile % num_n, num_m, num_n, GROUP_M)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    keys, bases = hash_rows(weight, logical_rows(weight, n))
    theta = load_theta(weight)
    rows = input + m[:, None].to(tl.int64) * in_features
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for tile_k in range(part, tl.cdiv(in_features + lead, TILE_K), PARTS):
        start = tile_k * TILE_K - lead
        k = start + tl.arange(0, TILE_K)
        inside = (m < batch)[:, None] & ((k >= 0) & (k < in_features))[None, :]
        x = tl.load(rows + k[None, :], mask=inside, other=0.0)
        v = virtual_tile(weight, theta, keys, bases, first_col(weight, start), TILE_K)
        if RAGGED:
            # What lies beyond V may be NaN, and makes one of the zeros it is multiplied by.
            v = tl.where(((k >= 0) & (k < in_features))[None, :], v, 0.0)
        total = product(x, tl.trans(v.to(x.dtype)), total, PRECISION)
    if HAS_BIAS and part == 0:
        total += tl.load(bias + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    inside = (m < batch)[:, None] & (n < out_features)[None, :]
    positions = (part.to(tl.int64) * batch + m[:, None]) * out_features + n[None, :]
    tl.store(output + positions, total, mask=inside)


@triton.jit
def _linear_bwd_input_kernel(
    grad_output, weight, grad_input, batch, out_features, in_features, lead,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_input [PARTS, batch, in_features], whose sum is grad_output [batch, out_features] V."""
    num_m, num_k = tl.cdiv(batch, TILE_M), tl.cdiv(in_features + lead, TILE_K)
    part = tl.program_id(0) // (num_m * num_k)
    tile = tl.program_id(0) % (num_m * num_k)
    tile_m, tile_k = tl.swizzle2d(tile // num_k, tile % num_k, num_m, num_k, GROUP_M)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    start = tile_k * TILE_K - lead
    k = start + tl.arange(0, TILE_K)
    theta = load_theta(weight)
    rows = grad_output + m[:, None].to(tl.int64) * out_features
    total = tl.zeros((TILE_M, TILE_K), tl.float32)
    for tile_n in range(part, tl.cdiv(out_features, TILE_N), PARTS):
        n = tile_n * TILE_N + tl.arange(0, TILE_N)
        inside = (m < batch)[:, None] & (n < out_features)[None, :]
        g = tl.load(rows + n[None, :], mask=inside, other=0.0)
        keys, bases = hash_rows(weight, logical_rows(weight, n))
        v = virtual_tile(weight, theta, keys, bases, first_col(weight, start), TILE_K)
        if RAGGED:
            v = tl.where((n < out_features)[:, None], v, 0.0)
        total = product(g, v.to(g.dtype), total, PRECISION)
    inside = (m < batch)[:, None] & ((k >= 0) & (k < in_features))[None, :]
    positions = (part.to(tl.int64) * batch + m[:, None]) * in_features + k[None, :]
    tl.store(grad_input + positions, total, mask=inside)


@triton.jit
def _linear_bwd_weight_kernel(
    grad_output, input, weight, gradients, batch, out_features, in_features, lead,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients; that of a tile of V stays in registers, over one part of the batch."""
    num_n, num_k = tl.cdiv(out_features, TILE_N), tl.cdiv(in_features + lead, TILE_K)
    part = tl.program_id(0) // (num_n * num_k)
    tile = tl.program_id(0) % (num_n * num_k)
    n = (tile // num_k) * TILE_N + tl.arange(0, TILE_N)
    start = (tile % num_k) * TILE_K - lead
    k = start + tl.arange(0, TILE_K)
    inside_n = n < out_features
    inside_k = (k >= 0) & (k < in_features)
    grad = tl.zeros((TILE_N, TILE_K), tl.float32)
    for tile_m in range(part, tl.cdiv(batch, TILE_M), PARTS):
        m = tile_m * TILE_M + tl.arange(0, TILE_M)
        rows = m[:, None].to(tl.int64)
        inside_m = (m < batch)[:, None]
        g = tl.load(
            grad_output + rows * out_features + n[None, :],
            mask=inside_m & inside_n[None, :],
            other=0.0,
        )
        x = tl.load(
            input + rows * in_features + k[None, :], mask=inside_m & inside_k[None, :], other=0.0
        )
        grad = product(tl.trans(g), x.to(g.dtype), grad, PRECISION)
    # Zeros times what is not finite are not zero.
    grad = tl.where(inside_n[:, None] & inside_k[None, :], grad, 0.0)
    keys, bases = hash_rows(weight, logical_rows(weight, n))
    theta = load_theta(weight)
    wide_tile_backward(
        weight, theta, gradients, keys, bases, first_col(weight, start), TILE_K, CHUNK, grad
    )


def linear(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    out_features: int,
    *weight: Any,
) -> Tensor:
    """See the reference."""
    require_inputs(input=input, pool=pool, theta=theta)
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, received shape []")
    in_features = input.shape[-1]
    if bias is not None:
        require_bias(bias, input, out_features)
        bias = bias.contiguous()
    virtual = virtual_weight(pool, theta, out_features, in_features, weight)
    rows = _matrix("input", input)
    batch = rows.shape[0]

    def launch(tiles: Tiles, device: Device) -> Tensor:
        start = lead(virtual, tiles.k)
        programs = num_tiles(batch, tiles.m) * num_tiles(out_features, tiles.n)
        parts = tuning.num_parts(
            programs, num_tiles(in_features + start, tiles.k), tiles.warps, device
        )
        output = _parts(parts, (batch, out_features), input)
        with on_device(input):
            _linear_fwd_kernel[(programs * parts,)](
                rows, virtual, rows if bias is None else bias, output,
                batch, out_features, in_features, start,
                TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, GROUP_M=_GROUP_M, PARTS=parts,
                HAS_BIAS=bias is not None, RAGGED=(in_features | start) % tiles.k != 0,
                PRECISION=_precision(input), **tiles.options,
            )  # fmt: skip
        return _total(output, input.dtype)

    shape = (*input.shape[:-1], out_features)
    if batch == 0 or out_features == 0:
        return input.new_empty(shape)
    regime = tuning.rows_regime(batch)
    return tuning.run("linear", regime, virtual, input, launch).view(shape)


def linear_backward_input(
    grad_output: Tensor, pool: Tensor, theta: Tensor, in_features: int, *weight: Any
) -> Tensor:
    """See the reference."""
    require_inputs(grad_output=grad_output, pool=pool, theta=theta)
    out_features = grad_output.shape[-1]
    virtual = virtual_weight(pool, theta, out_features, in_features, weight)
    rows = _matrix("grad_output", grad_output)
    batch = rows.shape[0]

    def launch(tiles: Tiles, device: Device) -> Tensor:
        start = lead(virtual, tiles.k)
        programs = num_tiles(batch, tiles.m) * num_tiles(in_features + start, tiles.k)
        parts = tuning.num_parts(programs, num_tiles(out_features, tiles.n), tiles.warps, device)
        grad_input = _parts(parts, (batch, in_features), grad_output)
        with on_device(grad_output):
            _linear_bwd_input_kernel[(programs * parts,)](
                rows, virtual, grad_input, batch, out_features, in_features, start,
                TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, GROUP_M=_GROUP_M, PARTS=parts,
                RAGGED=out_features % tiles.n != 0, PRECISION=_precision(grad_output),
                **tiles.options,
            )  # fmt: skip
        return _total(grad_input, grad_output.dtype)

    shape = (*grad_output.shape[:-1], in_features)
    if batch == 0 or in_features == 0:
        return grad_output.new_empty(shape)
    regime = tuning.rows_regime(batch)
    return tuning.run("linear_backward_input", regime, virtual, grad_output, launch).view(shape)


def linear_backward_weight(
    grad_output: Tensor, input: Tensor, pool: Tensor, theta: Tensor, *weight: Any
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    require_inputs(grad_output=grad_output, input=input, pool=pool, theta=theta)
    out_features, in_features = grad_output.shape[-1], input.shape[-1]
    virtual = virtual_weight(pool, theta, out_features, in_features, weight)
    grads = _matrix("grad_output", grad_output)
    rows = _matrix("input", input)
    batch = rows.shape[0]

    def bound() -> Tensor:
        # By Cauchy and Schwarz: each gradient of V is a product of two columns.
        columns = (tensor.float().norm(dim=0).max() for tensor in (grads, rows))
        return next(columns) * next(columns)

    def launch(tiles: Tiles, device: Device) -> tuple[Tensor, Tensor]:
        start = lead(virtual, tiles.k)
        programs = num_tiles(out_features, tiles.n) * num_tiles(in_features + start, tiles.k)
        parts = tuning.num_parts(programs, num_tiles(batch, tiles.m), tiles.warps, device)
        num_terms = parts * out_features * in_features * virtual.NUM_HASHES.value
        sums = GradientSums(virtual, programs * parts, num_terms, bound)
        with on_device(input):
            _linear_bwd_weight_kernel[(programs * parts,)](
                grads, rows, virtual, sums.argument(), batch, out_features, in_features, start,
                TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, CHUNK=tiles.chunk, PARTS=parts,
                PRECISION=_precision(grad_output),
                **tiles.options,
            )  # fmt: skip
        return sums.result()

    if grads.numel() == 0 or rows.numel() == 0:
        return torch.zeros_like(pool), torch.zeros_like(theta)
    regime = tuning.rows_regime(batch)
    return tuning.run("linear_backward_weight", regime, virtual, grad_output, launch)


_GROUP_M = 8
"""Tiles of rows that run side by side, so that they find each other's columns in the cache."""


def _matrix(name: str, tensor: Tensor) -> Tensor:
    """[..., features] as contiguous [batch, features]."""
    batch = math.prod(tensor.shape[:-1])
    if batch > MAX_EXTENT:
        raise ValueError(f"{name} must have at most {MAX_EXTENT} rows here, received {batch}")
    return tensor.reshape(batch, tensor.shape[-1]).contiguous()


def _parts(parts: int, shape: tuple[int, int], like: Tensor) -> Tensor:
    """Room for the parts of a sum: where there are several, in float32."""
    dtype = like.dtype if parts == 1 else torch.float32
    return like.new_empty((parts, *shape), dtype=dtype)


def _total(parts: Tensor, dtype: torch.dtype) -> Tensor:
    total = parts[0] if len(parts) == 1 else parts.sum(0)
    return total.to(dtype)


def _precision(tensor: Tensor) -> str:
    # torch.get_float32_matmul_precision raises where it was set by this newer name.
    matmul: Any = torch.backends.cuda.matmul
    return dot_precision(tensor.dtype, matmul.fp32_precision == "tf32")
