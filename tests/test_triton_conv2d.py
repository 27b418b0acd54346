"""Triton's conv2d against the reference, on a GPU or interpreted."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction, functional
from hfh_kernels.nn import HFHConv2d, Pool
from tests.convolution_samples import CONVOLUTIONS, LAYOUTS, SPEC, ConvolutionSample, one
from tests.samples import BFLOAT16, FLOAT32, FLOAT64, Arguments, assert_matches, differentiate
from tests.tolerances import TOLERANCE, relative_error
from tests.triton_device import DEVICE, needs_triton

pytestmark = needs_triton
FLOAT16 = torch.float16


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# Small ones: the interpreter takes milliseconds for every step of every tile.
SWEEP = [
    *[
        dataclasses.replace(sample, size=(5, 7))
        for sample in CONVOLUTIONS
        if sample.groups < 4
        and sample.in_channels < 20
        and sample.size[0] < 10
        and sample.dtype != FLOAT64
    ],
    one("depthwise", groups=3, in_channels=3, out_channels=6, kernel_size=(2, 3),
        channels_last=True),
    one("bfloat16 in groups", groups=2, in_channels=12, out_channels=14, kernel_size=(2, 1),
        dtype=BFLOAT16),
    *[
        one(
            f"{dtype} by {pool_dtype}, channels last {channels_last}".replace("torch.", ""),
            in_channels=4,
            kernel_size=(1, 2),
            size=(2, 3),
            dtype=dtype,
            pool_dtype=pool_dtype,
            channels_last=channels_last,
        )
        for (dtype, pool_dtype), channels_last in zip(
            itertools.product((FLOAT32, BFLOAT16, FLOAT16), repeat=2),
            itertools.cycle((False, True)),
        )
    ],
    *[
        one(
            f"{num_hashes} hashes, block {block}, {network.depth} deep, {network.activation}",
            hash_spec=HashSpec(
                seed=block,
                num_hashes=num_hashes,
                pool_size=20 * block,
                block=block,
                window=window and 3 * block,
                rows_per_window=window and 3,
            ),
            reconstruction=network,
            in_channels=3,
            kernel_size=(2, 2),
            size=(3, 3),
            col_offset=block // 2 + 1,
        )
        for num_hashes, block, network, window in (
            (1, 1, Reconstruction(0), None),
            (4, 1, Reconstruction(2), 1),
            (2, 8, Reconstruction(1), 1),
            (3, 64, Reconstruction(3, width=3, activation="tanh"), None),
            (16, 256, Reconstruction(1), None),
        )
    ],
    # Every edge of every tile, and sums in parts.
    one("large", size=(17, 16), batch=(1,), in_channels=2, out_channels=130, kernel_size=(1, 2)),
    one("large, one tap", size=(9, 15), in_channels=70, out_channels=20, kernel_size=(1, 1),
        padding=(0, 0), col_offset=13, channels_last=True),
    one("long patches", size=(3, 2), in_channels=35, out_channels=70, kernel_size=(2, 2)),
    one("a pixel of output", size=(3, 4), kernel_size=(3, 4), padding=(0, 0)),
    one("a pixel", batch=(20,), size=(1, 1), kernel_size=(1, 1), padding=(0, 0)),
    # Pixels that no tap reads: between strides, and beyond the last.
    one("stride and dilation share a factor", stride=(2, 4), dilation=(4, 2), padding=(3, 2)),
    one("strides larger than the kernel", kernel_size=(2, 1), stride=(4, 3), padding=(0, 1)),
    one("strides larger than the image", size=(3, 2), stride=(2**40, 7)),
    one("a kernel larger than the image", size=(2, 2), kernel_size=(5, 4), padding=(2, 3)),
]  # fmt: skip
each_sample = pytest.mark.parametrize("sample", SWEEP, ids=lambda sample: sample.name)


def results(
    sample: ConvolutionSample,
    arguments: Arguments,
    backend: str,
    layout: Callable[[Tensor], Tensor] = lambda images: images,
) -> dict[str, Tensor]:
    """Output and gradients, Triton's computed on DEVICE and brought home."""
    device = DEVICE if backend == "triton" else "cpu"
    leaves = arguments.map(lambda tensor: tensor.to(device))
    leaves = leaves._replace(input=layout(leaves.input)).require_grad()
    output = sample.convolve(leaves, backend)
    grad_output = layout(sample.grad_output().to(output))
    found = differentiate(output, leaves, grad_output)
    return {name: result.cpu() for name, result in found.items()}


