"""How setup.py builds CUDA kernels, as far as a machine without a GPU can tell."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
BUILD = runpy.run_path(str(ROOT / "setup.py"))

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CUDA_HOME", raising=False)


def fake_nvcc(folder: Path, release: str) -> None:
    """An nvcc in folder/bin that knows sm_80 and sm_90, and its headers in folder/elsewhere."""
    script = f"""#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
    --list-gpu-arch) echo compute_80; echo compute_90 ;;
    --dryrun) echo '#$ INCLUDES="-I{folder}/elsewhere"  ' >&2
              echo '#$ LIBRARIES=  "-L{folder}/stubs" "-L{folder}/lib"' >&2 ;;
esac
"""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(script)
    path.chmod(0o755)


def test_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(tmp_path, "12.4")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("HFH_CUDA_ARCHS", raising=False)
    toolkit = BUILD["find_toolkit"]()
    assert toolkit.version == "12.4"
    assert toolkit.include_dirs == [f"{tmp_path}/elsewhere"]
    assert toolkit.library_dirs == [f"{tmp_path}/stubs", f"{tmp_path}/lib"]
    # sm_100 is not known to it.
    assert toolkit.code == {
        "sm_80": "-gencode=arch=compute_80,code=sm_80",
        "sm_90a": "-gencode=arch=compute_90a,code=sm_90a",
        "compute_90": "-gencode=arch=compute_90,code=compute_90",
    }


@pytest.mark.parametrize("choice", ["90a 80", "90a;80", "90a,80"])
def test_chosen_architectures(choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(tmp_path, "12.4")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("HFH_CUDA_ARCHS", choice)
    assert list(BUILD["find_toolkit"]().code) == ["sm_90a", "sm_80"]
    monkeypatch.setenv("HFH_CUDA_ARCHS", "90a 120")
    with pytest.raises(SystemExit, match="HFH_CUDA_ARCHS has '120'; nvcc knows 80, 90"):
        BUILD["find_toolkit"]()


@pytest.mark.parametrize(
    ("release", "torch_cuda", "reason"),
    [
        ("12.3", "12.8", "is of CUDA 12.3, older than 12.4"),
        ("13.0", "12.8", "is of CUDA 13.0, but PyTorch is built with 12.8"),
        (None, "12.8", "no nvcc in CUDA_HOME="),
        ("12.8", None, "this PyTorch is built without CUDA"),
    ],
)
def test_why_there_are_no_cuda_kernels(
    release: str | None,
    torch_cuda: str | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if release is not None:
        fake_nvcc(tmp_path, release)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    with pytest.raises(SystemExit, match=f"HFH_BUILD=cuda cannot be built: .*{reason}"):
        BUILD["toolkit_for"]("cuda")
    assert BUILD["toolkit_for"]("auto") is None
    assert reason in capsys.readouterr().err
    assert BUILD["toolkit_for"]("cpu") is None


def test_auto_builds_cuda_kernels_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not there is a GPU."""
    fake_nvcc(tmp_path, "12.4")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert BUILD["toolkit_for"]("auto") == BUILD["toolkit_for"]("cuda")


@needs_nvcc
@pytest.mark.usefixtures("in_root")
def test_kernels_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest file, for one architecture."""
    monkeypatch.setenv("HFH_CUDA_ARCHS", "90a")
    source = min(Path("csrc/cuda").glob("*.cu"), key=lambda path: path.stat().st_size)
    compile_kernels = BUILD["compile_kernels"]
    monkeypatch.setitem(compile_kernels.__globals__, "CUDA_KERNEL_SOURCES", [str(source)])
    (compiled,) = compile_kernels(["c++"], {}, BUILD["find_toolkit"](), tmp_path)
    assert Path(compiled).read_bytes().startswith(b"\x7fELF")


def compile_without_nvcc(source: str, includes: list[str]) -> None:
    """Checks C++ against CUDA's headers. PyTorch's packages for the CPU lack but one of theirs."""
    command = ["c++", "-std=c++20", "-fsyntax-only", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    folders = ["csrc", *includes, *BUILD["find_toolkit"]().include_dirs]
    command += [f"-I{folder}" for folder in folders]
    command += ["-x", "c++", "-"]
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_nvcc
@pytest.mark.usefixtures("in_root")
def test_headers_of_the_launchers_compile_without_nvcc() -> None:
    texts = [path.read_text() for path in Path("csrc/torch/cuda").iterdir()]
    headers = {line for text in texts for line in re.findall('#include "cuda/.*"', text)}
    assert '#include "cuda/weight.h"' in headers
    compile_without_nvcc("\n".join([*sorted(headers), ""]), includes=[])


@needs_nvcc
@pytest.mark.slow
@pytest.mark.usefixtures("in_root")
def test_stream_compiles() -> None:
    """The emulator, which compiles the other files of its folder, has its own."""
    source = Path("csrc/torch/cuda/stream.cpp").read_text()
    compile_without_nvcc(source, includes=cpp_extension.include_paths())
