"""The kernels of ``conv2d`` in Triton: implicit products of patches with tiles of V."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hfh_kernels.ops.tile import (
    first_col,
    hash_rows,
    load_theta,
    logical_rows,
    product,
    virtual_columns,
    virtual_tile,
)
from hfh_kernels.ops.tile_gradients import wide_tile_backward

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
def conv2d_fwd_kernel(
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
def conv2d_bwd_input_kernel(
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
def conv2d_bwd_weight_kernel(
    grad_output, input, weight, gradients, convolution, num_m, lead,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
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
    wide_tile_backward(
        weight, theta, gradients, keys, bases, first_col(weight, start), TILE_K, CHUNK, grad
    )