def assert_matches_reference(
    sample: ConvolutionSample, layout: Callable[[Tensor], Tensor] = lambda images: images
) -> None:
    arguments = sample.arguments()
    actual = results(sample, arguments, "triton", layout)
    expected = results(sample, arguments.double(), "reference", layout)
    assert actual.keys() == expected.keys()
    dtypes = arguments._asdict() | {"output": arguments.input}
    for name, result in actual.items():
        assert result.dtype == dtypes[name].dtype, name
        assert_matches(result, expected[name], sample.dtype)


@each_sample
def test_deterministic(sample: ConvolutionSample, poisoned_memory: None) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert_matches_reference(sample)


@pytest.mark.parametrize("sample", SWEEP[1::5], ids=lambda sample: sample.name)
def test_plain(sample: ConvolutionSample) -> None:
    assert_matches_reference(sample)


LAYERS = one("layout", in_channels=4, size=(4, 5), kernel_size=(2, 2))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    assert_matches_reference(LAYERS, layout)


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_is_kept(channels_last: bool) -> None:
    sample = dataclasses.replace(LAYERS, channels_last=channels_last)
    actual = results(sample, sample.arguments(), "triton")
    for name in ("output", "input"):
        assert actual[name].stride() == sample.in_format(actual[name]).stride(), name


def test_images_far_apart() -> None:
    """Offsets past 2**31, in memory of which little is touched."""

    def apart(images: Tensor) -> Tensor:
        room = images.new_empty(2**31 + images.numel())
        return room.as_strided(images.shape, (2**30, *images.stride()[1:])).copy_(images)

    sample = dataclasses.replace(LAYERS, batch=(3,), dtype=BFLOAT16)
    arguments = sample.arguments()
    expected = results(sample, arguments.double(), "reference")
    for name, result in results(sample, arguments, "triton", apart).items():
        assert_matches(result, expected[name], BFLOAT16)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_no_images(dtype: torch.dtype, poisoned_memory: None) -> None:
    sample = dataclasses.replace(LAYERS, batch=(0,), dtype=dtype, groups=2, channels_last=True)
    actual = results(sample, sample.arguments(), "triton")
    assert actual["output"].shape == sample.output_size
    assert actual["input"].shape == (0, 4, 4, 5)
    assert not actual["pool"].any()
    assert not actual["theta"].any()


def test_terms_of_very_different_size(poisoned_memory: None) -> None:
    """Integers must not round small gradients away where one bound serves all."""
    sample = LAYERS
    arguments = sample.arguments()
    arguments.input[:, 0] *= 1e4
    arguments.input[:, 1] *= 1e-4
    expected = results(sample, arguments.double(), "reference")
    actual = results(sample, arguments, "triton")
    assert relative_error(actual["pool"], expected["pool"]) < TOLERANCE[FLOAT32]


def test_largest_sum_of_integers(poisoned_memory: None) -> None:
    """Every patch and channel alike: Cauchy and Schwarz's bound is met, and does not overflow."""
    sample = one("alike", in_channels=1, out_channels=1, kernel_size=(1, 1), padding=(0, 0),
                 hash_spec=HashSpec(num_hashes=1, pool_size=1), has_bias=False,
                 reconstruction=Reconstruction(0))  # fmt: skip
    arguments = sample.arguments()
    leaves = arguments.map(lambda tensor: torch.ones_like(tensor, device=DEVICE)).require_grad()
    output = sample.convolve(leaves, "triton")
    (gradient,) = torch.autograd.grad(output.sum(), leaves.pool)
    assert gradient.abs().item() == pytest.approx(0.7 * 2 * 9 * 7)


