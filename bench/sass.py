"""Reads machine code of NVIDIA GPUs with the tools in Triton's wheel; needs no GPU."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import triton

TENSOR_OPCODES = ("HMMA", "HGMMA", "UTCHMMA")


@dataclasses.dataclass(frozen=True)
class Function:
    """A kernel as it was assembled."""

    name: str
    """Mangled."""
    instructions: tuple[str, ...]
    body: range
    """Of instructions: up to the last exit. Behind it are functions that the kernel calls."""
    loops: tuple[range, ...]
    """Of instructions, by their backward branches: the last branch to each beginning."""
    blocks: tuple[range, ...]
    """Of instructions: basic blocks."""
    registers: int
    stack_bytes: int
    shared_bytes: int
    """Static, with what the driver keeps for itself."""

    @functools.cached_property
    def opcodes(self) -> tuple[str, ...]:
        return tuple(opcode(instruction) for instruction in self.instructions)

    @property
    def spilled_bytes(self) -> int:
        return self.stack_bytes if "STL" in self.opcodes else 0

    def count(self, opcodes: Iterable[str], among: range | None = None) -> int:
        """How many of the instructions, or of those `among`, are of the opcodes."""
        part = self.opcodes if among is None else self.opcodes[among.start : among.stop]
        counts = collections.Counter(part)
        return sum(counts[name] for name in opcodes)

    def longest_loop(self) -> range:
        """All instructions where there is no loop."""
        return max(self.loops, key=len, default=range(len(self.instructions)))

    def shortest_loop(self, opcodes: Iterable[str], share: float) -> range | None:
        """The shortest loop that holds that share of the opcodes' instructions."""
        opcodes = tuple(opcodes)
        least = share * max(self.count(opcodes, self.body), 1)
        enough = [loop for loop in self.loops if self.count(opcodes, loop) >= least]
        return min(enough, key=len, default=None)

    def outside_loops(self, loop: range) -> int:
        """How many of a loop's instructions are in no loop inside it."""
        inner = {
            index
            for other in self.loops
            if other != loop and other.start >= loop.start and other.stop <= loop.stop
            for index in other
        }
        return len(loop) - len(inner)


def opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split(None, 1)[0].split(".")[0]


def functions(cubin: Path) -> list[Function]:
    sass, usage = (_run(tool, option, str(cubin)) for tool, option in _TOOLS)
    return [
        _function(name, text, usage)
        for name, text in re.findall(
            r"(?ms)^\.text\.(\S+):$(.*?)(?=^\s*\.section|^//-----|\Z)", sass
        )
    ]


def extract(file: Path, folder: Path) -> list[Path]:
    """Writes the machine code in an object to files in the folder."""
    _run("cuobjdump", "-xelf", "all", str(file.absolute()), folder=folder)
    return sorted(folder.glob("*.cubin"))


_TOOLS = (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))


def _run(tool: str, *arguments: str, folder: Path | None = None) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    command = [str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def _function(name: str, text: str, usage: str) -> Function:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
        code = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if code:
            instructions.append(code[1].strip())
    exits = [i for i, instruction in enumerate(instructions) if instruction == "EXIT"]
    end = exits[-1] if exits else len(instructions) - 1
    last_branch: dict[int, int] = {}
    ends = set(labels.values()) | {len(instructions)}
    for i, instruction in enumerate(instructions):
        branch = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction)
        if branch is None:
            continue
        ends.add(i + 1)
        start = labels.get(branch[1], i)
        # A kernel ends in a branch to itself. What stands behind the exit goes back to its middle.
        if start < i and not start <= end < i:
            last_branch[start] = i
    borders = sorted(ends | {0})
    resources = re.search(rf"Function {re.escape(name)}:\s*(.*)", usage)
    assert resources is not None, name

    def resource(kind: str) -> int:
        found = re.search(rf"{kind}:(\d+)", resources[1])
        assert found is not None, resources[1]
        return int(found[1])

    return Function(
        name,
        tuple(instructions),
        body=range(end + 1),
        loops=tuple(range(start, stop + 1) for start, stop in last_branch.items()),
        blocks=tuple(range(a, b) for a, b in itertools.pairwise(borders)),
        registers=resource("REG"),
        stack_bytes=resource("STACK"),
        shared_bytes=resource("SHARED"),
    )
