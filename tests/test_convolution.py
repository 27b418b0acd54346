"""The compiled convolution against the reference, and what a caller may rely on besides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv1d, conv2d

from hfh_kernels import HashSpec, Reconstruction, dispatch, functional
from tests.convolution_samples import (
    CONVOLUTIONS,
    LARGE,
    LAYOUTS,
    SPEC,
    ConvolutionSample,
    assert_matches_reference,
    one,
    run,
)
from tests.samples import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    Arguments,
    assert_matches,
    differentiate,
)
from tests.sweep import DTYPES
from tests.tolerances import TOLERANCE, relative_error

pytestmark = pytest.mark.skipif(
    dispatch.can_run("cpu", torch.ones(1)) is not None, reason="needs the compiled extension"
)
each_sample = pytest.mark.parametrize("sample", CONVOLUTIONS, ids=lambda sample: sample.name)
SMALL = [sample for sample in CONVOLUTIONS if sample.in_channels < 20]
each_small_sample = pytest.mark.parametrize("sample", SMALL, ids=lambda sample: sample.name)


@each_sample
def test_samples(sample: ConvolutionSample, poisoned_memory: None) -> None:
    assert_matches_reference(sample)


@st.composite
def random_samples(draw: st.DrawFn) -> ConvolutionSample:
    dtype, pool_dtype = draw(st.sampled_from(DTYPES))
    rounds = dtype == BFLOAT16
    groups = draw(st.sampled_from((1, 1, 2, 3, 5)))
    # In bfloat16 a sum of few terms may cancel down to what was rounded off them.
    channels = st.integers(4 if rounds else 1, 12)
    kernel, pairs = st.integers(1, 4), st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel_size, dilation = draw(st.tuples(kernel, kernel)), draw(pairs)
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    rows, cols = (d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True))
    block = draw(st.sampled_from((1, 8, 32, 256)))
    return one(
        "random",
        hash_spec=HashSpec(seed=draw(st.integers(0, 2**32 - 1)), pool_size=2048, block=block),
        reconstruction=Reconstruction(draw(st.sampled_from((0, 2, 3) if rounds else (0, 1, 2)))),
        batch=(draw(st.integers(0, 4)),),
        in_channels=groups * draw(channels),
        out_channels=groups * draw(channels),
        size=(rows + draw(st.integers(0, 12)), cols + draw(st.integers(0, 12))),
        kernel_size=kernel_size,
        stride=draw(pairs),
        padding=padding,
        dilation=dilation,
        groups=groups,
        channels_last=draw(st.booleans()),
        dtype=dtype,
        pool_dtype=pool_dtype,
        theta_dtype=FLOAT64 if dtype == FLOAT64 else FLOAT32,
        row_offset=draw(st.integers(0, 2**31)),
        col_offset=draw(st.integers(0, 2**31)),
        has_bias=draw(st.booleans()),
    )


@settings(deadline=None, derandomize=True, max_examples=150)
@given(random_samples())
def test_random_samples(sample: ConvolutionSample) -> None:
    assert_matches_reference(sample)


@st.composite
def random_calls(draw: st.DrawFn) -> tuple[int, list[int], dict[str, Any]]:
    """Dimensions, a shape with or without a batch, and arguments as of torch's functions."""
    dims = draw(st.sampled_from((1, 2)))
    groups = draw(st.sampled_from((1, 2)))

    def ints(low: int, high: int) -> Any:
        number = st.integers(low, high)
        return draw(number | st.lists(number, min_size=dims, max_size=dims))

    padding = draw(st.sampled_from(("same", "valid", None)))
    shape = [draw(st.integers(1, 3))] if draw(st.booleans()) else []
    shape += [groups * draw(st.integers(1, 4)), *(draw(st.integers(9, 14)) for _ in range(dims))]
    return (
        dims,
        shape,
        {
            "out_channels": groups * draw(st.integers(1, 4)),
            "kernel_size": ints(1, 4),
            "stride": 1 if padding == "same" else ints(1, 3),
            "padding": padding or ints(0, 3),
            "dilation": ints(1, 2),
            "groups": groups,
        },
    )


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(deadline=None, derandomize=True, max_examples=100)
@given(random_calls(), st.sampled_from(("cpu", "reference")), st.booleans())
def test_arguments_of_torch(
    call: tuple[int, list[int], dict[str, Any]], backend: str, has_bias: bool
) -> None:
    """Against torch.nn.functional with the weight materialised, on every backend."""
    dims, shape, options = call
    function, expected_function = ((functional.conv1d, conv1d), (functional.conv2d, conv2d))[
        dims - 1
    ]
    kernel_size = options["kernel_size"]
    kernel = [kernel_size] * dims if isinstance(kernel_size, int) else kernel_size
    weight_size = (options["out_channels"], shape[-dims - 1] // options["groups"], *kernel)
    network = Reconstruction()
    input, pool = torch.randn(shape).double(), torch.randn(SPEC.pool_size).double()
    theta = torch.randn(network.num_parameters(SPEC.num_hashes)).double()
    bias = torch.randn(options["out_channels"]).double() if has_bias else None
    weight = functional.materialize(
        pool,
        theta,
        weight_size[0],
        math.prod(weight_size[1:]),
        hash_spec=SPEC,
        reconstruction=network,
        scale=0.7,
    )
    output = function(
        input, pool, theta, bias, hash_spec=SPEC, reconstruction=network, scale=0.7,
        backend=backend, **options,
    )  # fmt: skip
    torch_options = {name: options[name] for name in ("stride", "padding", "dilation", "groups")}
    expected = expected_function(input, weight.view(weight_size), bias, **torch_options)
    assert relative_error(output, expected) <= TOLERANCE[FLOAT64]


@each_small_sample
def test_gradcheck(sample: ConvolutionSample) -> None:
    sample = dataclasses.replace(
        sample.in_dtype(FLOAT64), batch=(1,), size=(4, 5), dilation=(1, 1), padding=(1, 1)
    )
    # Off the grid of the samples: finite differences must not meet relu's kink.
    arguments = sample.arguments().map(lambda x: torch.randn_like(x, requires_grad=True))

    def convolution(*tensors: Tensor) -> Tensor:
        return sample.convolve(Arguments(*tensors, *[None] * (4 - len(tensors))))

    leaves = [tensor for tensor in arguments if tensor is not None]
    assert torch.autograd.gradcheck(convolution, leaves, fast_mode=sample.name != "default")


@pytest.mark.parametrize("sample", [CONVOLUTIONS[0], LARGE], ids=lambda sample: sample.name)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout: Callable[[Tensor], Tensor], sample: ConvolutionSample) -> None:
    arguments = sample.arguments()
    arguments = arguments._replace(input=layout(arguments.input)).require_grad()
    grad_output = layout(sample.grad_output())
    actual = differentiate(sample.convolve(arguments), arguments, grad_output)
    exact = arguments.double().require_grad()
    expected = differentiate(sample.convolve(exact, "reference"), exact, grad_output.double())
    for name, result in actual.items():
        assert_matches(result, expected[name], sample.dtype)


