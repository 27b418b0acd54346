"""Products on the processor's matrix unit, from bfloat16 pieces: as good as float32's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import hfh_kernels
from hfh_kernels import HashSpec, Reconstruction
from tests.samples import Sample, run
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(
    hfh_kernels.build_info().get("cpu_capability") != "avx512_amx",
    reason="needs the extension on a processor with AMX",
)

# Linear g, for numbers of full precision: the other tests keep theirs short because of the kink of
# relu.
SAMPLE = Sample(
    name="matrix unit",
    hash_spec=HashSpec(seed=3, num_hashes=4, pool_size=4096, block=64),
    reconstruction=Reconstruction(depth=1),
    batch=(70,),
    in_features=1100,
    out_features=150,
    col_offset=5,
)
# Of sums in float32: about a hundred times less than the tolerance of all other tests.
ERROR = 6e-7


@pytest.mark.parametrize(
    ("batch", "in_features", "out_features"),
    [(33, 31, 15), (64, 1100, 150), (513, 70, 33), (1030, 97, 600), (48, 2, 2100)],
)
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
def test_precision(batch: int, in_features: int, out_features: int, scale: float) -> None:
    sample = dataclasses.replace(
        SAMPLE, batch=(batch,), in_features=in_features, out_features=out_features
    )
    generator = torch.Generator().manual_seed(batch)
    arguments = sample.arguments().map(lambda x: torch.randn(x.shape, generator=generator))
    arguments = arguments._replace(input=arguments.input * scale, bias=None)
    actual = run(sample, arguments)
    expected = run(sample, arguments.double(), backend="reference")
    for name, result in actual.items():
        assert relative_error(result, expected[name]) <= ERROR, name


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite(value: float) -> None:
    arguments = SAMPLE.arguments()
    arguments.input[7, 11] = value
    actual = run(SAMPLE, arguments)
    expected = run(SAMPLE, arguments.double(), backend="reference")
    for name, result in actual.items():
        reference = expected[name]
        finite = reference.isfinite()
        assert torch.equal(result.isnan(), reference.isnan()), name
        assert torch.equal(result[~finite].nan_to_num(), reference[~finite].float().nan_to_num())
        assert relative_error(result[finite], reference[finite]) <= ERROR, name
