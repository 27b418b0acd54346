"""Builds the extension hfh_kernels._C; everything else about the package is in pyproject.toml.

The environment variable HFH_BUILD chooses what is built:
    auto  the compiled kernels where a C++ compiler is found, else pure Python (the default)
    none  pure Python: every op runs on the plain PyTorch reference
    cpu   the CPU kernels, or an error
    cuda  the CPU and CUDA kernels, or an error
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NoReturn

from setuptools import setup

# Files that see Tensor, and what they share with the rest: compiled once, for any machine.
TORCH_SOURCES = [
    "csrc/torch/autograd.cpp",
    "csrc/torch/convolution.cpp",
    "csrc/torch/convolution_autograd.cpp",
    "csrc/torch/convolution_geometry.cpp",
    "csrc/torch/embedding.cpp",
    "csrc/torch/embedding_autograd.cpp",
    "csrc/torch/embedding_bag.cpp",
    "csrc/torch/gemm.cpp",
    "csrc/torch/lookup.cpp",
    "csrc/torch/lookup_backward.cpp",
    "csrc/torch/matrix_unit.cpp",
    "csrc/torch/matrix_unit_convolution.cpp",
    "csrc/torch/matrix_unit_gradient.cpp",
    "csrc/torch/module.cpp",
    "csrc/torch/ops.cpp",
    "csrc/torch/panels.cpp",
    "csrc/torch/patch_matrix.cpp",
    "csrc/torch/platform_convolution.cpp",
    "csrc/torch/slot_products.cpp",
    "csrc/torch/weight.cpp",
    "csrc/torch/weight_backward.cpp",
    "csrc/cpu/capability.cpp",
]
# Raw-pointer kernels: compiled once for each capability, with -DHFH_CAPABILITY=<its name>.
KERNEL_SOURCES = [
    "csrc/cpu/backward.cpp",
    "csrc/cpu/embedding.cpp",
    "csrc/cpu/embedding_backward.cpp",
    "csrc/cpu/linear.cpp",
    "csrc/cpu/patches.cpp",
    "csrc/cpu/reconstruct.cpp",
    "csrc/cpu/slots.cpp",
    "csrc/cpu/slots_backward.cpp",
    "csrc/cpu/table.cpp",
]
# Capabilities that only add something to the one before.
ADDED_SOURCES = {
    "avx512_amx": [
        "csrc/cpu/matrix_unit.cpp",
        "csrc/cpu/matrix_unit_convolution.cpp",
    ],
}

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-mfma", "-mprefer-vector-width=512"]
X86_CAPABILITIES = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "avx512_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
COMMON_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden"]
KERNEL_FLAGS = [*COMMON_FLAGS, "-fPIC", "-ffp-contract=fast", "-fno-math-errno"]
# Loops over hashes and hidden units have constant bounds: unroll them whole, nested ones too.
GCC_UNROLL_FLAGS = ["--param=max-completely-peeled-insns=2000"]


def fail(message: str) -> NoReturn:
    sys.exit(f"hfh_kernels: {message}")


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX where set, else the first usual name on the PATH."""
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    return None


def accepts(compiler: list[str], flags: list[str]) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-c", "-", "-o", os.devnull]
    return subprocess.run(command, input=b"", capture_output=True).returncode == 0


def missing_for_cpu(compiler: list[str] | None) -> str | None:
    """What this machine lacks to compile the CPU kernels; None if nothing."""
    if compiler is None:
        named = os.environ.get("CXX")
        return f"CXX={named} was not found" if named else "no C++ compiler on the PATH"
    if not accepts(compiler, COMMON_FLAGS):
        return f"{shlex.join(compiler)} does not accept {' '.join(COMMON_FLAGS)}"
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        return f"no Python.h in {include} (the python3-dev package of many Linux systems)"
    return None