@pytest.mark.parametrize("kernel_size", [(1, 1), (2, 2)])
def test_nan_reaches_the_weights_that_read_it_only(kernel_size: tuple[int, int]) -> None:
    spec = HashSpec(pool_size=2**12, block=1)
    sample = dataclasses.replace(
        LAYERS, hash_spec=spec, in_channels=17, out_channels=17, kernel_size=kernel_size,
        padding=(0, 0), reconstruction=Reconstruction(1),
    )  # fmt: skip
    arguments = sample.arguments()
    arguments.pool[:20] = torch.nan
    weight = functional.materialize(
        arguments.pool, arguments.theta, 17, 17 * kernel_size[0] * kernel_size[1],
        hash_spec=spec, reconstruction=sample.reconstruction,
    )  # fmt: skip
    rows, taps = weight.isnan().any(1), weight.isnan().view(17, 17, -1).any(2).any(0)
    assert rows.any()
    assert not rows.all()
    assert not taps.all()
    actual = results(sample, arguments, "triton")
    assert torch.equal(actual["output"].isnan().any(0).any(-1).any(-1), rows)
    assert torch.equal(actual["input"].isnan().any(0).any(-1).any(-1), taps)


def test_conv1d() -> None:
    network = Reconstruction(1)
    input, pool = torch.randn(2, 4, 9), torch.randn(SPEC.pool_size)
    theta = torch.randn(network.num_parameters(SPEC.num_hashes))

    def convolve(arguments: Arguments, backend: str) -> Tensor:
        return functional.conv1d(
            *arguments, 2, 1, 1, 2, out_channels=6, kernel_size=3, hash_spec=SPEC,
            reconstruction=network, backend=backend,
        )  # fmt: skip

    arguments = Arguments(input, pool, theta, None)
    actual = convolve(arguments.map(lambda tensor: tensor.to(DEVICE)), "triton")
    expected = convolve(arguments.double(), "reference")
    assert_matches(actual.cpu(), expected, FLOAT32)


def calls(sample: ConvolutionSample) -> dict[str, tuple[Any, ...]]:
    """Each operator's arguments; those of the backward operators require no gradient."""
    arguments = sample.arguments().map(lambda tensor: tensor.to(DEVICE))
    input, *parameters = arguments.require_grad()
    rest = (*sample.geometry, *sample.weight)
    plain, grad = arguments[1:3], sample.grad_output().to(DEVICE)
    return {
        "conv2d": (input, *parameters, sample.out_channels, *rest),
        "conv2d_backward_input": (grad, *plain, input.shape, *rest),
        "conv2d_backward_weight": (grad, arguments.input, *plain, *rest),
    }


@pytest.mark.parametrize("operator", calls(LAYERS))
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(operator: str, channels_last: bool) -> None:
    sample = dataclasses.replace(LAYERS, channels_last=channels_last)
    call = getattr(torch.ops.hfh, operator).default
    # Atomic additions come in any order, here and below.
    torch.library.opcheck(call, calls(sample)[operator], rtol=1e-4, atol=1e-4)


@pytest.fixture
def _compile_anew() -> Iterator[None]:
    config: Any = torch.compiler.config
    with config.patch(force_disable_caches=True):
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_compile_anew")
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_compiled_layer() -> None:
    layer = HFHConv2d(4, 6, (2, 3), stride=(1, 2), padding=1, pool=Pool(640)).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 4, 5, 6, device=DEVICE, requires_grad=True)
    leaves = (input, *layer.parameters())
    outputs = [run(input) for run in (compiled, layer)]
    torch.testing.assert_close(*outputs)
    for actual, expected in zip(
        *(torch.autograd.grad(output.square().sum(), leaves) for output in outputs), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_bad_input() -> None:
    forward, backward_input, backward_weight = (
        (getattr(torch.ops.hfh, name).default, list(arguments))
        for name, arguments in calls(LAYERS).items()
    )
    grad = backward_input[1][0]
    for (operator, arguments), index, value, message in (
        (forward, 0, grad.double(), r"input must have one of the dtypes .*torch\.float64"),
        (forward, 0, grad[0], "input must be .batch, channels, height, width., received shape"),
        (forward, 3, grad[0, 0, 0], r"bias must have shape \[8\]"),
        (forward, 6, [0, 1], "stride must be at least 1, received"),
        (forward, 0, grad[:1, :1, :1, :1].expand(1, 4, 2**16, 2**16), "at most 2147418112 pixels"),
        (backward_input, 0, grad[:1], r"grad_output must have shape \[2, 8, 5, 6\], received"),
        (backward_input, 0, grad[0], "grad_output must be .batch, channels, height, width."),
        (backward_weight, 0, grad[..., 1:], r"grad_output must have shape \[2, 8, 5, 6\]"),
    ):
        changed = [*arguments[:index], value, *arguments[index + 1 :]]
        with pytest.raises((TypeError, ValueError), match=message):
            operator(*changed)
