"""The ``hfh`` operator library and what its operators share."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfh_kernels import _extension, _triton
from hfh_kernels.spec import COORDINATES, HashSpec, Reconstruction, require_int


class Weight(NamedTuple):
    """The trailing arguments of every operator that reads a virtual weight, in schema order."""

    seed: int
    num_hashes: int
    block: int
    window: int
    """0 for none."""
    rows_per_window: int
    """0 for none."""
    depth: int
    width: int
    activation: str
    scale: float
    row_offset: int
    col_offset: int
    backend: str = "auto"
    """On CUDA: "auto", "cuda" or "triton"."""

    def hash_spec(self, pool_size: int) -> HashSpec:
        """The hash's part, validated."""
        return make_hash_spec(
            self.seed, self.num_hashes, pool_size, self.block, self.window, self.rows_per_window
        )

    def reconstruction(self) -> Reconstruction:
        """The reconstruction's part, validated."""
        return Reconstruction(self.depth, self.width, self.activation)

    def require_coordinates(self, rows: int, cols: int) -> None:
        """Raise ValueError unless all of rows x cols, at the offsets, is addressable."""
        for extent, size, name in ((rows, "rows", "row_offset"), (cols, "cols", "col_offset")):
            offset = getattr(self, name)
            require_int(name, offset, 0, COORDINATES)
            if extent < 0 or offset + extent > COORDINATES:
                raise ValueError(
                    f"{size} must be in [0, 2**32 - {name}], received {extent} at {name}={offset}"
                )


WEIGHT = ", ".join(
    f"{kind.__name__} {name}"
    + (f'="{Weight._field_defaults[name]}"' if name in Weight._field_defaults else "")
    for name, kind in Weight.__annotations__.items()
)
"""The same arguments as a schema fragment."""

LIBRARY: Any = torch.library.Library("hfh", "DEF")


def make_hash_spec(
    seed: int, num_hashes: int, pool_size: int, block: int, window: int, rows_per_window: int
) -> HashSpec:
    """A validated spec from operator arguments, where 0 stands for no window."""
    return HashSpec(
        seed=seed,
        num_hashes=num_hashes,
        pool_size=pool_size,
        block=block,
        window=window or None,
        rows_per_window=rows_per_window or None,
    )


def require_same_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name}, {like.device}, received {tensor.device}"
        )


def require_bias(bias: Tensor, input: Tensor, size: int) -> None:
    """Raise unless bias is [size] on input's device and, without autocast, in its dtype."""
    require_same_device("bias", bias, "input", input)
    if bias.shape != (size,):
        raise ValueError(f"bias must have shape [{size}], received shape {list(bias.shape)}")
    if bias.dtype != input.dtype and not _autocast_enabled(input.device):
        raise TypeError(f"bias must have the dtype of input, {input.dtype}, received {bias.dtype}")


def define(
    name: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Define ``hfh::name``.

    The extension brings the CPU's kernels and autograd for all devices, and needs ``fake`` for its
    shapes; as fakes also run where one tensor is on the meta device, they check the devices. On
    CUDA the operator is the function of its name in the ``triton`` module beside the reference;
    where the extension has CUDA kernels for it, they are asked first, and that function is
    ``hfh::triton_name``.
    Without the extension the operator is its ``reference`` everywhere, and PyTorch differentiates
    and traces through that.
    """
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    if not _extension.available():
        LIBRARY.impl(name, reference, "CompositeImplicitAutograd")
        return
    torch.library.register_fake(f"hfh::{name}", fake, lib=LIBRARY)
    if _triton.reason() is None:
        module = reference.__module__.removesuffix("reference") + "triton"
        triton_name = name
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"hfh::{name}", "CUDA"):
            triton_name = f"triton_{name}"
            LIBRARY.define(triton_name + schema)
        LIBRARY.impl(triton_name, _lazy(module, name), "CUDA")
        if _triton.interpreted():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
                LIBRARY.impl(name, _lazy(module, name), "CPU", allow_override=True)


def _lazy(module: str, name: str) -> Callable[..., Any]:
    """The function, imported when it is first called: importing Triton takes a second."""

    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments)

    return run


def define_autocast(name: str) -> None:
    """As autocast treats torch's own products, but pool and theta keep their precision.

    For operators whose first argument is the input and whose fourth is the bias.
    """
    if not _extension.available():
        return
    operator = getattr(torch.ops.hfh, name).default

    def implementation(device_type: str) -> Callable[..., Tensor]:
        def run(
            input: Tensor, pool: Tensor, theta: Tensor, bias: Tensor | None, *arguments: Any
        ) -> Tensor:
            dtype = torch.get_autocast_dtype(device_type)
            input = _cast(input, dtype)
            bias = None if bias is None else _cast(bias, dtype)
            with torch.autocast(device_type, enabled=False):
                output: Tensor = operator(input, pool, theta, bias, *arguments)
            return output

        return run

    LIBRARY.impl(name, implementation("cpu"), "AutocastCPU")
    LIBRARY.impl(name, implementation("cuda"), "AutocastCUDA")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    castable = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor


def _autocast_enabled(device: torch.device) -> bool:
    """False for devices that have no autocast, where torch's own question raises."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
