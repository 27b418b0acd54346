"""Every instruction set that was built and that this machine has, one process each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hfh_kernels

INFO = hfh_kernels.build_info()
pytestmark = pytest.mark.skipif(not INFO["extension"], reason="needs the compiled extension")

ROOT = Path(__file__).parents[1]
RUN_TESTS = """
import sys
import hfh_kernels, pytest

print("capability:", hfh_kernels.build_info().get("cpu_capability"))
sys.exit(pytest.main(sys.argv[1:]))
"""
TESTS = [
    "tests/test_convolution.py::test_samples",
    "tests/test_convolution.py::test_random_samples",
    "tests/test_embedding.py::test_lookups",
    "tests/test_embedding.py::test_a_result_larger_than_the_caches",
    "tests/test_embedding_bag.py::test_bags",
    "tests/test_linear.py::test_samples",
    "tests/test_linear.py::test_random_samples",
    "tests/test_linear.py::test_nan_beside_the_columns_in_use",
    "tests/test_linear.py::test_deterministic_for_a_number_of_threads",
    "tests/test_linear_bfloat16.py::test_bfloat16_panels",
    "tests/test_linear_bfloat16.py::test_bfloat16_inputs_that_are_not_finite",
    "tests/test_linear_bfloat16.py::test_long_bfloat16_sums_are_rounded_once",
    "tests/test_materialize.py::test_golden_vectors",
    "tests/test_materialize.py::test_index_is_exact",
]


def capabilities() -> list[str]:
    """Those built, plainest first, up to the one in use."""
    built = INFO.get("cpu_capabilities", "").split(",")
    return built[: built.index(INFO["cpu_capability"]) + 1] if INFO["extension"] else []


def run_python(capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HFH_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )


def test_baseline_is_built() -> None:
    assert capabilities()[0] == "baseline"


@pytest.mark.parametrize("capability", capabilities()[:-1])
def test_on_a_plainer_machine(capability: str) -> None:
    result = run_python(capability, "-c", RUN_TESTS, "-q", "-p", "no:cacheprovider", *TESTS)
    assert result.stdout.splitlines()[0] == f"capability: {capability}"
    assert result.returncode == 0, result.stdout


def test_empty_name_means_the_best() -> None:
    result = run_python("", "-c", RUN_TESTS, "--version")
    assert result.stdout.splitlines()[0] == f"capability: {capabilities()[-1]}"


def test_unknown_name() -> None:
    script = "import hfh_kernels; print(hfh_kernels.build_info()['reason'])"
    result = run_python("sse9", "-c", script)
    valid = INFO["cpu_capabilities"]
    message = f"HFH_CPU_CAPABILITY must be one of {valid}, received 'sse9'"
    assert message in result.stdout
    assert "RuntimeWarning: hfh_kernels: compiled extension not available" in result.stderr
    assert message in result.stderr