@each_sample
def test_memory_format_is_kept(sample: ConvolutionSample) -> None:
    results = run(sample, sample.arguments())
    for name in ("output", "input"):
        expected = sample.in_format(results[name])
        assert results[name].stride() == expected.stride(), name


@each_sample
def test_repeats_bit_for_bit(sample: ConvolutionSample) -> None:
    arguments = sample.arguments()
    first = run(sample, arguments)
    for _ in range(2):
        again = run(sample, arguments)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT64])
def test_no_images(dtype: torch.dtype, groups: int, poisoned_memory: None) -> None:
    sample = dataclasses.replace(
        one("none", groups=groups).in_dtype(dtype), batch=(0,), channels_last=True
    )
    results = run(sample, sample.arguments())
    assert results["output"].shape == (0, 8, 9, 7)
    assert results["input"].shape == (0, 6, 9, 7)
    assert not results["pool"].any()
    assert not results["theta"].any()


@pytest.mark.parametrize("wanted", ["input", "pool", "theta", "bias"])
def test_one_gradient_alone(wanted: str) -> None:
    sample = LARGE
    arguments = sample.arguments()
    everything = run(sample, arguments)
    leaf = getattr(arguments, wanted).requires_grad_()
    (gradient,) = torch.autograd.grad(sample.convolve(arguments), leaf, sample.grad_output())
    assert torch.equal(gradient, everything[wanted])