def accepted_capabilities(compiler: list[str]) -> dict[str, list[str]]:
    """Flags of each capability this compiler can target, lowest first."""
    capabilities: dict[str, list[str]] = {"baseline": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        for name, flags in X86_CAPABILITIES.items():
            if accepts(compiler, flags):
                capabilities[name] = flags
            else:
                command = shlex.join(compiler)
                print(f"hfh_kernels: {name} left out, {command} lacks its flags", file=sys.stderr)
    return capabilities


def compile_kernels(
    compiler: list[str], capabilities: dict[str, list[str]], folder: Path
) -> list[str]:
    """Compiles every source for every capability in parallel; returns the objects, lowest first.

    ninja recompiles an object when its source, a header it includes or its flags changed.
    """

    def escaped(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    command = shlex.join(compiler).replace("$", "$$")
    rules = [
        f"builddir = {folder}".replace("$", "$$"),
        "rule compile",
        f"  command = {command} -MMD -MF $out.d $flags -c $in -o $out",
        "  description = $in for $capability",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    common = KERNEL_FLAGS + (GCC_UNROLL_FLAGS if accepts(compiler, GCC_UNROLL_FLAGS) else [])
    objects = []
    for capability, flags in capabilities.items():
        for source in ADDED_SOURCES.get(capability, KERNEL_SOURCES):
            target = folder / capability / Path(source).with_suffix(".o").name
            every_flag = [*common, *flags, "-Icsrc", f"-DHFH_CAPABILITY={capability}"]
            rules += [
                f"build {escaped(target)}: compile {escaped(source)}",
                f"  flags = {' '.join(every_flag)}",
                f"  capability = {capability}",
            ]
            objects.append(str(target))
    folder.mkdir(parents=True, exist_ok=True)
    ninja_file = folder / "build.ninja"
    ninja_file.write_text("\n".join([*rules, ""]))
    jobs = os.environ.get("MAX_JOBS")
    ninja = ["ninja", "-f", str(ninja_file), *(["-j", jobs] if jobs else [])]
    if subprocess.run(ninja).returncode != 0:
        fail("the CPU kernels did not compile; the compiler's messages are above")
    return objects


def cpu_extension(compiler: list[str]) -> dict[str, Any]:
    """setup()'s arguments for hfh_kernels._C."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        fail(
            f"compiling needs PyTorch in the build environment ({error}); install torch, then use "
            "pip install --no-build-isolation, or set HFH_BUILD=none for a pure-Python package"
        )
    # pip does not put the environment's own scripts, ninja among them, on the PATH.
    os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    os.environ["CXX"] = shlex.join(compiler)
    if not shutil.which("ninja"):
        fail("compiling needs ninja (pip install ninja), or set HFH_BUILD=none")
    capabilities = accepted_capabilities(compiler)

    class BuildWithKernels(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            # Kernels link after the torch-facing objects and in ascending order: of an inline
            # function emitted by several objects the linker keeps the first, so no machine is
            # handed a copy made for a higher capability than its own.
            folder = Path(self.build_temp, "kernels")
            self.extensions[0].extra_objects = compile_kernels(compiler, capabilities, folder)
            super().build_extensions()

    # at::parallel_for is an OpenMP header template on Linux. Only compiling needs the flag: the
    # runtime comes with libtorch, and linking another would give the process two thread pools.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    extension = cpp_extension.CppExtension(
        "hfh_kernels._C",
        TORCH_SOURCES,
        include_dirs=[str(Path("csrc").absolute())],
        define_macros=[(f"HFH_HAS_{name.upper()}", None) for name in capabilities],
        extra_compile_args=[*COMMON_FLAGS, "-g0", *openmp],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildWithKernels}}


def chosen_extension() -> dict[str, Any]:
    """setup()'s arguments for what HFH_BUILD asks for; none for a pure-Python package."""
    choice = os.environ.get("HFH_BUILD", "auto")
    if choice not in ("auto", "none", "cpu", "cuda"):
        fail(f"HFH_BUILD must be auto, none, cpu or cuda, not {choice!r}")
    if choice == "cuda":
        fail("HFH_BUILD=cuda cannot be built: this version has no CUDA sources; use auto or cpu")
    if choice == "none":
        return {}
    compiler = find_compiler()
    missing = missing_for_cpu(compiler)
    if compiler is None or missing:
        if choice == "cpu":
            fail(f"HFH_BUILD=cpu cannot be built: {missing}")
        print(f"hfh_kernels: building without compiled kernels: {missing}", file=sys.stderr)
        return {}
    return cpu_extension(compiler)


setup(**chosen_extension())
