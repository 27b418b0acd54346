"""The compiled linear against the reference, and what a caller may rely on besides its values."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction, dispatch, functional
from tests.samples import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    SAMPLES,
    Arguments,
    Sample,
    assert_matches,
    assert_matches_reference,
    differentiate,
    run,
)
from tests.sweep import BLOCKS, DTYPES, SWEEP

pytestmark = pytest.mark.skipif(
    dispatch.can_run("cpu", torch.ones(1)) is not None, reason="needs the compiled extension"
)
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)

LARGE = Sample(
    name="several tiles and panels",
    hash_spec=HashSpec(seed=2, pool_size=4096, block=16),
    batch=(70,),
    in_features=1100,
    out_features=300,
)


def bitwise_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_sample
def test_samples(sample: Sample) -> None:
    assert_matches_reference(sample)


@pytest.mark.parametrize("sample", SWEEP, ids=lambda sample: sample.name)
def test_sweep(sample: Sample, poisoned_memory: None) -> None:
    assert_matches_reference(sample)


@st.composite
def random_samples(draw: st.DrawFn) -> Sample:
    dtype, pool_dtype = draw(st.sampled_from(DTYPES))
    # A result of a few numbers may cancel down to what bfloat16 rounded off its terms, so there all
    # results get at least eight, theta's gradient two dozen (or, at depth 0, none).
    rounds = dtype == BFLOAT16
    sizes = st.just(0) | st.integers(8 if rounds else 1, 400)
    block = draw(st.sampled_from(BLOCKS))
    num_slots = draw(st.integers(max(1, 32 // block), 300))
    has_window = draw(st.booleans())
    in_features, out_features = draw(sizes), draw(sizes)
    return Sample(
        name="random",
        hash_spec=HashSpec(
            seed=draw(st.integers(0, 2**32 - 1)),
            num_hashes=draw(st.integers(4 if rounds else 2, 16)),
            pool_size=num_slots * block,
            block=block,
            window=draw(st.integers(1, num_slots)) * block if has_window else None,
            rows_per_window=draw(st.integers(1, 100)) if has_window else None,
        ),
        reconstruction=Reconstruction(
            draw(st.sampled_from((0, 2, 3) if rounds else (0, 1, 2, 3))),
            draw(st.integers(4 if rounds else 1, 16)),
            draw(st.sampled_from(("relu", "tanh"))),
        ),
        batch=tuple(draw(st.lists(st.integers(0, 20), max_size=2))),
        in_features=in_features,
        out_features=out_features,
        dtype=dtype,
        pool_dtype=pool_dtype,
        theta_dtype=FLOAT64 if dtype == FLOAT64 else FLOAT32,
        row_offset=draw(st.integers(0, 2**32 - out_features)),
        col_offset=draw(st.integers(0, 2**32 - in_features)),
        scale=draw(st.sampled_from((1.0, -0.03))),
        has_bias=draw(st.booleans()),
    )


@settings(deadline=None, derandomize=True, max_examples=60)
@given(random_samples())
def test_random_samples(sample: Sample) -> None:
    assert_matches_reference(sample)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda x: x[:1, :1].expand_as(x),
        lambda x: torch.cat((x, x), dim=-1)[..., : x.shape[-1]],
        lambda x: x[..., :1].expand_as(x),
    ],
    ids=["strided", "transposed", "permuted", "expanded", "slice", "one number a row"],
)
@pytest.mark.parametrize("batch", [(2, 3), (9, 11)], ids=["small", "large"])
def test_layouts(layout: Callable[[Tensor], Tensor], batch: tuple[int, int]) -> None:
    sample = dataclasses.replace(SAMPLES[0], batch=batch)
    arguments = sample.arguments()
    arguments = arguments._replace(input=layout(arguments.input)).require_grad()
    output = sample.linear(arguments)
    assert output.is_contiguous()
    grad_output = layout(sample.grad_output())
    actual = differentiate(output, arguments, grad_output)
    exact = arguments.double().require_grad()
    expected = differentiate(sample.linear(exact, "reference"), exact, grad_output.double())
    for name, result in actual.items():
        assert_matches(result, expected[name], sample.dtype)


def test_strided_parameters() -> None:
    sample = SAMPLES[0]
    arguments = sample.arguments()
    strided = arguments.map(lambda x: x.repeat_interleave(3, -1)[..., ::3])
    assert bitwise_equal(run(sample, strided), run(sample, arguments))


@each_sample
def test_gradcheck(sample: Sample) -> None:
    sample = dataclasses.replace(
        sample.in_dtype(FLOAT64),
        in_features=min(sample.in_features, 11),
        out_features=min(sample.out_features, 6),
        batch=(2,) if sample.batch else (),
    )
    # Off the grid of the samples: finite differences must not meet relu's kink.
    arguments = sample.arguments().map(lambda x: torch.randn_like(x, requires_grad=True))

    def linear(input: Tensor, pool: Tensor, theta: Tensor, bias: Tensor | None = None) -> Tensor:
        output: Tensor = torch.ops.hfh.linear(
            input, pool, theta, bias, sample.out_features, *sample.weight
        )
        return output

    leaves = [tensor for tensor in arguments if tensor is not None]
    assert torch.autograd.gradcheck(linear, leaves, fast_mode=sample.name != "default")


@pytest.mark.parametrize("wanted", ["input", "pool", "theta", "bias"])
def test_one_gradient_alone(wanted: str) -> None:
    sample = SAMPLES[0]
    arguments = sample.arguments()
    everything = run(sample, arguments)
    leaf = getattr(arguments, wanted).requires_grad_()
    output = sample.linear(arguments)
    assert torch.equal(
        torch.autograd.grad(output, leaf, sample.grad_output())[0], everything[wanted]
    )


def test_learnable_scale() -> None:
    sample = SAMPLES[0]

    def gradient(arguments: Arguments, backend: str) -> tuple[Tensor, ...]:
        scale = torch.tensor(0.3, dtype=arguments.pool.dtype, requires_grad=True)
        output = functional.linear(
            *arguments,
            out_features=sample.out_features,
            hash_spec=sample.hash_spec,
            reconstruction=sample.reconstruction,
            scale=scale,
            backend=backend,
        )
        leaves = [x for x in (scale, *arguments) if x is not None]
        return torch.autograd.grad(output, leaves, sample.grad_output().to(output.dtype))

    arguments = sample.arguments().require_grad()
    exact = gradient(arguments.double().require_grad(), "reference")
    for actual, expected in zip(gradient(arguments, "cpu"), exact, strict=True):
        assert_matches(actual, expected, FLOAT32)


@pytest.mark.parametrize("sample", [*SAMPLES, LARGE], ids=lambda sample: sample.name)
def test_repeats_bit_for_bit(sample: Sample) -> None:
    arguments = sample.arguments()
    first = run(sample, arguments)
    for _ in range(3):
        assert bitwise_equal(run(sample, arguments), first)


@pytest.mark.parametrize(
    "sample",
    [
        *SAMPLES,
        LARGE,
        dataclasses.replace(LARGE, name="one tile", batch=(300,), in_features=300, out_features=20),
        dataclasses.replace(
            LARGE, name="block 1", hash_spec=dataclasses.replace(LARGE.hash_spec, block=1)
        ),
        dataclasses.replace(LARGE.in_dtype(BFLOAT16), name="large bfloat16"),
    ],
    ids=lambda sample: sample.name,
)
def test_deterministic_for_a_number_of_threads(
    sample: Sample, num_threads: Callable[[int], None]
) -> None:
    arguments = sample.arguments()
    num_threads(1)
    one = run(sample, arguments)
    for count in (2, 3):
        num_threads(count)
        several = run(sample, arguments)
        assert bitwise_equal(run(sample, arguments), several), count
        for name in one:
            assert_matches(several[name], one[name].double(), sample.dtype)


def test_large_pool_gradient_does_not_depend_on_threads(
    num_threads: Callable[[int], None],
) -> None:
    # Beyond the size up to which each thread has a pool gradient of its own.
    spec = dataclasses.replace(LARGE.hash_spec, pool_size=2**20 + 64 * LARGE.hash_spec.block)
    sample = dataclasses.replace(LARGE, hash_spec=spec)
    arguments = sample.arguments()
    num_threads(1)
    one = run(sample, arguments)
    for count in (2, 3):
        num_threads(count)
        several = run(sample, arguments)
        for name in ("pool", "theta"):
            assert torch.equal(one[name], several[name]), (name, count)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 48, 64])
def test_samples_do_not_depend_on_the_batch(num_rows: int) -> None:
    arguments = LARGE.arguments()
    whole = LARGE.linear(arguments)
    part = LARGE.linear(arguments._replace(input=arguments.input[:num_rows]))
    assert_matches(part, whole[:num_rows].double(), LARGE.dtype)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 150), (128, 256), (299, 300)])
def test_shard_of_the_outputs(start: int, stop: int) -> None:
    arguments = LARGE.arguments()
    shard = dataclasses.replace(LARGE, row_offset=start, out_features=stop - start)
    whole = LARGE.linear(arguments)[:, start:stop]
    assert arguments.bias is not None
    part = shard.linear(arguments._replace(bias=arguments.bias[start:stop]))
    assert_matches(part, whole.double(), LARGE.dtype)


def test_shards_of_the_inputs() -> None:
    arguments = LARGE.arguments()
    whole = run(LARGE, arguments)
    cuts = [0, 1, 14, 16, 531, 1100]
    parts = []
    for start, stop in itertools.pairwise(cuts):
        shard = dataclasses.replace(LARGE, col_offset=start, in_features=stop - start)
        bias = arguments.bias if start == 0 else None
        parts.append(
            run(shard, arguments._replace(input=arguments.input[:, start:stop], bias=bias))
        )
    output = torch.stack([part["output"] for part in parts]).sum(0)
    assert_matches(output, whole["output"].double(), LARGE.dtype)
    grad_input = torch.cat([part["input"] for part in parts], dim=1)
    assert_matches(grad_input, whole["input"].double(), LARGE.dtype)
    grad_pool = torch.stack([part["pool"] for part in parts]).sum(0)
    assert_matches(grad_pool, whole["pool"].double(), LARGE.dtype)


@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("num_hashes", [1, 3, 4])
@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("batch", [1, 6, 64])
def test_nan_spreads_as_in_the_reference(
    block: int, num_hashes: int, depth: int, activation: str, batch: int
) -> None:
    sample = Sample(
        name="nan",
        hash_spec=HashSpec(num_hashes=num_hashes, pool_size=4096, block=block),
        reconstruction=Reconstruction(depth, 3, activation),
        batch=(batch,),
        col_offset=37,
    )
    arguments = sample.arguments()
    arguments.pool[::500] = torch.nan
    actual = run(sample, arguments)
    expected = run(sample, arguments.double(), backend="reference")
    assert 0 < expected["output"].isnan().sum() < expected["output"].numel()
    for name, result in actual.items():
        nan = expected[name].isnan()
        assert torch.equal(result.isnan(), nan), name
        assert_matches(result[~nan], expected[name][~nan], FLOAT32)


@pytest.mark.parametrize("batch", [1, 3, 20, 64])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("depth", "first"), [(2, 21), (1, 21), (1, 0)])
def test_nan_beside_the_columns_in_use(
    depth: int, first: int, dtype: torch.dtype, batch: int
) -> None:
    """The layer uses 21 columns of each block of 64; the rest of the pool is NaN."""
    sample = dataclasses.replace(
        SAMPLES[0],
        hash_spec=HashSpec(pool_size=640, block=64),
        reconstruction=Reconstruction(depth),
        batch=(batch,),
        in_features=21,
        out_features=150,
        col_offset=64 * 3 + first,
        dtype=dtype,
        pool_dtype=dtype,
    )
    arguments = sample.arguments()
    clean = run(sample, arguments)
    unused = torch.ones(64, dtype=torch.bool)
    unused[first : first + 21] = False
    assert not clean["pool"].view(-1, 64)[:, unused].any()
    arguments.pool.view(-1, 64)[:, unused] = torch.nan
    assert bitwise_equal(run(sample, arguments), clean)


def test_double_backward() -> None:
    sample = dataclasses.replace(SAMPLES[0].in_dtype(FLOAT64), batch=(2,), in_features=9)

    def penalty(arguments: Arguments, backend: str) -> Tensor:
        output = sample.linear(arguments, backend)
        (grad_pool,) = torch.autograd.grad(output.sum(), arguments.pool, create_graph=True)
        return grad_pool.square().sum()

    arguments = sample.arguments().require_grad()
    with pytest.raises(RuntimeError, match=r"once.*backend='reference' is twice differentiable"):
        penalty(arguments, "cpu").backward()
    penalty(arguments, "reference").backward()
    assert arguments.theta.grad is not None
    assert arguments.theta.grad.count_nonzero()


@pytest.mark.parametrize("dtype", [None, BFLOAT16])
def test_autocast(dtype: torch.dtype | None) -> None:
    sample = SAMPLES[0]
    arguments = sample.arguments().require_grad()
    with torch.autocast("cpu", dtype=dtype):
        output = sample.linear(arguments)
        assert sample.linear(arguments, "auto").dtype == BFLOAT16
    assert output.dtype == BFLOAT16
    actual = differentiate(output, arguments, sample.grad_output().bfloat16())
    for name, tensor in arguments._asdict().items():
        assert actual[name].dtype == tensor.dtype == FLOAT32
    expected = run(sample, arguments.double(), backend="reference")
    for name, result in actual.items():
        assert_matches(result, expected[name], BFLOAT16)


def test_autocast_leaves_float64_alone() -> None:
    sample = SAMPLES[0].in_dtype(FLOAT64)
    with torch.autocast("cpu"):
        assert sample.linear(sample.arguments()).dtype == FLOAT64
