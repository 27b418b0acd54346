"""The compiled linear in bfloat16, which has kernels of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hfh_kernels import HashSpec, Reconstruction, dispatch
from tests.samples import BFLOAT16, Sample, assert_matches, assert_matches_reference
from tests.test_linear import LARGE
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(
    dispatch.can_run("cpu", torch.ones(1)) is not None, reason="needs the compiled extension"
)


@pytest.mark.parametrize("batch", [2, 13, 300, 800])
@pytest.mark.parametrize(
    ("block", "in_features", "out_features"), [(1, 257, 131), (64, 1101, 301), (64, 640, 700)]
)
def test_bfloat16_panels(
    batch: int, block: int, in_features: int, out_features: int, poisoned_memory: None
) -> None:
    """Several tiles and panels of the batch and of both sides of the weight, and ragged ends."""
    sample = dataclasses.replace(
        LARGE.in_dtype(BFLOAT16),
        hash_spec=HashSpec(seed=2, pool_size=4096, block=block),
        batch=(batch,),
        in_features=in_features,
        out_features=out_features,
        has_bias=True,
    )
    assert_matches_reference(sample)


@pytest.mark.parametrize("batch", [5, 100])
def test_bfloat16_slot_products(batch: int, poisoned_memory: None) -> None:
    # At four slots they are the fastest way, for the outputs and for all gradients.
    sample = dataclasses.replace(
        LARGE.in_dtype(BFLOAT16),
        hash_spec=HashSpec(seed=2, pool_size=1024, block=256),
        reconstruction=Reconstruction(1),
        batch=(batch,),
        in_features=1024,
        out_features=600,
    )
    assert_matches_reference(sample)


@pytest.mark.parametrize("batch", [1, 2, 13, 70])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bfloat16_inputs_that_are_not_finite(batch: int, value: float) -> None:
    sample = dataclasses.replace(LARGE.in_dtype(BFLOAT16), batch=(batch,), in_features=1101)
    arguments = sample.arguments()
    arguments.input[batch // 2, 1100] = value
    arguments.input[0, 3] = value
    actual = sample.linear(arguments)
    expected = sample.linear(arguments.double(), "reference")
    assert not expected.isfinite().all()
    assert torch.equal(actual.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(actual.isinf(), infinite)
    assert torch.equal(actual[infinite].double(), expected[infinite])
    assert_matches(actual[~infinite & ~actual.isnan()], expected[expected.isfinite()], BFLOAT16)


@pytest.mark.parametrize(("out_features", "in_features"), [(48, 131072), (131072, 48)])
def test_long_bfloat16_sums_are_rounded_once(out_features: int, in_features: int) -> None:
    sample = Sample(
        name="long",
        hash_spec=HashSpec(seed=3, num_hashes=4, pool_size=4096, block=64),
        batch=(32,),
        in_features=in_features,
        out_features=out_features,
        dtype=BFLOAT16,
        has_bias=False,
        scale=0.05,
    )
    arguments = sample.arguments()
    input = arguments.input.requires_grad_()
    weight = sample.materialize(arguments).double()
    output = sample.linear(arguments)
    gradient = torch.randn(output.shape).to(BFLOAT16)
    (grad_input,) = torch.autograd.grad(output, input, gradient)
    # The weight and the result are each rounded to 8 bits: 0.0024, however long the sum.
    assert relative_error(output, input.detach().double() @ weight.T) <= 3e-3
    assert relative_error(grad_input, gradient.double() @ weight) <= 3e-3
