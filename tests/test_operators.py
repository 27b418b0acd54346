"""torch.ops.hfh as PyTorch's own tools see it: opcheck and torch.compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import HashSpec, dispatch
from hfh_kernels.nn import HFHConv1d, HFHConv2d, HFHLinear, Pool
from tests.convolution_samples import CONVOLUTIONS, ConvolutionSample
from tests.lookups import operator_calls
from tests.samples import BFLOAT16, SAMPLES, Sample, differentiate, run

pytestmark = [
    pytest.mark.skipif(
        dispatch.can_run("cpu", torch.ones(1)) is not None, reason="needs the compiled extension"
    ),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
]
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    """A graph from a cache on disk may be that of another build."""
    config: Any = torch.compiler.config
    with config.patch(force_disable_caches=True):
        yield
    torch.compiler.reset()


def calls(sample: Sample) -> dict[str, tuple[Any, ...]]:
    """Each operator's arguments; those of the backward operators require no gradient."""
    arguments = sample.arguments()
    input, pool, theta, bias = arguments.require_grad()
    rows, cols, weight = sample.out_features, sample.in_features, sample.weight
    grad = torch.randn(rows, cols, dtype=sample.pool_dtype)
    spec = sample.hash_spec
    coordinates = torch.arange(rows) + sample.row_offset, torch.arange(cols) + sample.col_offset
    hashing = spec.seed, spec.num_hashes
    window = weight.window, weight.rows_per_window
    slots = spec.pool_size // spec.block
    return {
        "hash_index": (*coordinates, *hashing, spec.pool_size, spec.block, *window),
        "reference_slots": (*coordinates, *hashing, slots, slots, 0),
        "materialize": (pool, theta, rows, cols, *weight),
        "materialize_backward": (grad, arguments.pool, arguments.theta, *weight),
        "linear": (input, pool, theta, bias, rows, *weight),
        "linear_backward_input": (sample.grad_output(), *arguments[1:3], cols, *weight),
        "linear_backward_weight": (sample.grad_output(), *arguments[:3], *weight),
        **operator_calls(sample),
    }


def convolution_calls(sample: ConvolutionSample) -> dict[str, tuple[Any, ...]]:
    """The same for the operators of a convolution."""
    arguments = sample.arguments()
    input, *parameters = arguments.require_grad()
    rest = (*sample.geometry, *sample.weight)
    plain, grad = arguments[1:3], sample.grad_output()
    return {
        "conv2d": (input, *parameters, sample.out_channels, *rest),
        "conv2d_backward_input": (grad, *plain, input.shape, *rest),
        "conv2d_backward_weight": (grad, arguments.input, *plain, *rest),
    }


