"""Products on the processor's matrix unit, from bfloat16 pieces: as good as float32's own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hfh_kernels
from hfh_kernels import HashSpec, Reconstruction
from tests.convolution_samples import ConvolutionSample
from tests.convolution_samples import run as run_convolution
from tests.samples import Sample, run
from tests.tolerances import relative_error

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        hfh_kernels.build_info().get("cpu_capability") != "avx512_amx",
        reason="needs the extension on a processor with AMX",
    ),
]

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
# Each number is a sum over all weights that nearly cancels: the plain float32 kernels reach 1.9e-6.
THETA_ERROR = 2e-6


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


CONVOLUTION = ConvolutionSample(
    name="matrix unit",
    hash_spec=SAMPLE.hash_spec,
    reconstruction=SAMPLE.reconstruction,
    batch=(3,),
    in_channels=70,
    out_channels=50,
    size=(9, 11),
    col_offset=5,
)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kernel_size": (1, 1), "padding": (0, 0)},
        {"kernel_size": (2, 3), "padding": (1, 2), "dilation": (2, 1)},
        {"kernel_size": (3, 2), "padding": (0, 1), "dilation": (1, 3)},
        {"kernel_size": (5, 7), "padding": (4, 2), "size": (17, 19)},
        # A weight that is applied in parts, and images that are taken in parts.
        {"in_channels": 300, "out_channels": 50, "batch": (1,), "size": (7, 7)},
        {"batch": (60,), "in_channels": 100, "size": (14, 14)},
        {"batch": (9,), "size": (64, 60), "kernel_size": (1, 1), "padding": (0, 0)},
        {"batch": (2,), "size": (40, 1), "kernel_size": (3, 1), "padding": (1, 0)},
    ],
    ids=str,
)
def test_convolutions(changes: dict[str, Any], channels_last: bool) -> None:
    sample = dataclasses.replace(CONVOLUTION, channels_last=channels_last, **changes)
    generator = torch.Generator().manual_seed(4)
    arguments = sample.arguments().map(lambda x: torch.randn(x.shape, generator=generator))
    arguments = arguments._replace(input=sample.in_format(arguments.input))
    actual = run_convolution(sample, arguments)
    expected = run_convolution(sample, arguments.double(), backend="reference")
    for name, result in actual.items():
        assert relative_error(result, expected[name]) <= (
            THETA_ERROR if name == "theta" else ERROR
        ), name


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(
    "changes",
    [{}, {"batch": (3,), "size": (64, 60), "kernel_size": (1, 1), "padding": (0, 0)}],
    ids=str,
)
def test_convolutions_of_what_is_not_finite(changes: dict[str, Any], value: float) -> None:
    sample = dataclasses.replace(CONVOLUTION, **changes)
    arguments = sample.arguments()
    arguments.input[1, 7, 3, 2] = value
    actual = run_convolution(sample, arguments)
    expected = run_convolution(sample, arguments.double(), backend="reference")
    for name, result in actual.items():
        reference = expected[name]
        finite = reference.isfinite()
        assert torch.equal(result.isnan(), reference.isnan()), name
        assert torch.equal(result[~finite].nan_to_num(), reference[~finite].float().nan_to_num())
        assert relative_error(result[finite], reference[finite]) <= (
            THETA_ERROR if name == "theta" else ERROR
        ), name