@pytest.mark.parametrize("sample", [CONVOLUTIONS[0], LARGE], ids=lambda sample: sample.name)
def test_nan_reaches_the_weights_that_read_it_only(sample: ConvolutionSample) -> None:
    spec = HashSpec(pool_size=2**15, block=1)
    sample = dataclasses.replace(sample, hash_spec=spec, out_channels=sample.out_channels)
    arguments = sample.arguments()
    arguments.pool[:2] = torch.nan
    weight = functional.materialize(
        arguments.pool,
        arguments.theta,
        sample.out_channels,
        sample.in_channels * 9,
        hash_spec=spec,
        reconstruction=sample.reconstruction,
    )
    rows = weight.isnan().any(1)
    assert rows.any()
    assert not rows.all()
    output = sample.convolve(arguments)
    assert torch.equal(output.isnan().any(0).any(-1).any(-1), rows)


def test_learnable_scale() -> None:
    sample = one("scale")

    def gradients(arguments: Arguments, backend: str) -> tuple[Tensor, ...]:
        scale = torch.tensor(0.3, dtype=arguments.pool.dtype, requires_grad=True)
        output = functional.conv2d(
            *arguments,
            padding=1,
            out_channels=sample.out_channels,
            kernel_size=3,
            hash_spec=sample.hash_spec,
            reconstruction=sample.reconstruction,
            scale=scale,
            backend=backend,
        )
        leaves = [x for x in (scale, *arguments) if x is not None]
        return torch.autograd.grad(output, leaves, sample.grad_output().to(output.dtype))

    arguments = sample.arguments()
    exact = gradients(arguments.double().require_grad(), "reference")
    for actual, expected in zip(gradients(arguments.require_grad(), "cpu"), exact, strict=True):
        assert_matches(actual, expected, FLOAT32)


def test_autocast() -> None:
    sample = one("autocast")
    arguments = sample.arguments().require_grad()
    with torch.autocast("cpu"):
        output = sample.convolve(arguments)
    assert output.dtype == BFLOAT16
    actual = differentiate(output, arguments, sample.grad_output().bfloat16())
    expected = run(sample, arguments.double(), backend="reference")
    for name, result in actual.items():
        assert_matches(result, expected[name], BFLOAT16)


def test_second_derivative_is_refused() -> None:
    sample = one("twice").in_dtype(FLOAT64)
    arguments = sample.arguments().require_grad()
    for backend in ("cpu", "reference"):
        output = sample.convolve(arguments, backend)
        (gradient,) = torch.autograd.grad(output.sum(), arguments.pool, create_graph=True)
        if backend == "cpu":
            with pytest.raises(RuntimeError, match="differentiable once"):
                torch.autograd.grad(gradient.square().sum(), arguments.theta)
        else:
            (second,) = torch.autograd.grad(gradient.square().sum(), arguments.theta)
            assert second.count_nonzero()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("sample", CONVOLUTIONS[-8:], ids=lambda sample: sample.name)
def test_threads_agree(sample: ConvolutionSample, count: int) -> None:
    arguments = sample.arguments()
    expected = run(sample, arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        actual = run(sample, arguments)
    finally:
        torch.set_num_threads(before)
    for name, result in actual.items():
        assert_matches(result, expected[name].double(), sample.dtype)
