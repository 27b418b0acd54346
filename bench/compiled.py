"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, shared memory,
instructions. `python -m bench.compiled [--quick]` prints a table and writes results/compiled.json.

The launchers run on tensors without memory and their kernels are compiled instead of launched, so
the configurations are those a GPU of that kind would run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench import sass
from bench.shapes import (
    GPU_CONVOLUTIONS,
    GPU_LINEARS,
    GPU_LOOKUPS,
    PLAIN,
    GPUImages,
    GPULinear,
    GPULookups,
)
from hfh_kernels.functional.weight import weight_fields
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.ops import tuning
from hfh_kernels.ops.conv2d import triton as conv2d_triton
from hfh_kernels.ops.embedding import triton as embedding_triton
from hfh_kernels.ops.embedding_bag import triton as bag_triton
from hfh_kernels.ops.linear import triton as linear_triton

RESULTS = Path(__file__).parent / "results"
DEVICES = {
    80: tuning.Device("sm80", 108, 163 * 1024),
    90: tuning.Device("sm90", 132, 227 * 1024),
    100: tuning.Device("sm100", 148, 227 * 1024),
}
"""A100, H100 or H200, B200: processors and shared memory a program, from the CUDA guide's table of
compute capabilities and the data sheets."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel with the arguments of one launch."""

    kernel: JITFunction[Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def tile_weights(self) -> int:
        """Virtual weights that a program makes at a time."""
        return int(self.keywords["TILE_N"] * self.keywords["TILE_K"])


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel was compiled to."""

    kernel: str
    call: str
    arch: int
    tiles: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loop_instructions: float
    """Of the longest loop, for each weight of a tile; all are where there is no loop."""
    instructions: float
    """Of the whole kernel, likewise."""
    async_copies: int
    """Asynchronous copies of 16 bytes in that loop."""
    tensor_instructions: int
    """In the whole kernel."""


def launches(call: Callable[[], Any], device: tuning.Device) -> list[Launch]:
    """The launches that a call on meta tensors makes on that device."""
    seen: list[Launch] = []

    def record(kernel: JITFunction[Any], *arguments: Any, **keywords: Any) -> None:
        del keywords["grid"], keywords["warmup"]
        seen.append(Launch(kernel, arguments, keywords))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(tuning, "device", return_value=device),
    ):
        call()
    return seen


def source(launch: Launch) -> ASTSource:
    """The kernel specialised as a launch would: for its types, ones and multiples of 16."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            kinds = [kind(item, (*path, i)) for i, item in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + _NAMES[value.dtype]
        if isinstance(value, tl.constexpr) or value is None or (value == 1 and type(value) is int):
            constants[path] = getattr(value, "value", value)
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {}
    for index, name in enumerate(launch.kernel.arg_names):
        if index < len(launch.arguments):
            signature[name] = kind(launch.arguments[index], (index,))
        else:
            signature[name] = "constexpr"
            constants[(index,)] = launch.keywords[name]
    return ASTSource(launch.kernel, signature, constants, attributes)


_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def compile_launch(launch: Launch, call: str, arch: int) -> Compiled:
    names = launch.kernel.arg_names
    options = {key: value for key, value in launch.keywords.items() if key not in names}
    warps = options["num_warps"]
    compiled = triton.compile(source(launch), GPUTarget("cuda", arch, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (function,) = sass.functions(Path(file.name))
    body = function.longest_loop()
    weights = launch.tile_weights / (warps * 32)
    tiles = {key.removeprefix("TILE_").lower(): launch.keywords[key] for key in launch.keywords
             if key.startswith("TILE_")}  # fmt: skip
    return Compiled(
        kernel=launch.kernel.__name__,
        call=call,
        arch=arch,
        tiles=" ".join(f"{name}{size}" for name, size in tiles.items())
        + f" warps{warps} stages{options['num_stages']}",
        registers=function.registers,
        spilled_bytes=function.spilled_bytes,
        shared_bytes=compiled.metadata.shared,
        loop_instructions=round(len(body) / weights, 1),
        instructions=round(len(function.instructions) / weights, 1),
        async_copies=sum(
            "LDGSTS" in instruction and ".128" in instruction
            for instruction in function.instructions[body.start : body.stop]
        ),
        tensor_instructions=function.count(sass.TENSOR_OPCODES),
    )


Calls = dict[str, Callable[[], Any]]
"""By name, functions that run one operator on meta tensors."""


def linear_calls(shape: GPULinear, batch: int) -> Calls:
    parameters, weight = _of(shape.layer("meta"), shape.dtype)
    input = torch.empty(batch, shape.in_features, dtype=shape.dtype, device="meta")
    grad = torch.empty(batch, shape.out_features, dtype=shape.dtype, device="meta")
    name = f"{shape.name}, {_NAMES[shape.dtype]}, batch {batch}"
    return {
        f"linear {name}": lambda: linear_triton.linear(
            input, *parameters, None, shape.out_features, *weight
        ),
        f"linear_backward_input {name}": lambda: linear_triton.linear_backward_input(
            grad, *parameters, shape.in_features, *weight
        ),
        f"linear_backward_weight {name}": lambda: linear_triton.linear_backward_weight(
            grad, input, *parameters, *weight
        ),
    }


def _of(
    layer: HFHLayer, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[Any, ...]]:
    """A layer's parameters, and the trailing arguments of its operators."""
    weight = weight_fields(layer.hash_spec, layer.reconstruction, layer.scale, 0, 0)
    return (layer.pool.weight.to(dtype), layer.theta), weight


def convolution_calls(images: GPUImages) -> Calls:
    parameters, weight = _of(images.layer("meta"), images.dtype)
    input = images.input("meta")
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    name = f"{PLAIN}, {images.name}"
    return {
        f"conv2d {name}": lambda: conv2d_triton.conv2d(
            input, *parameters, None, images.channels, *geometry, *weight
        ),
        f"conv2d_backward_input {name}": lambda: conv2d_triton.conv2d_backward_input(
            input, *parameters, input.shape, *geometry, *weight
        ),
        f"conv2d_backward_weight {name}": lambda: conv2d_triton.conv2d_backward_weight(
            input, input, *parameters, *geometry, *weight
        ),
    }


def lookup_calls(shape: GPULookups) -> Calls:
    parameters, weight = _of(shape.layer("meta"), torch.bfloat16)
    rows, dim = shape.num_embeddings, shape.embedding_dim
    indices, *offsets = shape.arguments("meta")
    name = f"{PLAIN}, {shape.name}"
    table: tuple[Any, ...] = (*parameters, None, None)
    if not offsets:
        grad = torch.empty(shape.num_indices, dim, dtype=torch.bfloat16, device="meta")
        return {
            f"embedding {name}": lambda: embedding_triton.embedding(
                indices, *table, rows, dim, -1, *weight
            ),
            f"embedding_backward {name}": lambda: embedding_triton.embedding_backward(
                grad, indices, *table, rows, -1, *weight
            ),
        }
    grad = torch.empty(offsets[0].shape[0], dim, dtype=torch.bfloat16, device="meta")
    winners = torch.empty(0, dim, dtype=torch.int64, device="meta")
    return {
        f"embedding_bag {name}": lambda: bag_triton.embedding_bag(
            indices, offsets[0], *table, None, rows, dim, "sum", False, -1, *weight
        ),
        f"embedding_bag_backward {name}": lambda: bag_triton.embedding_bag_backward(
            grad, winners, indices, offsets[0], *table, None, rows, "sum", False, -1, *weight
        ),
    }


def all_calls() -> Calls:
    """A layer of each kind, for kernels do not depend on its size, and a batch of each regime."""
    kinds = {(s.block, s.depth, s.num_hashes, s.dtype): s for s in reversed(GPU_LINEARS)}
    calls: Calls = {}
    for shape in kinds.values():
        for batch in tuning.ROWS:
            calls |= linear_calls(shape, batch)
    for images in GPU_CONVOLUTIONS:
        calls |= convolution_calls(images)
    for lookups in GPU_LOOKUPS:
        calls |= lookup_calls(lookups)
    return calls


def report(calls: Calls, archs: tuple[int, ...]) -> list[Compiled]:
    rows = []
    for name, call in calls.items():
        for arch in archs:
            for launch in launches(call, DEVICES[arch]):
                rows.append(compile_launch(launch, name, arch))
    return rows


def table(rows: list[Compiled]) -> str:
    names = [field.name for field in dataclasses.fields(Compiled)]
    cells = [names, *([str(value) for value in dataclasses.astuple(row)] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="for the H200 alone, write nothing")
    options = parser.parse_args()
    # The plain kind for every architecture, the rest for the H200's.
    rows = report(all_calls(), (90,))
    if not options.quick:
        others = tuple(arch for arch in DEVICES if arch != 90)
        rows += report({k: c for k, c in all_calls().items() if PLAIN in k}, others)
    print(table(rows))
    if not options.quick:
        content = {"triton": triton.__version__, "rows": [dataclasses.asdict(row) for row in rows]}
        path = RESULTS / "compiled.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
