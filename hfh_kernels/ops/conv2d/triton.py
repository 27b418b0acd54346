"""``conv2d`` in Triton: implicit products of patches, the virtual weight made tile by tile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfh_kernels.ops import tuning
from hfh_kernels.ops.conv2d.kernels import (
    Convolution,
    Images,
    conv2d_bwd_input_kernel,
    conv2d_bwd_weight_kernel,
    conv2d_fwd_kernel,
)
from hfh_kernels.ops.conv2d.op import new_images
from hfh_kernels.ops.conv2d.reference import Geometry
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
from hfh_kernels.ops.tile import VirtualWeight
from hfh_kernels.ops.tuning import Device, Tiles


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
        num_m = num_tiles(positions, tiles.m)
        programs = num_m * num_tiles(convolution.out_channels, tiles.n) * convolution.groups
        parts = tuning.num_parts(programs, num_tiles(cols + start, tiles.k), tiles.warps, device)
        output = _parts(parts, size, input)
        with on_device(input):
            conv2d_fwd_kernel[(programs * parts,)](
                _images(input), virtual, input if bias is None else bias, _images(output),
                convolution, num_m, start,
                TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, PARTS=parts,
                HAS_BIAS=bias is not None,
                PRECISION=_precision(input), **tiles.options,
            )  # fmt: skip
        return _total(output, parts, input)

    if positions == 0:
        return new_images(input, size)
    return tuning.run("conv2d", tuning.rows_regime(positions), virtual, input, launch)


def conv2d_backward_input(
    grad_output: Tensor, pool: Tensor, theta: Tensor, input_size: Sequence[int], *arguments: Any
) -> Tensor:
    """See the reference."""
    require_inputs(grad_output=grad_output, pool=pool, theta=theta)
    convolution = _convolution_of(grad_output, input_size, arguments)
    virtual, cols = _virtual_weight(pool, theta, convolution, arguments[5:])
    images, _, height, width = input_size
    stride = convolution.stride_y, convolution.stride_x
    positions = images * num_tiles(height, stride[0]) * num_tiles(width, stride[1])

    def launch(tiles: Tiles, device: Device) -> Tensor:
        tiles = _no_larger(tiles, convolution.out_channels, convolution.in_channels)
        taps = cols // convolution.in_channels
        # Only a lone tap's columns are neighbours, and made as such.
        start = lead(virtual, tiles.k) if taps == 1 else 0
        num_m = num_tiles(positions, tiles.m)
        num_k = num_tiles(convolution.in_channels + start, tiles.k)
        programs = num_m * num_k * math.prod(stride) * convolution.groups
        steps = num_tiles(convolution.out_channels, tiles.n) * taps
        parts = tuning.num_parts(programs, steps, tiles.warps, device)
        grad_input = _parts(parts, input_size, grad_output)
        with on_device(grad_output):
            conv2d_bwd_input_kernel[(programs * parts,)](
                _images(grad_output), virtual, _images(grad_input), convolution, num_m, start,
                TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, PARTS=parts,
                PRECISION=_precision(grad_output),
                **tiles.options,
            )  # fmt: skip
        return _total(grad_input, parts, grad_output)

    if positions == 0:
        return new_images(grad_output, input_size)
    regime = tuning.rows_regime(positions)
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
        num_m = num_tiles(positions, tiles.m)
        num_n = num_tiles(convolution.out_channels, tiles.n)
        programs = num_n * num_tiles(cols + start, tiles.k) * convolution.groups
        parts = tuning.num_parts(programs, num_m, tiles.warps, device)
        num_terms = parts * grad_output.shape[1] * cols * virtual.NUM_HASHES.value
        sums = GradientSums(virtual, programs * parts, num_terms, bound)
        with on_device(input):
            conv2d_bwd_weight_kernel[(programs * parts,)](
                _images(grad_output), _images(input), virtual, sums.argument(), convolution,
                num_m, start,
                TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, CHUNK=tiles.chunk, PARTS=parts,
                PRECISION=_precision(grad_output),
                **tiles.options,
            )  # fmt: skip
        return sums.result()

    if positions == 0:
        return torch.zeros_like(pool), torch.zeros_like(theta)
    regime = tuning.rows_regime(positions)
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
