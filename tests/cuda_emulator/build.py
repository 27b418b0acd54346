"""Builds the library that runs csrc/cuda on a CPU; ``python tests/cuda_emulator/build.py``."""

from __future__ import annotations

import fcntl
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

EMULATOR_FILES = ("emulator", "warp", "copies", "runtime", "sanitizer")
# Those that need CUDA's own libraries; tests/cuda_emulator has its own.
NEED_CUDA = {"stream.cpp", "registration.cpp"}
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden"]
# Kernels take longer to compile than to run. What the sanitizers find, sanitizer.cpp reports.
KERNEL_FLAGS = ["-O1", "-fsanitize=alignment,bounds"]
# The emulator's headers hide those of the same names in csrc.
INCLUDES = [f"-I{EMULATOR}/include", "-Icsrc"]
X86_FLAGS = ["-mavx2", "-mfma", "-mf16c"]


def sources() -> dict[Path, list[str]]:
    """Every file with its own flags."""

    def found(pattern: str) -> list[Path]:
        return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))

    emulator = [EMULATOR / f"{name}.cpp" for name in EMULATOR_FILES]
    kernels = [*found("csrc/cuda/*.cu"), EMULATOR / "self_test.cpp"]
    operators = [*found("csrc/torch/cuda/*.cpp"), Path("csrc/torch/weight.cpp")]
    operators = [path for path in operators if path.name not in NEED_CUDA]
    operators += [path for path in found(f"{EMULATOR}/*.cpp") if path not in (*emulator, *kernels)]
    tensors = ["-O0", *("-isystem" + path for path in cpp_extension.include_paths())]
    # Those that take longest to compile first.
    flags = {path: KERNEL_FLAGS for path in kernels} | {path: tensors for path in operators}
    return flags | {path: ["-O3"] for path in emulator}


def ninja_file() -> str:
    compiler = os.environ.get("CXX", "g++")
    has_avx2 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    flags = [*FLAGS, *(X86_FLAGS if has_avx2 else []), *INCLUDES]
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
    for source, own_flags in sources().items():
        target = FOLDER / f"{source}.o"
        lines += [f"build {target}: compile {source}", f"  flags = {shlex.join(own_flags)}"]
        objects.append(str(target))
    lines += [f"build {LIBRARY.relative_to(ROOT)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def build() -> Path:
    """Compiles what changed, in one process at a time; the library.

    Raises:
        RuntimeError: a file did not compile; the message has the compiler's.
    """
    folder = ROOT / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "build.ninja"
    search = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path.write_text(ninja_file())
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
