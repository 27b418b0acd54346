"""Builds the extension hfh_kernels._C; everything else about the package is in pyproject.toml.

The environment variable HFH_BUILD chooses what is built:
    auto  what can be compiled here, and a line on what is left out and why (the default)
    none  pure Python: every op runs on the plain PyTorch reference
    cpu   the CPU kernels, or an error
    cuda  the CPU and CUDA kernels, or an error

CUDA kernels need nvcc and a PyTorch with CUDA, not a GPU. HFH_CUDA_ARCHS restricts what they are
compiled for, such as "80 90a".
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
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
    "csrc/torch/packed_convolution.cpp",
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
    "csrc/cpu/linear_bfloat16.cpp",
    "csrc/cpu/lookup_sums.cpp",
    "csrc/cpu/packed_product.cpp",
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

CUDA_TORCH_SOURCES = sorted(str(path) for path in Path("csrc/torch/cuda").glob("*.cpp"))
CUDA_KERNEL_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
CUDA_FLAGS = ["-std=c++20", "-O3", "--compiler-options=-fPIC,-fvisibility=hidden", "-Icsrc"]
OLDEST_NVCC = (12, 4)
# Machine code for these where nvcc knows them; it serves later devices of the same major number.
# For those of a later one there is the intermediate code of CUDA_FORWARD_ARCHITECTURE.
CUDA_ARCHITECTURES = ["80", "90a", "100"]
CUDA_FORWARD_ARCHITECTURE = "90"


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


class CannotBuild(Exception):
    """What was asked for cannot be built here, and why."""


@dataclass(frozen=True)
class Toolkit:
    """nvcc, and what links with the objects it makes."""

    nvcc: str
    version: str
    include_dirs: list[str]
    library_dirs: list[str]
    code: dict[str, str]
    """Flags by what they make: sm_80 is machine code, compute_90 intermediate code."""


def find_toolkit() -> Toolkit:
    """The toolkit of $CUDA_HOME where set, else of the nvcc on the PATH.

    Raises:
        CannotBuild: there is none, or it is too old.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home, "bin", "nvcc")) if home else "nvcc")
    if nvcc is None:
        raise CannotBuild(f"no nvcc in CUDA_HOME={home}" if home else "no nvcc on the PATH")

    def ask(*arguments: str) -> str:
        result = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        if result.returncode != 0:
            command = shlex.join([nvcc, *arguments])
            raise CannotBuild(f"{command} failed: {result.stderr.strip()}")
        return result.stdout + result.stderr

    release = re.search(r"release (\d+)\.(\d+)", ask("--version"))
    version = tuple(map(int, release.groups())) if release else (0, 0)
    if version < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        raise CannotBuild(f"{nvcc} is of CUDA {version[0]}.{version[1]}, older than {oldest}")
    # nvcc may be a link, or a script elsewhere: only it knows where the rest of the toolkit is.
    commands = ask("--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)

    def folders(variable: str, option: str) -> list[str]:
        value = re.search(rf"(?m)^#\$ {variable}=(.*)", commands)
        return re.findall(f'"{option}(.*?)"', value.group(1)) if value else []

    return Toolkit(
        nvcc,
        version=f"{version[0]}.{version[1]}",
        include_dirs=folders("INCLUDES", "-I"),
        library_dirs=folders("LIBRARIES", "-L"),
        code=code_flags(known=re.findall(r"compute_(\d+)", ask("--list-gpu-arch"))),
    )


def code_flags(known: list[str]) -> dict[str, str]:
    """Flags for HFH_CUDA_ARCHS, else for all architectures, by the names of what they make."""
    chosen = os.environ.get("HFH_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    for architecture in chosen:
        if architecture.rstrip("af") not in known:
            fail(f"HFH_CUDA_ARCHS has {architecture!r}; nvcc knows {', '.join(known)}")
    names = chosen or [name for name in CUDA_ARCHITECTURES if name.rstrip("af") in known]
    flags = {f"sm_{name}": f"-gencode=arch=compute_{name},code=sm_{name}" for name in names}
    if not chosen:
        forward = f"compute_{CUDA_FORWARD_ARCHITECTURE}"
        flags[forward] = f"-gencode=arch={forward},code={forward}"
    return flags


class Ninja:
    """Compiles sources to objects in parallel: again where a source, header or flag changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: list[str] = []
        self._lines = [f"builddir = {folder}".replace("$", "$$")]

    def rule(self, name: str, command: list[str]) -> None:
        """`command` compiles with the flags that each source adds."""
        self._lines += [
            f"rule {name}",
            f"  command = {_escaped(shlex.join(command))} -MMD -MF $out.d $flags -c $in -o $out",
            "  description = $in for $target",
            "  depfile = $out.d",
            "  deps = gcc",
        ]

    def compile(self, rule: str, source: str, target: str, flags: list[str]) -> None:
        """Queues a source; its object goes to the folder's subfolder `target`."""

        def path(name: Path | str) -> str:
            return _escaped(str(name)).replace(" ", "$ ").replace(":", "$:")

        output = self.folder / target / Path(source).with_suffix(".o").name
        self._lines += [
            f"build {path(output)}: {rule} {path(source)}",
            f"  flags = {_escaped(' '.join(flags))}",
            f"  target = {target}",
        ]
        self.objects.append(str(output))

    def run(self) -> list[str]:
        """The objects, in the order of the sources."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "build.ninja"
        file.write_text("\n".join([*self._lines, ""]))
        jobs = os.environ.get("MAX_JOBS")
        command = ["ninja", "-f", str(file), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command).returncode != 0:
            fail("the kernels did not compile; the compiler's messages are above")
        return self.objects


def _escaped(text: str) -> str:
    return text.replace("$", "$$")


def compile_kernels(
    compiler: list[str], capabilities: dict[str, list[str]], toolkit: Toolkit | None, folder: Path
) -> list[str]:
    """Compiles every source for every capability; returns the objects, lowest first.

    CUDA's come before: what they hold for the CPU is for any machine.
    """
    ninja = Ninja(folder)
    if toolkit is not None:
        ninja.rule("cuda", [toolkit.nvcc])
        flags = [*CUDA_FLAGS, *toolkit.code.values()]
        for source in CUDA_KERNEL_SOURCES:
            ninja.compile("cuda", source, "cuda", flags)
    ninja.rule("cpu", compiler)
    common = KERNEL_FLAGS + (GCC_UNROLL_FLAGS if accepts(compiler, GCC_UNROLL_FLAGS) else [])
    for capability, own_flags in capabilities.items():
        flags = [*common, *own_flags, "-Icsrc", f"-DHFH_CAPABILITY={capability}"]
        for source in ADDED_SOURCES.get(capability, KERNEL_SOURCES):
            ninja.compile("cpu", source, capability, flags)
    return ninja.run()


def toolkit_for(choice: str) -> Toolkit | None:
    """What compiles the CUDA kernels; None where HFH_BUILD, `choice`, is to do without."""
    import torch

    if choice == "cpu":
        return None
    try:
        if torch.version.cuda is None:
            raise CannotBuild("this PyTorch is built without CUDA")
        toolkit = find_toolkit()
        if toolkit.version.split(".")[0] != torch.version.cuda.split(".")[0]:
            theirs = f"PyTorch is built with {torch.version.cuda}"
            raise CannotBuild(f"{toolkit.nvcc} is of CUDA {toolkit.version}, but {theirs}")
    except CannotBuild as reason:
        if choice == "cuda":
            fail(f"HFH_BUILD=cuda cannot be built: {reason}")
        print(f"hfh_kernels: building without CUDA kernels: {reason}", file=sys.stderr)
        return None
    return toolkit


def compiled_extension(compiler: list[str], choice: str) -> dict[str, Any]:
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
    toolkit = toolkit_for(choice)

    class BuildWithKernels(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            # Kernels link after the torch-facing objects and in ascending order: of an inline
            # function emitted by several objects the linker keeps the first, so no machine is
            # handed a copy made for a higher capability than its own.
            folder = Path(self.build_temp, "kernels")
            self.extensions[0].extra_objects = compile_kernels(
                compiler, capabilities, toolkit, folder
            )
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
    if toolkit is not None:
        extension.sources += CUDA_TORCH_SOURCES
        extension.include_dirs += toolkit.include_dirs
        extension.library_dirs += toolkit.library_dirs
        extension.libraries += ["c10_cuda", "torch_cuda", "cudart"]
        extension.define_macros += [
            ("HFH_HAS_CUDA", None),
            ("HFH_CUDA_VERSION", toolkit.version),
            ("HFH_CUDA_CODE", " ".join(toolkit.code)),
        ]
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildWithKernels}}


def chosen_extension() -> dict[str, Any]:
    """setup()'s arguments for what HFH_BUILD asks for; none for a pure-Python package."""
    choice = os.environ.get("HFH_BUILD", "auto")
    if choice not in ("auto", "none", "cpu", "cuda"):
        fail(f"HFH_BUILD must be auto, none, cpu or cuda, not {choice!r}")
    if choice == "none":
        return {}
    compiler = find_compiler()
    missing = missing_for_cpu(compiler)
    if compiler is None or missing:
        if choice != "auto":
            fail(f"HFH_BUILD={choice} cannot be built: {missing}")
        print(f"hfh_kernels: building without compiled kernels: {missing}", file=sys.stderr)
        return {}
    return compiled_extension(compiler, choice)


if __name__ == "__main__":
    setup(**chosen_extension())
