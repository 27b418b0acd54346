"""Convolutions that every way of running the operators is tried on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from hfh_kernels import HashSpec, functional
from hfh_kernels.ops.conv2d.reference import Geometry
from tests.samples import (
    BFLOAT16,
    FLOAT64,
    Arguments,
    Sample,
    assert_matches,
    differentiate,
    grid,
)

SPEC = HashSpec(seed=1, num_hashes=4, pool_size=640, block=32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvolutionSample(Sample):
    """A convolution, where it lies in its virtual weight, and the shape and dtypes of a call."""

    hash_spec: HashSpec = SPEC
    batch: tuple[int, ...] = (2,)
    in_channels: int = 6
    out_channels: int = 8
    size: tuple[int, int] = (9, 7)
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    channels_last: bool = False

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    @property
    def output_size(self) -> tuple[int, ...]:
        return (*self.batch, self.out_channels, *self.geometry.output_size(self.size))

    def arguments(self) -> Arguments:
        weight = dataclasses.replace(
            Sample(name="", hash_spec=self.hash_spec),
            reconstruction=self.reconstruction,
            dtype=self.dtype,
            pool_dtype=self.pool_dtype,
            theta_dtype=self.theta_dtype,
            has_bias=self.has_bias,
            out_features=self.out_channels,
        ).arguments()
        generator = torch.Generator().manual_seed(2)
        input = grid(*self.batch, self.in_channels, *self.size, generator=generator)
        return weight._replace(input=self.in_format(input.to(self.dtype)))

    def grad_output(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return self.in_format(grid(*self.output_size, generator=generator).to(self.dtype))

    def in_format(self, images: Tensor) -> Tensor:
        if self.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def convolve(self, arguments: Arguments, backend: str = "cpu") -> Tensor:
        return functional.conv2d(
            *arguments,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            hash_spec=self.hash_spec,
            reconstruction=self.reconstruction,
            scale=self.scale,
            row_offset=self.row_offset,
            col_offset=self.col_offset,
            backend=backend,
        )


def run(sample: ConvolutionSample, arguments: Arguments, backend: str = "cpu") -> dict[str, Tensor]:
    """The output and the gradient of each tensor, by name."""
    leaves = arguments.require_grad()
    output = sample.convolve(leaves, backend)
    return differentiate(output, leaves, sample.grad_output().to(output.dtype))


def assert_matches_reference(sample: ConvolutionSample) -> None:
    arguments = sample.arguments()
    actual = run(sample, arguments)
    expected = run(sample, arguments.double(), backend="reference")
    dtypes = arguments._asdict() | {"output": arguments.input}
    for name, result in actual.items():
        assert result.dtype == dtypes[name].dtype, name
        assert_matches(result, expected[name], sample.dtype)


def one(name: str, **changes: object) -> ConvolutionSample:
    return dataclasses.replace(ConvolutionSample(name=name), **changes)  # type: ignore[arg-type]


LARGE = one("products with patches", in_channels=60, out_channels=260, size=(5, 6))
"""A weight of more than half a MiB on few positions."""

LONG = one(
    "products, long patches", in_channels=448, out_channels=72, size=(14, 15), has_bias=False
)
"""More patches than are held at once, and so are the weight's columns, which cuts a channel."""

CONVOLUTIONS = [
    one("default"),
    one("channels last", channels_last=True),
    one("every option", kernel_size=(2, 4), stride=(3, 2), padding=(2, 0), dilation=(1, 2)),
    one("one tap", kernel_size=(1, 1), padding=(0, 0)),
    one("groups", groups=2, stride=(2, 1)),
    one("depthwise", groups=6, out_channels=12, channels_last=True),
    one("a part of a larger weight", row_offset=2**32 - 8, col_offset=2**31 + 13, groups=2),
    one("bfloat16", dtype=BFLOAT16, pool_dtype=BFLOAT16, in_channels=9, has_bias=False),
    one("bfloat16 in groups", dtype=BFLOAT16, in_channels=16, out_channels=24, groups=4),
    one("float64", channels_last=True, stride=(1, 2)).in_dtype(FLOAT64),
    one("float64, one tap, channels last", kernel_size=(1, 1), padding=(0, 0), channels_last=True)
    .in_dtype(FLOAT64),
    LARGE,
    dataclasses.replace(LARGE, name="products, channels last", channels_last=True),
    dataclasses.replace(LARGE, name="products, options", stride=(2, 1), dilation=(2, 1)),
    one("products, one tap", in_channels=400, out_channels=360, kernel_size=(1, 1),
        padding=(0, 0), size=(5, 6)),
    one("products, one strided tap, channels last", in_channels=400, out_channels=360,
        kernel_size=(1, 1), padding=(0, 0), stride=(2, 2), channels_last=True),
    LONG,
    dataclasses.replace(LONG, name="products, long patches, bfloat16", dtype=BFLOAT16),
    one("packed, few positions", in_channels=33, out_channels=133,
        kernel_size=(5, 5), padding=(2, 3), size=(7, 6)),
    one("packed, options", in_channels=48, out_channels=130, size=(33, 31), kernel_size=(3, 2),
        stride=(2, 1), padding=(2, 1), dilation=(3, 2)),
    one("packed, options, channels last", in_channels=80, out_channels=96, size=(17, 15),
        kernel_size=(2, 3), padding=(3, 0), dilation=(2, 1), channels_last=True),
    one("packed, parts of rows and of columns", in_channels=40, out_channels=600, batch=(1,),
        size=(2, 530), kernel_size=(1, 3), padding=(0, 1)),
    one("packed, one tap, parts of channels", in_channels=600, out_channels=136, size=(11, 10),
        kernel_size=(1, 1), padding=(0, 0), channels_last=True),
    one("packed, pixels too many to turn round", in_channels=32, out_channels=32, batch=(1,),
        size=(210, 90), kernel_size=(2, 1), stride=(100, 1), padding=(0, 0), dilation=(100, 1),
        has_bias=False),
    one("products, an image of its own", in_channels=1, out_channels=2, batch=(1,),
        size=(730, 731)),
    one("platform, parts of the rows", in_channels=60, out_channels=260, size=(23, 24)),
    one("platform, parts of the groups and images", in_channels=40, out_channels=40, groups=40,
        size=(96, 97), batch=(3,)),
]  # fmt: skip

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1, :1].expand_as(x),
    "some channels": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "flipped formats": lambda x: x.contiguous(memory_format=torch.channels_last),
}
"""What callers pass that is not contiguous, by name: functions of contiguous images."""
