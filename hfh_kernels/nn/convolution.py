"""``HFHConv1d`` and ``HFHConv2d``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfh_kernels import functional
from hfh_kernels.functional.convolution import ints
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.nn.pool import Pool
from hfh_kernels.spec import require_int

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _HFHConv(HFHLayer):
    """What both layers are; the arguments are theirs."""

    bias: nn.Parameter | None
    _DIMS: ClassVar[int]
    _FUNCTION: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        pool: Pool,
        num_hashes: int = 4,
        depth: int = 2,
        width: int = 4,
        activation: str = "relu",
        block: int = 32,
        window: int | None = None,
        rows_per_window: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        theta: nn.Parameter | None = None,
    ) -> None:
        require_int("groups", groups, 1, 2**32)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            require_int(name, channels, 1, 2**32)
            if channels % groups:
                raise ValueError(
                    f"{name} must be a multiple of groups={groups}, received {channels}"
                )
        if padding_mode not in _PADDING_MODES:
            raise ValueError(
                f"padding_mode must be one of {_PADDING_MODES}, received {padding_mode!r}"
            )
        sizes = self._ints("kernel_size", kernel_size, 1)
        fan_in = in_channels // groups * math.prod(sizes)
        super().__init__(
            (out_channels, fan_in),
            1 / math.sqrt(3 * fan_in),
            pool=pool,
            num_hashes=num_hashes,
            depth=depth,
            width=width,
            activation=activation,
            block=block,
            window=window,
            rows_per_window=rows_per_window,
            seed=seed,
            theta=theta,
            device=device,
            dtype=dtype,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = sizes
        self.stride = self._ints("stride", stride, 1)
        self.dilation = self._ints("dilation", dilation, 1)
        self.groups = groups
        self.padding_mode = padding_mode
        self.padding: tuple[int, ...] | str
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"padding must be ints, 'valid' or 'same', received {padding!r}")
            if padding == "same" and any(step != 1 for step in self.stride):
                raise ValueError(f"padding='same' needs a stride of 1, received {self.stride}")
            self.padding = padding
        else:
            self.padding = self._ints("padding", padding, 0)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
            self._reset_bias()
        else:
            self.register_parameter("bias", None)

    @classmethod
    def _ints(cls, name: str, value: int | Sequence[int], low: int) -> tuple[int, ...]:
        values = ints(name, value, cls._DIMS)
        for item in values:
            require_int(name, item, low, 2**31 - 1)
        return values

    def reset_parameters(self) -> None:
        """Draw theta and bias anew; the pool, which other layers read, stays as it is."""
        super().reset_parameters()
        self._reset_bias()

    def _reset_bias(self) -> None:
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight_shape[1])
            nn.init.uniform_(self.bias, -bound, bound)

    def _padding_of_sides(self) -> list[int]:
        """For F.pad: two numbers a dimension, the last dimension first."""
        sides: list[int] = []
        for i in reversed(range(self._DIMS)):
            if isinstance(self.padding, str):
                total = self.dilation[i] * (self.kernel_size[i] - 1) * (self.padding == "same")
                sides += [total // 2, total - total // 2]
            else:
                sides += [self.padding[i]] * 2
        return sides

    def forward(self, input: Tensor) -> Tensor:
        """As torch.nn's layer: a batch, or one sample without that dimension."""
        if input.dim() <= self._DIMS or input.shape[-self._DIMS - 1] != self.in_channels:
            raise ValueError(
                f"input must have {self.in_channels} channels, received shape {list(input.shape)}"
            )
        padding = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._padding_of_sides(), mode=self.padding_mode)
            padding = (0,) * self._DIMS
        return type(self)._FUNCTION(
            input,
            self.pool.weight,
            self.theta,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            **self._weight_arguments(),
        )

    def materialize(self) -> Tensor:
        """The weight [out_channels, in_channels / groups, *kernel_size] in the pool's dtype."""
        return (
            super()
            .materialize()
            .view(self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        )

    def _own_state(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": "x".join(map(str, self.kernel_size)),
            "groups": self.groups,
        }

    def extra_repr(self) -> str:
        options = "".join(
            f"{name}={getattr(self, name)!r}, "
            for name, default in (
                ("padding", (0,) * self._DIMS),
                ("dilation", (1,) * self._DIMS),
                ("groups", 1),
                ("padding_mode", "zeros"),
            )
            if getattr(self, name) != default
        )
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, {options}bias={self.bias is not None}, {self._weight_repr()}"
        )


class HFHConv2d(_HFHConv):
    """A convolution by a virtual weight: torch.nn.Conv2d's arguments, then the pool's.

    Row of the virtual weight is the output channel; column is (input channel of the group, kernel
    row, kernel column) flattened. Initial virtual weights have mean 0 and the variance of
    ``torch.nn.Conv2d``'s, 1 / (3 fan_in).

    Args:
        in_channels, out_channels: of the images, each a multiple of ``groups``.
        kernel_size, stride, dilation: one int, or one for rows and one for columns.
        padding: likewise; or "valid" for none, or "same" for an output of the input's size.
        groups: in which input and output channels are split.
        bias: whether to add a learnable bias [out_channels].
        padding_mode: what is padded with: "zeros", "reflect", "replicate" or "circular".
        pool, num_hashes, depth, width, activation, block, window, rows_per_window, seed, theta,
            device, dtype: as of :class:`HFHLinear`.

    Raises:
        TypeError: pool is not a :class:`Pool`, or an argument has the wrong type.
        ValueError: an argument is out of range, or theta has the wrong shape.
    """

    _DIMS = 2
    _FUNCTION = staticmethod(functional.conv2d)


class HFHConv1d(_HFHConv):
    """:class:`HFHConv2d` in one dimension: torch.nn.Conv1d's arguments, then the pool's."""

    _DIMS = 1
    _FUNCTION = staticmethod(functional.conv1d)
