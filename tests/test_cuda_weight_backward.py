"""CUDA's gradients of pool and theta against the reference, on a GPU or emulated."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction
from hfh_kernels.ops.linear import reference as linear_reference
from hfh_kernels.ops.materialize import reference as materialize_reference
from tests.cuda_device import DEVICE, needs_cuda
from tests.samples import BFLOAT16, FLOAT32, Arguments, Sample, assert_matches
from tests.tolerances import TOLERANCE, relative_error

pytestmark = needs_cuda
FLOAT16 = torch.float16
DTYPES = list(itertools.product((FLOAT32, BFLOAT16, FLOAT16), repeat=2))
# More than a block's shared memory holds the gradient of.
LARGE_POOL = 2**16

DEFAULT = Sample(name="default", hash_spec=HashSpec(seed=1, num_hashes=4, pool_size=640, block=32))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Every network there is a kernel for, by columns and by quads; every block with every kind of
# window, of which the second begins inside a block; every pair of dtypes; then edges.
SAMPLES = [
    DEFAULT,
    *[
        Sample(
            name=f"{num_hashes} hashes, depth {depth}, width {width}, {activation}, block {block}, "
            f"pool of {pool_size}, {_short(dtype)}",
            hash_spec=HashSpec(
                seed=num_hashes, num_hashes=num_hashes, pool_size=pool_size, block=block
            ),
            reconstruction=Reconstruction(depth, width, activation),
            out_features=13,
            dtype=dtype,
            pool_dtype=dtype,
        )
        for num_hashes, depth, width, activation in (
            (1, 0, 1, "relu"),
            (1, 1, 1, "relu"),
            (2, 1, 1, "relu"),
            (4, 1, 1, "relu"),
            (8, 1, 1, "relu"),
            (2, 2, 4, "relu"),
            (4, 2, 4, "relu"),
            (4, 2, 4, "tanh"),
            (4, 2, 8, "relu"),
        )
        for block, pool_size, dtype in (
            (1, 960, FLOAT32),
            (64, 960, FLOAT32),
            (64, LARGE_POOL, FLOAT32),
            (64, 960, BFLOAT16),
            (64, LARGE_POOL, BFLOAT16),
        )
    ],
    *[
        Sample(
            name=f"block {block}, {window or 'no'} window, column {col_offset}",
            hash_spec=HashSpec(
                seed=block,
                num_hashes=2,
                pool_size=20 * block,
                block=block,
                window=window,
                rows_per_window=window and 5,
            ),
            in_features=min(3 * block, 300) + 19,
            out_features=23,
            col_offset=col_offset,
            row_offset=2**32 - 23,
        )
        for block in (2**i for i in range(9))
        for window, col_offset in ((None, 0), (3 * block, block // 2 + 1), (20 * block, 2**31 - 3))
    ],
    *[
        Sample(
            name=f"pool of {pool_size}, {_short(dtype)} by {_short(pool_dtype)}",
            hash_spec=HashSpec(num_hashes=2, pool_size=pool_size, block=64),
            batch=(17,),
            in_features=264,
            out_features=19,
            dtype=dtype,
            pool_dtype=pool_dtype,
        )
        for dtype, pool_dtype in DTYPES
        for pool_size in (2048, LARGE_POOL)
    ],
    *[
        Sample(
            name=f"{out_features} x {in_features}, batch {batch}, block {block}",
            hash_spec=HashSpec(
                num_hashes=2, pool_size=1280, block=block, window=256, rows_per_window=32
            ),
            reconstruction=Reconstruction(depth=1),
            batch=batch,
            in_features=in_features,
            out_features=out_features,
            theta_dtype=BFLOAT16,
            row_offset=7,
        )
        for out_features, in_features, batch, block in (
            (1, 1, (1,), 1),
            (1, 1, (300,), 64),
            (65, 1025, (2, 3), 128),
            (129, 3, (), 16),
            (0, 5, (2,), 16),
            (5, 0, (2,), 16),
            (5, 6, (0,), 16),
        )
    ],
]
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


@pytest.fixture(params=[False, True], ids=["any order", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def linear_gradients(
    sample: Sample, arguments: Arguments, grad_output: Tensor
) -> tuple[Tensor, Tensor]:
    input, pool, theta, _ = arguments.map(lambda tensor: tensor.to(DEVICE))
    grad_pool, grad_theta = torch.ops.hfh.linear_backward_weight(
        grad_output.to(DEVICE), input, pool, theta, *sample.weight._replace(backend="cuda")
    )
    return grad_pool.cpu(), grad_theta.cpu()


def weight_gradients(sample: Sample, arguments: Arguments, grad: Tensor) -> tuple[Tensor, Tensor]:
    pool, theta = arguments.pool.to(DEVICE), arguments.theta.to(DEVICE)
    grad_pool, grad_theta = torch.ops.hfh.materialize_backward(
        grad.to(DEVICE), pool, theta, *sample.weight._replace(backend="cuda")
    )
    return grad_pool.cpu(), grad_theta.cpu()


def expected_gradients(
    sample: Sample, arguments: Arguments, grad_output: Tensor
) -> tuple[Tensor, Tensor]:
    input, pool, theta, _ = arguments.double()
    return linear_reference.linear_backward_weight(
        grad_output.double(), input, pool, theta, *sample.weight
    )


def gradient_of_weight(sample: Sample, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(sample.out_features, sample.in_features, generator=generator).to(dtype)


def assert_gradients(
    actual: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    arguments: Arguments,
    dtype: torch.dtype,
) -> None:
    for result, right, parameter in zip(actual, expected, arguments[1:3], strict=True):
        assert result.dtype == parameter.dtype
        assert_matches(result, right, dtype)


@each_sample
def test_linear(sample: Sample, deterministic: bool) -> None:
    arguments, grad_output = sample.arguments(), sample.grad_output()
    actual = linear_gradients(sample, arguments, grad_output)
    expected = expected_gradients(sample, arguments, grad_output)
    assert_gradients(actual, expected, arguments, sample.dtype)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
        lambda x: torch.nn.functional.pad(x, (1, 7))[:, 1:-7],
        lambda x: x[:1].expand_as(x),
    ],
    ids=["contiguous", "transposed", "slice", "unaligned slice", "expanded"],
)
@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_materialize(
    layout: Callable[[Tensor], Tensor], block: int, dtype: torch.dtype, deterministic: bool
) -> None:
    spec = HashSpec(num_hashes=4, pool_size=320, block=block, window=64, rows_per_window=4)
    sample = dataclasses.replace(DEFAULT, hash_spec=spec, in_features=72, pool_dtype=dtype)
    arguments = sample.arguments()
    grad = layout(gradient_of_weight(sample, dtype))
    _, pool, theta, _ = arguments.double()
    expected = materialize_reference.materialize_backward(
        grad.double(), pool, theta, *sample.weight
    )
    assert_gradients(weight_gradients(sample, arguments, grad), expected, arguments, dtype)


@pytest.mark.parametrize("window", [None, 256])
def test_panels(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than are multiplied at once."""
    rows, cols = 9, 2**20
    spec = HashSpec(
        num_hashes=1, pool_size=2048, block=256, window=window, rows_per_window=window and 5
    )
    sample = dataclasses.replace(
        DEFAULT,
        hash_spec=spec,
        reconstruction=Reconstruction(depth=1),
        batch=(1,),
        in_features=cols,
        out_features=rows,
        row_offset=1,
    )
    arguments, grad_output = sample.arguments(), sample.grad_output()
    assert rows * cols * arguments.input.element_size() > 2**25
    actual = linear_gradients(sample, arguments, grad_output)
    expected = expected_gradients(sample, arguments, grad_output)
    assert_gradients(actual, expected, arguments, sample.dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("pool_size", [640, LARGE_POOL])
def test_deterministic_gradients_do_not_depend_on_the_order(
    pool_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of threads, which the emulator lets run backwards."""
    spec = dataclasses.replace(DEFAULT.hash_spec, pool_size=pool_size)
    sample = dataclasses.replace(DEFAULT, hash_spec=spec)
    arguments, grad_output = sample.arguments(), sample.grad_output().mul_(1 / 3)
    first = linear_gradients(sample, arguments, grad_output)
    monkeypatch.setenv("HFH_EMULATOR_ORDER", "reverse")
    second = linear_gradients(sample, arguments, grad_output)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("poisoned_memory")
def test_terms_of_very_different_size() -> None:
    """Integers must not round small gradients away where one bound serves all."""
    arguments, grad_output = DEFAULT.arguments(), DEFAULT.grad_output()
    arguments.input[0] *= 1e4
    arguments.input[1] *= 1e-4
    actual = linear_gradients(DEFAULT, arguments, grad_output)
    expected = expected_gradients(DEFAULT, arguments, grad_output)
    assert relative_error(actual[0], expected[0]) < TOLERANCE[FLOAT32]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.usefixtures("poisoned_memory")
def test_deterministic_gradient_of_what_is_not_finite(bad: float) -> None:
    arguments, grad_output = DEFAULT.arguments(), DEFAULT.grad_output()
    arguments.input[0, 0] = bad
    assert linear_gradients(DEFAULT, arguments, grad_output)[0].isnan().all()
    grad = gradient_of_weight(DEFAULT, FLOAT32)
    grad[3, 4] = bad
    assert weight_gradients(DEFAULT, arguments, grad)[0].isnan().all()


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.usefixtures("poisoned_memory")
def test_deterministic_gradient_of_a_product_that_overflows(depth: int) -> None:
    """float16's, whose factors and bound are finite, must show: loss scalers look for it."""
    sample = dataclasses.replace(
        DEFAULT,
        hash_spec=dataclasses.replace(DEFAULT.hash_spec, num_hashes=4 if depth else 1),
        reconstruction=Reconstruction(depth),
        dtype=FLOAT16,
    )
    arguments, grad_output = sample.arguments(), sample.grad_output()
    arguments.input[:, 5] = 1e3
    grad_output[:, 7] = 1e3
    assert linear_gradients(sample, arguments, grad_output)[0].isnan().all()


@pytest.mark.parametrize("pool_size", [2**12, LARGE_POOL])
@pytest.mark.parametrize("block", [1, 4, 64])
def test_what_is_not_part_of_the_weight_is_not_read(block: int, pool_size: int) -> None:
    """A pool is NaN but for the elements of some columns, which begin and end inside a block."""
    sample = dataclasses.replace(
        DEFAULT,
        hash_spec=HashSpec(num_hashes=2, pool_size=pool_size, block=block),
        in_features=70,
        out_features=3,
        col_offset=61,
    )
    arguments, grad_output = sample.arguments(), sample.grad_output()
    used = torch.zeros(pool_size, dtype=torch.bool)
    rows = torch.arange(sample.out_features)
    columns = torch.arange(sample.in_features) + sample.col_offset
    spec = sample.hash_spec
    offsets, _ = torch.ops.hfh.hash_index.default(
        rows, columns, spec.seed, spec.num_hashes, spec.pool_size, spec.block, 0, 0
    )
    used[offsets.flatten()] = True
    arguments.pool[~used] = torch.nan
    actual = linear_gradients(sample, arguments, grad_output)
    arguments.pool[~used] = 0
    expected = expected_gradients(sample, arguments, grad_output)
    assert_gradients(actual, expected, arguments, sample.dtype)


@pytest.mark.parametrize("pool_size", [2**12, LARGE_POOL])
def test_nan_reaches_the_elements_that_meet_it_only(pool_size: int) -> None:
    sample = dataclasses.replace(
        DEFAULT,
        hash_spec=HashSpec(num_hashes=1, pool_size=pool_size, block=4),
        reconstruction=Reconstruction(1),
    )
    arguments, grad_output = sample.arguments(), sample.grad_output()
    grad_output[1, 2] = torch.nan
    actual, _ = linear_gradients(sample, arguments, grad_output)
    expected, _ = expected_gradients(sample, arguments, grad_output)
    assert expected.isnan().any()
    assert not expected.isnan().all()
    assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("operator", ["linear_backward_weight", "materialize_backward"])
def test_opcheck(operator: str) -> None:
    input, pool, theta, _ = DEFAULT.arguments().map(lambda tensor: tensor.to(DEVICE))
    arguments = {
        "linear_backward_weight": (DEFAULT.grad_output().to(DEVICE), input, pool, theta),
        "materialize_backward": (gradient_of_weight(DEFAULT, FLOAT32).to(DEVICE), pool, theta),
    }[operator]
    torch.library.opcheck(
        getattr(torch.ops.hfh, operator).default,
        (*arguments, *DEFAULT.weight._replace(backend="cuda")),
        rtol=1e-4,
        atol=1e-4,
    )


def test_refused_arguments() -> None:
    arguments, grad_output = DEFAULT.arguments(), DEFAULT.grad_output()
    sample = dataclasses.replace(DEFAULT, reconstruction=Reconstruction(3, 5, "tanh"))
    with pytest.raises(
        RuntimeError,
        match="backend 'cuda' cannot run: there is no kernel for num_hashes 4, depth 3, width 5 "
        "and activation 'tanh'",
    ):
        linear_gradients(sample, sample.arguments(), grad_output)
    with pytest.raises(TypeError, match=r"grad_output must have input's dtype Float, received B"):
        linear_gradients(DEFAULT, arguments, grad_output.bfloat16())
    with pytest.raises(TypeError, match=r"take input in float32, .*; received Double"):
        linear_gradients(DEFAULT, arguments._replace(input=arguments.input.double()), grad_output)
    with pytest.raises(ValueError, match=r"as many rows as input, received \[4, 37\] and \[5, 70"):
        linear_gradients(DEFAULT, arguments, grad_output[:4])
    with pytest.raises(ValueError, match=r"grad must be 2-d, received shape \[37\]"):
        weight_gradients(DEFAULT, arguments, grad_output[0])
