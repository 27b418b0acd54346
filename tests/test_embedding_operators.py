"""Look-ups compiled, and how much memory they take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import dispatch
from hfh_kernels.nn import HFHEmbedding, HFHEmbeddingBag, Pool
from tests.lookups import BAGS, LOOKUPS, Lookup, results, run

pytestmark = [
    pytest.mark.skipif(
        dispatch.can_run("cpu", torch.ones(1)) is not None, reason="needs the compiled extension"
    ),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
]


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    """A graph from a cache on disk may be that of another build."""
    config: Any = torch.compiler.config
    with config.patch(force_disable_caches=True):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("lookup", [*LOOKUPS, *BAGS[:8]], ids=lambda lookup: lookup.name)
def test_compiled(lookup: Lookup) -> None:
    leaves = lookup.leaves().require_grad()
    expected = run(lookup)
    compiled = torch.compile(lookup.run, fullgraph=True, backend="aot_eager")
    actual = results(compiled(leaves, "cpu", lookup.indices()), leaves)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("lookup", [LOOKUPS[1], BAGS[5]], ids=lambda lookup: lookup.name)
def test_inductor(lookup: Lookup, backend: str) -> None:
    leaves = lookup.leaves().require_grad()
    expected = run(lookup)
    compiled = torch.compile(lookup.run, fullgraph=True)
    actual = results(compiled(leaves, backend, lookup.indices()), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(compiled(leaves, backend, lookup.indices() * 0), actual["output"])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bags", [False, True])
def test_dynamic_number_of_indices(bags: bool, compiler: str) -> None:
    """One compilation serves every number of two or more."""
    kind = HFHEmbeddingBag if bags else HFHEmbedding
    layer = kind(50, 48, pool=Pool(640), dense_rows=4, padding_idx=3)
    parameters = list(layer.parameters())
    compiled = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=True)

    def outcome(layer: Callable[..., Tensor], count: int) -> list[Tensor]:
        indices = torch.arange(3 * count).view(count, 3) % 50
        output = layer(indices)
        return [output, *torch.autograd.grad(output.square().sum(), parameters)]

    outcome(compiled, 6)
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (2, 5, 17, 130):
            for actual, expected in zip(
                outcome(compiled, count), outcome(layer, count), strict=True
            ):
                torch.testing.assert_close(actual, expected)


def test_an_index_out_of_range_is_seen_when_compiled() -> None:
    lookup = LOOKUPS[0]
    leaves = lookup.leaves()
    for backend, error in (("cpu", IndexError), ("reference", RuntimeError)):
        compiled = torch.compile(lookup.run, fullgraph=True, backend="aot_eager")
        with pytest.raises(error, match="indices must be in"):
            compiled(leaves, backend, torch.tensor([500]))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("kind", ["embedding", "bag"])
def test_peak_of_a_large_look_up(kind: str) -> None:
    """Over arguments, outputs and gradients; the table would take 244 MiB."""
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-m", "bench.peak_memory_embedding", kind],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    forward, backward = map(int, result.stdout.split())
    assert max(forward, backward) <= 8 * 2**20
