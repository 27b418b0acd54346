"""Builds the sdist and the wheels for real, offline, with the tools of the running environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import hfh_kernels

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".*cache", "__pycache__", "build", "dist", "*.egg-info", "*.so"
)
USE_INSTALLED = """
import sys
# The finder of an editable install would supply the extension of the source tree.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
import torch, hfh_kernels
from hfh_kernels import HashSpec, Reconstruction, functional

print(hfh_kernels.__file__)
print("extension", hfh_kernels.build_info()["extension"])
hash_spec, reconstruction = HashSpec(pool_size=64), Reconstruction(depth=1)
offsets, signs = functional.hash_index(range(2), range(3), hash_spec)
print(tuple(offsets.shape), tuple(signs.shape))
arguments = dict(out_features=5, hash_spec=hash_spec, reconstruction=reconstruction)
tensors = torch.ones(2, 8), torch.randn(64), torch.ones(4)
expected = functional.linear(*tensors, **arguments, backend="reference")
torch.testing.assert_close(functional.linear(*tensors, **arguments), expected)
"""


def run(
    *arguments: object, cwd: Path, variables: dict[str, str], check: bool = True
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, **variables}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if check and result.returncode != 0:
        pytest.fail(f"{command} failed:\n{result.stdout}\n{result.stderr}")
    return result


def use_installed(wheel: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Installs the wheel alone into `folder` and uses it from there."""
    variables = {"PIP_NO_INDEX": "1", "PYTHONPATH": str(folder)}
    install = ["install", "--no-deps", "--target", folder, wheel]
    run("-m", "pip", *install, cwd=folder.parent, variables=variables)
    result = run("-c", USE_INSTALLED, cwd=folder.parent, variables=variables)
    assert result.stdout.startswith(str(folder))
    assert "(2, 3, 4) (2, 3, 4)" in result.stdout
    return result


@dataclass
class Packages:
    tree: Path
    sdist: Path
    wheel: Path

    def sdist_files(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def wheel_files(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """An sdist of a copy of the source tree, and the pure-Python wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("packages")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=NOT_SOURCE)
    (tree / "hfh_kernels" / "_C.stale.so").touch()
    build = ["build", "--no-isolation", "--outdir", folder, tree]
    run("-m", *build, cwd=folder, variables={"HFH_BUILD": "none"})
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return Packages(tree, sdist, wheel)


@pytest.mark.slow
def test_sdist_holds_all_sources(packages: Packages) -> None:
    files = packages.sdist_files()
    expected = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    for folder in ("csrc", "hfh_kernels", "python", "tests"):
        expected |= {
            path.relative_to(packages.tree).as_posix()
            for path in (packages.tree / folder).rglob("*")
            if path.is_file() and path.suffix != ".so" and ".egg-info" not in str(path)
        }
    assert expected <= files
    assert not {name for name in files if name.endswith((".so", ".pyc"))}


@pytest.mark.slow
def test_wheel_holds_the_two_packages_and_nothing_else(packages: Packages) -> None:
    expected = {
        path.relative_to(root).as_posix()
        for root in (packages.tree, packages.tree / "python")
        for package in ("hfh_kernels", "hfh")
        for path in (root / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    files = {name for name in packages.wheel_files() if ".dist-info/" not in name}
    assert files == expected
    assert "hfh_kernels/py.typed" in files
    assert packages.wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_wheel_metadata(packages: Packages) -> None:
    with zipfile.ZipFile(packages.wheel) as archive:
        info = f"hfh_kernels-{hfh_kernels.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        assert "hfh = hfh.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "Name: hfh-kernels\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.10\n" in metadata


@pytest.mark.slow
def test_pure_wheel_works_and_says_once_that_it_is_slow(packages: Packages, tmp_path: Path) -> None:
    result = use_installed(packages.wheel, tmp_path / "installed")
    assert "extension False" in result.stdout
    assert result.stderr.count("compiled extension not available") == 1


@pytest.mark.slow
@pytest.mark.skipif(
    not list((ROOT / "hfh_kernels").glob("_C.*.so")), reason="the extension is not built"
)
def test_compiled_wheel_holds_the_extension(tmp_path: Path) -> None:
    """Built from the tree itself, where the objects of the in-place build are reused."""
    egg_info = ["egg_info", "--egg-base", tmp_path]
    bdist_wheel = ["bdist_wheel", "--bdist-dir", tmp_path / "bdist", "--dist-dir", tmp_path]
    run("setup.py", *egg_info, *bdist_wheel, cwd=ROOT, variables={"HFH_BUILD": "cpu"})
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert [name for name in files if re.fullmatch(r"hfh_kernels/_C\..*\.so", name)]
    assert all(name.endswith((".py", ".so", "py.typed")) for name in files)
    result = use_installed(wheel, tmp_path / "installed")
    assert "extension True" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("gpu", "HFH_BUILD must be auto, none, cpu or cuda, not 'gpu'"),
        ("", "HFH_BUILD must be auto, none, cpu or cuda, not ''"),
        ("cpu", "HFH_BUILD=cpu cannot be built: CXX=no-such-compiler was not found"),
        ("cuda", "HFH_BUILD=cuda cannot be built: CXX=no-such-compiler was not found"),
    ],
)
def test_build_that_cannot_be_is_an_error(choice: str, message: str) -> None:
    variables = {"HFH_BUILD": choice, "CXX": "no-such-compiler"}
    result = run("setup.py", "--version", cwd=ROOT, variables=variables, check=False)
    assert result.returncode != 0
    assert message in result.stderr


def test_auto_without_a_compiler_is_pure_python_and_says_so() -> None:
    variables = {"HFH_BUILD": "auto", "CXX": "no-such-compiler"}
    result = run("setup.py", "--version", cwd=ROOT, variables=variables)
    assert "without compiled kernels: CXX=no-such-compiler was not found" in result.stderr


def test_every_source_is_listed() -> None:
    listed = re.findall(r'"(csrc/[\w/]*\.cpp)"', (ROOT / "setup.py").read_text())
    present = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp")]
    # Of csrc/torch/cuda it takes all.
    assert sorted(listed) == sorted(path for path in present if "/cuda/" not in path)


def test_public_names_of_the_toolkit() -> None:
    import hfh

    assert all(getattr(hfh, name).__name__ == name for name in hfh.__all__)
    with pytest.raises(AttributeError, match="'hfh' has no attribute 'pack'"):
        hfh.pack  # noqa: B018
