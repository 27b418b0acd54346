"""What nvcc makes of the CUDA kernels, without a GPU: registers, spills, shared memory,
instructions. `python -m bench.compiled_cuda [--quick]` prints a table and writes
results/compiled_cuda.json; it fails where a kernel spills.

Instructions are those of the kernel's main loop, of all 32 lanes, for each number that a pass
makes. Where the loop holds two ways of doing something, such as a slow one for columns that are not
aligned, both count: the number is an upper bound. Where no loop is found all instructions count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import sass

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
QUICK = ("sm_90a",)
WARP = 32
ARITHMETIC = ("FFMA",)

Arguments = Sequence[str]
"""Of a template, as they are written in a row's name."""


@dataclasses.dataclass(frozen=True)
class MainLoop:
    """How a kernel's main loop is found, and what a warp makes in a pass of it."""

    makes: str
    numbers: Callable[[Arguments], int]
    opcodes: tuple[str, ...] = ARITHMETIC
    """The main loop is the shortest that holds nearly all instructions of these."""
    share: float = 0.9
    """How many are nearly all."""
    inner_passes: Callable[[Arguments], int] = lambda _: 1
    """How often loops inside it run: not at all where they are for what seldom happens."""


TILE = MainLoop("weights: a tile of 16 rows and 64 columns", lambda _: 16 * 64, sass.TENSOR_OPCODES)
ROW = "weights: some columns of a row a lane"
WINDOW_ROWS = 32
"""For which slot products are counted: a window of 64 KiB usually serves as many."""
PASS_ROWS, PLANE_WORDS = 64, 16
"""Rows that a block of threads takes at once, and words that slots are multiplied by: kPassRows and
kPlaneWords in csrc/cuda/slot_products_sums.h and slot_operands.h."""


def chunk_words(arguments: Arguments) -> int:
    """words_of_chunk in csrc/cuda/slot_operands.h."""
    return 64 if arguments[0] == "BFloat16" and int(arguments[2]) > 4 else 32


