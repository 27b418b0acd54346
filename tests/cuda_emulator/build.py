"""Builds the library that runs csrc/cuda on a CPU; ``python tests/cuda_emulator/build.py``."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path("tests/cuda_emulator")
FOLDER = Path("build/cuda_emulator")
LIBRARY = ROOT / FOLDER / "libhfh_cuda_emulator.so"

# Those that need CUDA's own libraries; tests/cuda_emulator has its own.
NEED_CUDA = {"stream.cpp", "registration.cpp"}
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
# The emulator's headers hide those of the same names in csrc.
INCLUDES = [f"-I{EMULATOR}/include", "-Icsrc"]
X86_FLAGS = ["-mavx2", "-mfma", "-mf16c"]


def sources() -> tuple[list[Path], list[Path]]:
    """The files that do not see Tensor, and those that do."""
    plain = [Path(EMULATOR, name) for name in ("emulator.cpp", "runtime.cpp", "self_test.cpp")]
    plain += sorted(path.relative_to(ROOT) for path in (ROOT / "csrc/cuda").glob("*.cu"))
    with_tensors = [Path(EMULATOR, name) for name in sorted(NEED_CUDA)]
    with_tensors += [Path("csrc/torch/weight.cpp")]
    with_tensors += sorted(
        path.relative_to(ROOT)
        for path in (ROOT / "csrc/torch/cuda").glob("*.cpp")
        if path.name not in NEED_CUDA
    )
    return plain, with_tensors


def ninja_file() -> str:
    compiler = os.environ.get("CXX", "g++")
    x86 = "AVX2" in torch.backends.cpu.get_cpu_capability() or "AVX512" in (
        torch.backends.cpu.get_cpu_capability()
    )
    plain, with_tensors = sources()
    flags = [*FLAGS, *(X86_FLAGS if x86 else []), *INCLUDES]
    tensor_flags = ["-isystem" + path for path in cpp_extension.include_paths()]
    libraries = [f"-L{path} -Wl,-rpath,{path}" for path in cpp_extension.library_paths()]
    lines = [
        f"builddir = {FOLDER}",
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d {shlex.join(flags)} $flags -x c++ -c $in -o $out",
        "  description = $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared -Wl,-z,defs $in -o $out {' '.join(libraries)} "
        "-ltorch -ltorch_cpu -lc10",
        "  description = $out",
    ]
    objects = []
    for files, extra in ((with_tensors, tensor_flags), (plain, [])):
        for source in files:
            target = FOLDER / f"{source}.o"
            lines += [f"build {target}: compile {source}", f"  flags = {shlex.join(extra)}"]
            objects.append(str(target))
    lines += [f"build {LIBRARY.relative_to(ROOT)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def build() -> Path:
    """Compiles what changed; the library.

    Raises:
        RuntimeError: a file did not compile; the message has the compiler's.
    """
    folder = ROOT / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "build.ninja"
    path.write_text(ninja_file())
    search = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    result = subprocess.run(
        ["ninja", "-f", path.relative_to(ROOT)],
        cwd=ROOT,
        env={**os.environ, "PATH": search},
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(f"the CUDA emulator did not build:\n{result.stdout}{result.stderr}")
    return LIBRARY


if __name__ == "__main__":
    print(build())