def test_every_operator_is_called() -> None:
    names = {
        name.removeprefix("hfh::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("hfh::")
    }
    assert calls(SAMPLES[0]).keys() | convolution_calls(CONVOLUTIONS[0]).keys() == names


@pytest.mark.parametrize("operator", calls(SAMPLES[0]))
@each_sample
def test_opcheck(sample: Sample, operator: str) -> None:
    rounds = BFLOAT16 in (sample.dtype, sample.pool_dtype)
    tolerance = 1e-2 if rounds else None
    torch.library.opcheck(
        getattr(torch.ops.hfh, operator).default,
        calls(sample)[operator],
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("operator", convolution_calls(CONVOLUTIONS[0]))
@pytest.mark.parametrize(
    "sample",
    [s for s in CONVOLUTIONS if s.in_channels < 100 and s.size[0] < 20],
    ids=lambda sample: sample.name,
)
def test_opcheck_convolution(sample: ConvolutionSample, operator: str) -> None:
    tolerance = 1e-2 if sample.dtype == BFLOAT16 else None
    torch.library.opcheck(
        getattr(torch.ops.hfh, operator).default,
        convolution_calls(sample)[operator],
        rtol=tolerance,
        atol=tolerance,
    )


@each_sample
def test_compiled(sample: Sample) -> None:
    arguments = sample.arguments().require_grad()
    compiled = torch.compile(sample.linear, fullgraph=True, backend="aot_eager")
    actual = differentiate(compiled(arguments), arguments, sample.grad_output())
    expected = run(sample, arguments)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["cpu", "auto", "reference"])
def test_inductor(backend: str) -> None:
    sample = SAMPLES[0]
    arguments = sample.arguments().require_grad()
    compiled = torch.compile(sample.linear, fullgraph=True)
    actual = differentiate(compiled(arguments, backend), arguments, sample.grad_output())
    torch.testing.assert_close(actual, run(sample, arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("marked", [False, True], ids=["dynamic=True", "mark_dynamic"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_dynamic_batch(compiler: str, marked: bool) -> None:
    """One compilation serves every batch of two or more."""
    pool = Pool(640)
    layer = HFHLinear(48, 20, pool=pool)
    parameters = list(layer.parameters())
    compiled = torch.compile(
        layer, fullgraph=True, backend=compiler, dynamic=None if marked else True
    )

    def results(layer: Callable[[Tensor], Tensor], batch: int) -> list[Tensor]:
        input = torch.linspace(-1, 1, batch * 48).view(batch, 48).requires_grad_()
        if marked:
            torch._dynamo.mark_dynamic(input, 0)
        output = layer(input)
        return [output, *torch.autograd.grad(output.square().sum(), (input, *parameters))]

    results(compiled, 6)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 3, 17, 48, 64, 130):
            for actual, expected in zip(
                results(compiled, batch), results(layer, batch), strict=True
            ):
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dynamic_batch_of_images(compiler: str, channels_last: bool) -> None:
    pool = Pool(640)
    layer = HFHConv2d(6, 8, (3, 2), stride=(1, 2), padding=1, groups=2, pool=pool)
    parameters = list(layer.parameters())
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)

    def results(layer: Callable[[Tensor], Tensor], batch: int) -> list[Tensor]:
        input = torch.linspace(-1, 1, batch * 6 * 63).view(batch, 6, 9, 7)
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        torch._dynamo.mark_dynamic(input.requires_grad_(), 0)
        output = layer(input)
        assert output.is_contiguous(memory_format=torch.channels_last) == channels_last
        return [output, *torch.autograd.grad(output.square().sum(), (input, *parameters))]

    results(compiled, 6)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 3, 17):
            for actual, expected in zip(
                results(compiled, batch), results(layer, batch), strict=True
            ):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("padding", ["same", 1])
def test_compiled_conv1d(padding: int | str) -> None:
    layer = HFHConv1d(4, 6, 4, padding=padding, padding_mode="circular", pool=Pool(640))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = torch.randn(3, 4, 20)
    assert torch.equal(compiled(input), layer(input))
    assert torch.equal(compiled(input[0]), layer(input[0]))


def test_network() -> None:
    pool = Pool(640)
    network = torch.nn.Sequential(
        HFHLinear(48, 32, pool=pool), torch.nn.ReLU(), HFHLinear(32, 8, pool=pool, depth=1)
    )
    compiled = torch.compile(network, fullgraph=True)
    input = torch.randn(5, 48)
    expected = torch.autograd.grad(network(input).square().sum(), list(network.parameters()))
    actual = torch.autograd.grad(compiled(input).square().sum(), list(network.parameters()))
    for compiled_gradient, gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(compiled_gradient, gradient)


def test_compiled_under_autocast() -> None:
    sample = dataclasses.replace(SAMPLES[0], hash_spec=HashSpec(pool_size=640, block=8))
    arguments = sample.arguments().require_grad()
    compiled = torch.compile(sample.linear, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu"):
        output, expected = compiled(arguments), sample.linear(arguments)
    assert output.dtype == BFLOAT16
    assert torch.equal(output, expected)
    gradients = differentiate(output, arguments, sample.grad_output().bfloat16())
    assert gradients["pool"].dtype == torch.float32
