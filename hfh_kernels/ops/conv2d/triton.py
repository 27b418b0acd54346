"""``conv2d`` in Triton: implicit products of patches, the virtual weight made tile by tile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfh_kernels.ops import tuning
from hfh_kernels.ops.conv2d.op import new_images
from hfh_kernels.ops.conv2d.reference import Geometry
from hfh_kernels.ops.launch import (
    MAX_EXTENT,
    GradientSums,
    dot_precision,
    lead,
    on_device,
    require_inputs,
    virtual_weight,
)
from hfh_kernels.ops.library import require_bias
from hfh_kernels.ops.tile import (
    VirtualWeight,
    first_col,
    hash_rows,
    load_theta,
    logical_rows,
    product,
    virtual_columns,
    virtual_tile,
    virtual_tile_backward,
)
from hfh_kernels.ops.tuning import Device, Tiles

_OUTSIDE = tl.constexpr(2**31)
"""A coordinate of no image: images, with their padding, are smaller."""


class Images(NamedTuple):
    """A tensor [images, channels, height, width] as a kernel receives it."""

    data: Any
    height: Any
    width: Any
    image_stride: Any
    channel_stride: Any
    y_stride: Any
    x_stride: Any
    CHANNELS_LAST: Any
    """Whether channels lie closer to each other than pixels."""
    OFFSET: Any
    """The type that counts elements from the first: int32 where that reaches the last."""


class Convolution(NamedTuple):
    """How the kernel moves over the images."""

    images: Any
    groups: Any
    in_channels: Any
    """Of a group, as are out_channels."""
    out_channels: Any
    stride_y: Any
    stride_x: Any
    padding_y: Any
    padding_x: Any
    dilation_y: Any
    dilation_x: Any
    KERNEL_HEIGHT: Any
    KERNEL_WIDTH: Any


@triton.jit
def _positions(tile, TILE: tl.constexpr, height, width):
    """Image, int64, y and x, int32, of a tile of the pixels of images."""
    size = tl.full((), height * width, tl.uint32)
    width = tl.full((), width, tl.uint32)
    start = tl.full((), tile, tl.int64) * TILE
    first = start // size.to(tl.int64)
    index = (start - first * size).to(tl.uint32) + tl.arange(0, TILE).to(tl.uint32)
    pixel = index % size
    return first + index // size, (pixel // width).to(tl.int32), (pixel % width).to(tl.int32)


# An element of a tile is where a pixel and a channel add up: each brings an offset, y and x. So a
# patch is the pixel at its corner, and the tap of a column of V comes with the channel.


@triton.jit
def _pixels(images, image, y, x, inside):
    offsets = image.to(images.OFFSET) * images.image_stride
    offsets += y.to(images.OFFSET) * images.y_stride + x.to(images.OFFSET) * images.x_stride
    return offsets, tl.where(inside, y.to(tl.uint32), _OUTSIDE), x.to(tl.uint32)


@triton.jit
def _channels(images, channel, y, x, inside):
    y = y + tl.zeros_like(channel)
    x = x + tl.zeros_like(channel)
    offsets = channel.to(images.OFFSET) * images.channel_stride
    offsets += y.to(images.OFFSET) * images.y_stride + x.to(images.OFFSET) * images.x_stride
    # Another coordinate than _pixels takes: twice _OUTSIDE is 0.
    return offsets, y.to(tl.uint32), tl.where(inside, x.to(tl.uint32), _OUTSIDE)


@triton.jit
def _elements(images, rows, cols):
    """Pointers, and which of them are inside."""
    y = rows[1][:, None] + cols[1][None, :]
    x = rows[2][:, None] + cols[2][None, :]
    inside = (y < images.height) & (x < images.width)
    return images.data + (rows[0][:, None] + cols[0][None, :]), inside


@triton.jit
def _load(images, pixels, channels):
    """Elements [pixels, channels], zero outside; neighbouring threads read what lies closer."""
    if images.CHANNELS_LAST:
        pointers, inside = _elements(images, pixels, channels)
        tile = tl.load(pointers, mask=inside, other=0.0)
    else:
        pointers, inside = _elements(images, channels, pixels)
        tile = tl.trans(tl.load(pointers, mask=inside, other=0.0))
    return tile


@triton.jit
def _store(images, pixels, channels, tile):
    """As _load reads."""
    tile = tile.to(images.data.dtype.element_ty)
    if images.CHANNELS_LAST:
        pointers, inside = _elements(images, pixels, channels)
        tl.store(pointers, tile, mask=inside)
    else:
        pointers, inside = _elements(images, channels, pixels)
        tl.store(pointers, tl.trans(tile), mask=inside)


@triton.jit
def _patches(input, convolution, image, y, x):
    """The pixels of _load for patches, by their position in the output."""
    return _pixels(
        input,
        image,
        y * convolution.stride_y - convolution.padding_y,
        x * convolution.stride_x - convolution.padding_x,
        image < convolution.images,
    )


@triton.jit
def _taps(input, convolution, group, k, inside):
    """The channels of _load for patches, by column of V."""
    WIDTH: tl.constexpr = convolution.KERNEL_WIDTH
    TAPS: tl.constexpr = convolution.KERNEL_HEIGHT * WIDTH
    return _channels(
        input,
        group * convolution.in_channels + k // TAPS,
        k % TAPS // WIDTH * convolution.dilation_y,
        k % WIDTH * convolution.dilation_x,
        inside,
    )


@triton.jit
def _conv2d_fwd_kernel(
    input, weight, bias, output, convolution, num_m, lead,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output, PARTS one behind another, whose sum is a row of patches times V^T, plus bias."""
    COLS_PER_CHANNEL: tl.constexpr = convolution.KERNEL_HEIGHT * convolution.KERNEL_WIDTH
    num_n = tl.cdiv(convolution.out_channels, TILE_N)
    tile_n, rest = tl.program_id(0) % num_n, tl.program_id(0) // num_n
    tile_m, rest = rest % num_m, rest // num_m
    group, part = rest % convolution.groups, rest // convolution.groups
    image, y, x = _positions(tile_m, TILE_M, output.height, output.width)
    patches = _patches(input, convolution, image, y, x)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    rows = group * convolution.out_channels + n
    inside_n = n < convolution.out_channels
    keys, bases = hash_rows(weight, logical_rows(weight, rows))
    theta = load_theta(weight)
    cols = convolution.in_channels * COLS_PER_CHANNEL
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for tile_k in range(part, tl.cdiv(cols + lead, TILE_K), PARTS):
        start = tile_k * TILE_K - lead
        # Unsigned, what is before the first column is beyond the last.
        k = (start + tl.arange(0, TILE_K)).to(tl.uint32)
        inside_k = k < cols
        a = _load(input, patches, _taps(input, convolution, group, k, inside_k))
        v = virtual_tile(weight, theta, keys, bases, first_col(weight, start), TILE_K)
        v = tl.where(inside_k[None, :], v, 0.0)
        total = product(a, tl.trans(v.to(a.dtype)), total, PRECISION)
    if HAS_BIAS and part == 0:
        total += tl.load(bias + rows, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    inside_m = image < convolution.images
    pixels = _pixels(output, part * convolution.images + image, y, x, inside_m)
    _store(output, pixels, _channels(output, rows, 0, 0, inside_n), total)


@triton.jit
def _conv2d_bwd_input_kernel(
    grad_output, weight, grad_input, convolution, num_m, lead,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_input, PARTS one behind another, that sum to it.

    The pixels of a tile are stride apart, in what is a phase here, so that they were read by the
    same taps; TILE_K counts channels.
    """
    WIDTH: tl.constexpr = convolution.KERNEL_WIDTH
    TAPS: tl.constexpr = convolution.KERNEL_HEIGHT * WIDTH
    stride_y, stride_x = convolution.stride_y, convolution.stride_x
    num_k = tl.cdiv(convolution.in_channels + lead, TILE_K)
    num_n = tl.cdiv(convolution.out_channels, TILE_N)
    tile_k, rest = tl.program_id(0) % num_k, tl.program_id(0) // num_k
    tile_m, rest = rest % num_m, rest // num_m
    phase_x, rest = rest % stride_x, rest // stride_x
    phase_y, rest = rest % stride_y, rest // stride_y
    group, part = rest % convolution.groups, rest // convolution.groups
    image, y, x = _positions(
        tile_m, TILE_M, tl.cdiv(grad_input.height, stride_y), tl.cdiv(grad_input.width, stride_x)
    )
    inside_m = image < convolution.images
    pixels = _pixels(grad_output, image, y, x, inside_m)
    start = tile_k * TILE_K - lead
    k = start + tl.arange(0, TILE_K)
    theta = load_theta(weight)
    total = tl.zeros((TILE_M, TILE_K), tl.float32)
    for step in range(part, num_n * TAPS, PARTS):
        tap = step // num_n
        from_y = phase_y + convolution.padding_y - tap // WIDTH * convolution.dilation_y
        from_x = phase_x + convolution.padding_x - tap % WIDTH * convolution.dilation_x
        if (from_y % stride_y == 0) & (from_x % stride_x == 0):
            n = step % num_n * TILE_N + tl.arange(0, TILE_N)
            inside_n = n < convolution.out_channels
            rows = group * convolution.out_channels + n
            channels = _channels(
                grad_output, rows, from_y // stride_y, from_x // stride_x, inside_n
            )
            g = _load(grad_output, pixels, channels)
            keys, bases = hash_rows(weight, logical_rows(weight, rows))
            if TAPS == 1:
                v = virtual_tile(weight, theta, keys, bases, first_col(weight, start), TILE_K)
            else:
                cols = first_col(weight, tap) + (k * TAPS).to(tl.uint32)
                v = virtual_columns(weight, theta, keys, bases, cols)
            v = tl.where(inside_n[:, None], v, 0.0)
            total = product(g, v.to(g.dtype), total, PRECISION)
    pixels = _pixels(
        grad_input,
        part * convolution.images + image,
        y * stride_y + phase_y,
        x * stride_x + phase_x,
        inside_m,
    )
    inside_k = (k >= 0) & (k < convolution.in_channels)
    channels = _channels(grad_input, group * convolution.in_channels + k, 0, 0, inside_k)
    _store(grad_input, pixels, channels, total)


@triton.jit
def _conv2d_bwd_weight_kernel(
    grad_output, input, weight, gradients, convolution, num_m, lead,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients; that of a tile of V stays in registers, over a part of the pixels."""
    COLS_PER_CHANNEL: tl.constexpr = convolution.KERNEL_HEIGHT * convolution.KERNEL_WIDTH
    cols = convolution.in_channels * COLS_PER_CHANNEL
    num_n, num_k = tl.cdiv(convolution.out_channels, TILE_N), tl.cdiv(cols + lead, TILE_K)
    tile_k, rest = tl.program_id(0) % num_k, tl.program_id(0) // num_k
    tile_n, rest = rest % num_n, rest // num_n
    group, part = rest % convolution.groups, rest // convolution.groups
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    rows = group * convolution.out_channels + n
    inside_n = n < convolution.out_channels
    start = tile_k * TILE_K - lead
    # Unsigned, what is before the first column is beyond the last.
    k = (start + tl.arange(0, TILE_K)).to(tl.uint32)
    inside_k = k < cols
    channels = _channels(grad_output, rows, 0, 0, inside_n)
    taps = _taps(input, convolution, group, k, inside_k)
    grad = tl.zeros((TILE_N, TILE_K), tl.float32)
    for tile_m in range(part, num_m, PARTS):
        image, y, x = _positions(tile_m, TILE_M, grad_output.height, grad_output.width)
        pixels = _pixels(grad_output, image, y, x, image < convolution.images)
        g = _load(grad_output, pixels, channels)
        a = _load(input, _patches(input, convolution, image, y, x), taps)
        grad = product(tl.trans(g), a.to(g.dtype), grad, PRECISION)
    # Zeros times what is not finite are not zero.
    grad = tl.where(inside_n[:, None] & inside_k[None, :], grad, 0.0)
    keys, bases = hash_rows(weight, logical_rows(weight, rows))
    theta = load_theta(weight)
    virtual_tile_backward(
        weight, theta, gradients, keys, bases, first_col(weight, start), TILE_K, grad
    )


def conv2d(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    out_channels: int,
    *arguments: Any,
) -> Tensor:
    """See the reference."""
    require_inputs(input=input, pool=pool, theta=theta)
    geometry = Geometry(*arguments[:5])
    convolution = _convolution(geometry, input.shape, out_channels)
    if bias is not None:
        require_bias(bias, input, out_channels)
        bias = bias.contiguous()
    virtual, cols = _virtual_weight(pool, theta, convolution, arguments[5:])
    size = (input.shape[0], out_channels, *geometry.output_size(input.shape[2:]))
    positions = size[0] * size[2] * size[3]

    def launch(tiles: Tiles, device: Device) -> Tensor:
        tiles = _no_larger(tiles, convolution.out_channels, cols)
        start = lead(virtual, tiles.k)
        num_m = triton.cdiv(positions, tiles.m)
        programs = num_m * triton.cdiv(convolution.out_channels, tiles.n) * convolution.groups
        parts = tuning.num_parts(programs, triton.cdiv(cols + start, tiles.k), device)
        output = _parts(parts, size, input)
        with on_device(input):
            _conv2d_fwd_kernel[(programs * parts,)](
                _images(input), virtual, input if bias is None else bias, _images(output),
                convolution, num_m, start,
                TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, PARTS=parts,
                HAS_BIAS=bias is not None,
                PRECISION=_precision(input), num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
        return _total(output, parts, input)

    if positions == 0:
        return new_images(input, size)
    return tuning.run("conv2d", tuning.batch_regime(positions), virtual, input, launch)


def conv2d_backward_input(
    grad_output: Tensor, pool: Tensor, theta: Tensor, input_size: Sequence[int], *arguments: Any
) -> Tensor:
    """See the reference."""
    require_inputs(grad_output=grad_output, pool=pool, theta=theta)
    convolution = _convolution_of(grad_output, input_size, arguments)
    virtual, cols = _virtual_weight(pool, theta, convolution, arguments[5:])
    images, _, height, width = input_size
    stride = convolution.stride_y, convolution.stride_x
    positions = images * triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])

    def launch(tiles: Tiles, device: Device) -> Tensor:
        tiles = _no_larger(tiles, convolution.out_channels, convolution.in_channels)
        taps = cols // convolution.in_channels
        # Only a lone tap's columns are neighbours, and made as such.
        start = lead(virtual, tiles.k) if taps == 1 else 0
        num_m = triton.cdiv(positions, tiles.m)
        num_k = triton.cdiv(convolution.in_channels + start, tiles.k)
        programs = num_m * num_k * math.prod(stride) * convolution.groups
        steps = triton.cdiv(convolution.out_channels, tiles.n) * taps
        parts = tuning.num_parts(programs, steps, device)
        grad_input = _parts(parts, input_size, grad_output)
        with on_device(grad_output):
            _conv2d_bwd_input_kernel[(programs * parts,)](
                _images(grad_output), virtual, _images(grad_input), convolution, num_m, start,
                TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, PARTS=parts,
                PRECISION=_precision(grad_output),
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
        return _total(grad_input, parts, grad_output)

    if positions == 0:
        return new_images(grad_output, input_size)
    regime = tuning.batch_regime(positions)
    return tuning.run("conv2d_backward_input", regime, virtual, grad_output, launch)


def conv2d_backward_weight(
    grad_output: Tensor, input: Tensor, pool: Tensor, theta: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    require_inputs(grad_output=grad_output, input=input, pool=pool, theta=theta)
    convolution = _convolution_of(grad_output, input.shape, arguments)
    virtual, cols = _virtual_weight(pool, theta, convolution, arguments[5:])
    positions = grad_output.numel() // grad_output.shape[1]

    def bound() -> Tensor:
        # By Cauchy and Schwarz: each gradient of V is a product of a channel of grad_output and
        # pixels of a channel of the input, none of them twice.
        norms = (
            torch.linalg.vector_norm(tensor, dim=(0, 2, 3), dtype=torch.float32).max()
            for tensor in (grad_output, input)
        )
        return next(norms) * next(norms)

    def launch(tiles: Tiles, device: Device) -> tuple[Tensor, Tensor]:
        tiles = _no_larger(tiles, convolution.out_channels, cols)
        start = lead(virtual, tiles.k)
        num_m = triton.cdiv(positions, tiles.m)
        num_n = triton.cdiv(convolution.out_channels, tiles.n)
        programs = num_n * triton.cdiv(cols + start, tiles.k) * convolution.groups
        parts = tuning.num_parts(programs, num_m, device)
        num_terms = parts * grad_output.shape[1] * cols * virtual.NUM_HASHES.value
        sums = GradientSums(virtual, programs * parts, num_terms, bound)
        with on_device(input):
            _conv2d_bwd_weight_kernel[(programs * parts,)](
                _images(grad_output), _images(input), virtual, sums.argument(), convolution,
                num_m, start,
                TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, PARTS=parts,
                PRECISION=_precision(grad_output),
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
        return sums.result()

    if positions == 0:
        return torch.zeros_like(pool), torch.zeros_like(theta)
    regime = tuning.batch_regime(positions)
    return tuning.run("conv2d_backward_weight", regime, virtual, grad_output, launch)


def _convolution(geometry: Geometry, input_size: Sequence[int], out_channels: int) -> Convolution:
    geometry.require_valid(input_size, out_channels)
    groups = geometry.groups
    padded = [size + 2 * by for size, by in zip(input_size[2:], geometry.padding, strict=True)]
    if math.prod(padded) > MAX_EXTENT:
        raise ValueError(
            f"images must have at most {MAX_EXTENT} pixels here once padded, received shape "
            f"{list(input_size)} for padding={list(geometry.padding)}"
        )
    return Convolution(
        input_size[0],
        groups,
        input_size[1] // groups,
        out_channels // groups,
        # A step beyond the image is never taken.
        *(min(step, size) for step, size in zip(geometry.stride, padded, strict=True)),
        *geometry.padding,
        *geometry.dilation,
        *(tl.constexpr(size) for size in geometry.kernel_size),
    )


def _convolution_of(
    grad_output: Tensor, input_size: Sequence[int], arguments: Sequence[Any]
) -> Convolution:
    """The convolution that such a gradient comes back to."""
    geometry = Geometry(*arguments[:5])
    if grad_output.dim() != 4:
        raise ValueError(
            "grad_output must be [batch, channels, height, width], "
            f"received shape {list(grad_output.shape)}"
        )
    out_channels = grad_output.shape[1]
    convolution = _convolution(geometry, input_size, out_channels)
    expected = [input_size[0], out_channels, *geometry.output_size(input_size[2:])]
    if list(grad_output.shape) != expected:
        raise ValueError(
            f"grad_output must have shape {expected}, received {list(grad_output.shape)}"
        )
    return convolution


def _virtual_weight(
    pool: Tensor, theta: Tensor, convolution: Convolution, weight: tuple[Any, ...]
) -> tuple[VirtualWeight, int]:
    """And its columns."""
    taps = convolution.KERNEL_HEIGHT.value * convolution.KERNEL_WIDTH.value
    cols = convolution.in_channels * taps
    rows = convolution.groups * convolution.out_channels
    return virtual_weight(pool, theta, rows, cols, weight), cols


def _images(tensor: Tensor) -> Images:
    height, width = tensor.shape[2:]
    image, channel, y, x = strides = tensor.stride()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    offset = tl.constexpr(tl.int32 if last < 2**31 else tl.int64)
    return Images(tensor, height, width, image, channel, y, x, tl.constexpr(channel < x), offset)


def _no_larger(tiles: Tiles, rows: int, cols: int) -> Tiles:
    """Tiles for a V of so many rows and columns: those of a group can be few."""
    n, k = (max(16, triton.next_power_of_2(extent)) for extent in (rows, cols))
    return dataclasses.replace(tiles, n=min(tiles.n, n), k=min(tiles.k, k))


def _parts(parts: int, size: Sequence[int], like: Tensor) -> Tensor:
    """Room for the parts of a sum, one behind another: where there are several, in float32."""
    dtype = like.dtype if parts == 1 else torch.float32
    return new_images(like, (parts * size[0], *size[1:]), dtype)


def _total(images: Tensor, parts: int, like: Tensor) -> Tensor:
    if parts == 1:
        return images
    total = images.unflatten(0, (parts, -1)).sum(0)
    return new_images(like, total.shape).copy_(total)


def _precision(tensor: Tensor) -> str:
    # allow_tf32 raises where it was set by this newer name.
    cudnn: Any = torch.backends.cudnn
    return dot_precision(tensor.dtype, cudnn.conv.fp32_precision == "tf32")
