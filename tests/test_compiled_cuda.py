"""The CUDA kernels as nvcc compiles them: no spills, and a row of the kept table for each."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the disassembler of Triton's package", allow_module_level=True)

from bench import compiled_cuda, cuda_model

ROOT = Path(__file__).parents[1]
ROWS = compiled_cuda.load()


@pytest.mark.parametrize("arch", compiled_cuda.ARCHITECTURES)
@pytest.mark.parametrize("source", compiled_cuda.all_sources(), ids=lambda path: str(path.name))
def test_every_kernel_is_kept(source: Path, arch: str) -> None:
    """python -m bench.compiled_cuda writes the table."""
    folder = source.parent
    text = "".join(path.read_text() for path in [source, *map(folder.joinpath, includes(source))])
    defined = re.findall(r"__global__[^;{]*?\b(\w+)_kernel\(", text)
    assert defined
    kept = {row.name for row in ROWS if (row.source, row.arch) == (source.name, arch)}
    assert kept == set(defined)


def test_nothing_spills() -> None:
    assert [row.kernel for row in ROWS if row.spilled_bytes] == []
    assert max(row.registers for row in ROWS) <= 255


def test_tiles_are_made_on_tensor_cores() -> None:
    tiles = [row for row in ROWS if row.name in ("linear_small", "linear_elements", "write_panel")]
    assert tiles
    assert all(row.tensor_instructions > 0 for row in tiles)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_a_file_compiles_without_spills(tmp_path: Path) -> None:
    """Of the shortest file with tensor instructions, for one architecture."""
    sources = [path for path in compiled_cuda.all_sources() if "fragments.h" in includes(path)]
    source = min(sources, key=lambda path: path.stat().st_size)
    (compiled,), _ = compiled_cuda.compile_sources([source], ["sm_90a"], tmp_path)
    rows = compiled_cuda.kernels(*compiled)
    assert all(row.spilled_bytes == 0 and row.tensor_instructions > 0 for row in rows)
    kept = [row for row in ROWS if (row.source, row.arch) == (source.name, "sm_90a")]
    assert [row.kernel for row in rows] == [row.kernel for row in kept]


def includes(path: Path) -> set[str]:
    """Names of the kernels' own headers that a file reads, directly or not."""
    found: set[str] = set()
    for name in re.findall(r'#include "cuda/(.*?)"', path.read_text()):
        found |= {name} | includes(path.parent / name)
    return found


def test_model_has_every_shown_shape() -> None:
    for small in cuda_model.small_batches():
        assert 0 < small.units.seconds < small.dense * 10
    assert {large.backward for large in cuda_model.large_batches()} == {False, True}


CHOICE = """
#include <cstdio>

#include "cuda/crossovers.h"

int main() {
  long hashes, block, slots, rows_per_window, batch, rows;
  while (std::scanf("%ld %ld %ld %ld %ld %ld", &hashes, &block, &slots, &rows_per_window, &batch,
                    &rows) == 6) {
    hfh::HashParams hash{};
    hash.num_hashes = static_cast<int>(hashes);
    hash.log2_block = std::bit_width(static_cast<unsigned long>(block)) - 1;
    hash.draw_slots = static_cast<unsigned>(slots);
    hash.rows_per_window = static_cast<unsigned>(rows_per_window);
    const bool win = hfh::cuda::slot_products_win(hash, batch, rows);
    std::puts(win ? "slot products" : "tiles");
  }
}
"""


def test_model_takes_the_kernels_that_are_taken(tmp_path: Path) -> None:
    source, program = tmp_path / "choice.cpp", tmp_path / "choice"
    source.write_text(CHOICE)
    includes = [f"-I{ROOT / 'tests/cuda_emulator/include'}", f"-I{ROOT / 'csrc'}"]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++20", *includes, source, "-o", program], check=True)
    linear = [small for small in cuda_model.small_batches() if small.layer.depth == 1]
    assert {small.kernel for small in linear} == {"slot products", "tiles"}
    questions = [
        f"{small.layer.num_hashes} {small.layer.block} {small.layer.window // small.layer.block} "
        f"{small.layer.rows_per_window} {small.batch} {small.layer.out_features}"
        for small in linear
        if small.layer.window is not None
    ]
    result = subprocess.run(
        [program], input="\n".join(questions), capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == [small.kernel for small in linear]