MAIN_LOOPS = {
    "linear_small": TILE,
    # Two groups of two tiles.
    "linear_elements": dataclasses.replace(TILE, numbers=lambda _: 4 * 16 * 64),
    # Where each column draws for itself, a loop over pairs of columns.
    "write_panel": dataclasses.replace(
        TILE, inner_passes=lambda arguments: 4 if arguments[3] == "true" else 1
    ),
    # Without a block's hash, once for two quads. The loops inside it are for columns that are not
    # aligned, and for sums that another thread was adding to.
    "weight_backward": MainLoop(
        "weights: a quad of columns a lane",
        lambda _: 4 * WARP,
        share=0.75,
        inner_passes=lambda _: 0,
    ),
    "slot_products": MainLoop(
        f"weights: a chunk's column blocks of {WINDOW_ROWS} rows, for 8 warps",
        lambda a: WINDOW_ROWS * chunk_words(a) // int(a[2]) * int(a[1]) // 8,
        ("HMMA",),
        share=1.0,
    ),
    # One hash function has no multiply-add: the rest of these load g's parameters.
    "embedding": MainLoop(
        ROW, lambda arguments: int(arguments[1]) * WARP, ("FFMA", "FMUL"), share=0.4
    ),
    "embedding_bag": MainLoop(ROW, lambda arguments: int(arguments[2]) * WARP, share=0.7),
    "lookup_backward": MainLoop(ROW, lambda arguments: int(arguments[1]) * WARP, share=0.7),
    "factor_gradients": MainLoop(ROW, lambda arguments: int(arguments[1]) * WARP, share=0.7),
    "shares_of_bags": MainLoop("entries: one a lane", lambda _: WARP, ("STG",), share=0.4),
    "sum_parts": MainLoop("sums of four parts, one a lane", lambda _: WARP, ("FADD",), share=0.4),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What an instantiation of a kernel was compiled to."""

    kernel: str
    source: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    """Static: all of the kernels' own is dynamic, and what is left is the driver's."""
    instructions: int
    """Of the whole kernel."""
    loop_instructions: int
    """Of a warp in a pass of the main loop."""
    tensor_instructions: int
    """Of the main loop's."""
    numbers: int
    """What a warp makes in a pass of the main loop."""
    parts: dict[str, int]
    """Of slot products: what the parts of a pass come to."""

    @property
    def name(self) -> str:
        return self.kernel.split("<")[0]

    @property
    def arguments(self) -> Arguments:
        return self.kernel.split("<")[1].rstrip(">").split(", ")

    @property
    def lane_instructions(self) -> float:
        """A number, that is a weight in most kernels."""
        made: float = self.loop_instructions
        if self.parts:
            made = slot_pass(self.parts, 4, chunk_words(self.arguments), WINDOW_ROWS)
        return made * WARP / self.numbers


def slot_pass(parts: dict[str, int], num_hashes: int, words: int, rows: int) -> float:
    """Instructions of a warp, on average, for a chunk of slot products and that many rows.

    All planes of the chunk are multiplied; then warps that have rows add up what these draw, eight
    rows at a time (csrc/cuda/slot_products_kernel.h).
    """
    passes = rows / PASS_ROWS
    return (
        words // PLANE_WORDS * parts["multiply"]
        + passes * parts[f"add {num_hashes}"]
        + parts["rest"]
    )


def slot_parts(function: sass.Function, chunk: range) -> dict[str, int]:
    """Of the loop over chunks, by the loops inside it.

    Left out is what runs for inputs that are not aligned, the only loop that reads global memory
    through registers (others copy asynchronously); and what runs where a number is not finite: a
    loop that only writes zeros, and loops of tensor instructions that read nothing. Of the loops
    over passes, one for some numbers of hashes each, one runs, and the instructions before it.
    Where the compiler made two of one, for numbers that are not finite too, the shorter counts.
    """

    def has(loop: range, *opcodes: str) -> bool:
        return function.count(opcodes, loop) > 0

    def length(loops: list[range]) -> int:
        return sum(len(loop) for loop in loops)

    inside = [x for x in function.loops if x != chunk and within(x, chunk)]
    (multiply,) = [x for x in inside if has(x, "HMMA") and has(x, "STS")]
    never = [x for x in inside if has(x, "STS") and x != multiply]
    passes = [x for x in inside if has(x, "HMMA") and has(x, "LDS") and x != multiply]
    by_reads: dict[int, list[int]] = {}
    for loop in passes:
        loops = [x for x in inside if x != loop and within(x, loop)]
        if not any(has(x, "LDS") for x in loops):
            reads = function.count(("LDS",), loop)
            by_reads.setdefault(reads, []).append(len(loop) - length(loops))
    parts = {"multiply": len(multiply)}
    # The kernel has them for these numbers of hashes; for others they loop.
    for num_hashes, reads in zip((1, 2, 4), sorted(by_reads), strict=True):
        parts[f"add {num_hashes}"] = min(by_reads[reads])
    ends = [multiply, *never, *passes]
    before = [
        loop.start - max(x.stop for x in ends if x.stop <= loop.start)
        for loop in sorted(passes, key=lambda loop: loop.start)
    ]
    return {**parts, "rest": len(chunk) - length(ends) - sum(before[1:])}


def within(inner: range, outer: range) -> bool:
    return inner.start >= outer.start and inner.stop <= outer.stop


def measure(function: sass.Function, kernel: str, source: str, arch: str) -> Kernel:
    name, _, template = kernel.partition("<")
    arguments = template.rstrip(">").split(", ")
    main = MAIN_LOOPS[name]
    everything = range(len(function.instructions))
    loop = function.shortest_loop(main.opcodes, main.share)
    if loop is None:
        print(f"no main loop: {arch} {kernel}")
        loop = everything
    straight = function.outside_loops(loop)
    return Kernel(
        kernel=kernel,
        source=source,
        arch=arch,
        registers=function.registers,
        spilled_bytes=function.spilled_bytes,
        shared_bytes=function.shared_bytes,
        instructions=len(everything),
        loop_instructions=straight + main.inner_passes(arguments) * (len(loop) - straight),
        tensor_instructions=function.count(sass.TENSOR_OPCODES, loop),
        numbers=main.numbers(arguments),
        parts=slot_parts(function, loop) if name == "slot_products" else {},
    )


def compile_sources(
    sources: Sequence[Path], architectures: Sequence[str], folder: Path
) -> tuple[list[tuple[Path, str, Path]], str]:
    """Objects with their sources and architectures, and nvcc's version.

    The flags are those of setup.py; what is in the folder and has not changed is kept.
    """
    setup: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
    toolkit = setup["find_toolkit"]()
    ninja = setup["Ninja"](folder)
    ninja.rule("cuda", [toolkit.nvcc])
    compiled = [(source, arch) for arch in architectures for source in sources]
    for source, arch in compiled:
        flags = [*setup["CUDA_FLAGS"], f"-I{ROOT / 'csrc'}", toolkit.code[arch]]
        ninja.compile("cuda", str(source), arch, flags)
    objects = [Path(file) for file in ninja.run()]
    return [(*pair, file) for pair, file in zip(compiled, objects, strict=True)], toolkit.version


def kernels(source: Path, arch: str, file: Path) -> list[Kernel]:
    """Of an object."""
    with tempfile.TemporaryDirectory() as folder:
        found = [f for cubin in sass.extract(file, Path(folder)) for f in sass.functions(cubin)]
    names = short_names([function.name for function in found])
    return sorted(
        (
            measure(function, name, source.name, arch)
            for function, name in zip(found, names, strict=True)
        ),
        key=lambda kernel: kernel.kernel,
    )


def short_names(mangled: Sequence[str]) -> list[str]:
    """Such as 'write_panel<BFloat16, U4 depth 2 width 4 relu, shared, true>'."""
    result = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    return [_short_name(name) for name in result.stdout.split("\n")[: len(mangled)]]


def _short_name(demangled: str) -> str:
    name = re.sub(r"\w+::", "", demangled.replace("(anonymous namespace)::", ""))
    name = name.replace(" >", ">").removeprefix("void ")

    def shape(match: re.Match[str]) -> str:
        hashes, depth, width, activation = match.groups()
        network = f" width {width} {('relu', 'tanh')[int(activation)]}" if int(depth) > 1 else ""
        return f"U{hashes} depth {depth}{network}"

    name = re.sub(r"FixedShape<(\d+), (\d+), (\d+), \(Activation\)(\d)>", shape, name)
    name = re.sub(r"\(Source\)(\d)", lambda m: ("global", "shared", "shared once")[int(m[1])], name)
    name = re.sub(r"\(Sums\)(\d)", lambda m: ("shared", "global", "units")[int(m[1])], name)
    found = re.match(r"(\w+)_kernel(<.*?>)\(", name)
    assert found is not None, name
    return found[1] + found[2]


def all_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def load() -> list[Kernel]:
    """The rows of results/compiled_cuda.json."""
    report = json.loads((RESULTS / "compiled_cuda.json").read_text())
    return [Kernel(**dict(zip(report["fields"], row, strict=True))) for row in report["rows"]]


def save(rows: list[Kernel], version: str) -> None:
    """A line a kernel."""
    fields = [field.name for field in dataclasses.fields(Kernel)]
    lines = [json.dumps(list(dataclasses.asdict(row).values())) for row in rows]
    head = f'{{"nvcc": "{version}",\n "fields": {json.dumps(fields)},\n "rows": [\n'
    path = RESULTS / "compiled_cuda.json"
    path.write_text(head + ",\n".join(lines) + "\n]}\n")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="for the H200 alone, write nothing")
    quick = parser.parse_args().quick
    folder = ROOT / "build" / "compiled_cuda"
    compiled, version = compile_sources(
        [source.relative_to(Path.cwd()) for source in all_sources()],
        QUICK if quick else ARCHITECTURES,
        folder,
    )
    rows = [row for item in compiled for row in kernels(*item)]
    print("arch    registers  instructions  in loop  a number  kernel")
    for row in rows:
        print(
            f"{row.arch:8}{row.registers:9}{row.instructions:14}{row.loop_instructions:9}"
            f"{row.lane_instructions:10.1f}  {row.kernel}"
        )
    if not quick:
        save(rows, version)
    spilled = [f"{r.arch} {r.kernel}: {r.spilled_bytes} bytes" for r in rows if r.spilled_bytes]
    if spilled:
        sys.exit("\n".join(["SPILLED:", *spilled]))


if __name__ == "__main__":
    main()
