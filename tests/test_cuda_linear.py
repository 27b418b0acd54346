"""The CUDA kernels of linear, its input's gradient and materialize, on a GPU or emulated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction
from tests.cuda_device import DEVICE, needs_cuda
from tests.samples import BFLOAT16, Arguments, Sample, assert_matches, differentiate, run
from tests.test_operators import calls

pytestmark = needs_cuda
FLOAT16 = torch.float16


def sample(name: str, **options: Any) -> Sample:
    """One whose columns the kernels take, in bfloat16 unless told."""
    spec = dict(seed=len(name), num_hashes=4, pool_size=2560, block=64)
    spec |= {key: options.pop(key) for key in list(options) if key in HashSpec.__annotations__}
    reconstruction = Reconstruction(
        options.pop("depth", 2), options.pop("width", 4), options.pop("activation", "relu")
    )
    layer = Sample(
        name=name,
        hash_spec=HashSpec(**spec),
        reconstruction=reconstruction,
        **({"in_features": 192, "out_features": 37} | options),
    )
    dtype = BFLOAT16 if layer.dtype == torch.float32 else layer.dtype
    return dataclasses.replace(layer, dtype=dtype, pool_dtype=dtype)


NETWORKS = [
    *[
        sample(f"{num_hashes} hashes, depth {depth}", num_hashes=num_hashes, depth=depth)
        for num_hashes, depth in ((1, 0), (3, 0), (1, 1), (2, 1), (4, 1), (8, 1))
    ],
    *[
        sample(f"width {width}, {activation}, {dtype}", width=width, activation=activation,
               dtype=dtype)
        for width, activation, dtype in (
            (4, "relu", FLOAT16), (4, "tanh", FLOAT16), (8, "relu", FLOAT16), (8, "relu", BFLOAT16)
        )
    ],
    *[
        sample(f"{num_hashes} hashes, linear, float16", num_hashes=num_hashes, depth=1,
               dtype=FLOAT16)
        for num_hashes in (1, 4, 8)
    ],
]  # fmt: skip
# With windows of fewer rows than a tile, of more than a group, and beyond the pool's end; then
# from the pool itself, which is too large to be worth copying.
PLACES = [
    *[
        sample(
            f"block {block}, window {window} of {rows} rows from row {row}",
            pool_size=20 * block, block=block, window=window * block, rows_per_window=rows,
            row_offset=row, out_features=83, depth=depth,
        )
        for block in (32, 64, 128)
        for window, rows, row, depth in (
            (3, 5, 3, 2), (12, 32, 0, 1), (12, 40, 2**31 - 50, 2), (20, 7, 2**32 - 83, 1),
            (12, 2**32 - 1, 2**31 - 50, 2), (12, 40, 2**31 - 50, 1), (9, 256, 200, 1),
        )
    ],
    *[
        sample(f"block {block}, columns from {col}", block=block, pool_size=256 * 200,
               in_features=128, col_offset=col, depth=depth)
        for block in (32, 64, 256)
        for col, depth in ((0, 1), (64, 2), (2**32 - 128, 2))
    ],
    *[
        sample(f"{out} x {columns}", out_features=out, in_features=columns, has_bias=False)
        for out, columns in ((1, 64), (16, 64), (64, 1024), (129, 64))
    ],
    *[sample(f"parts, depth {depth}", in_features=1024, depth=depth) for depth in (1, 2)],
]  # fmt: skip
ELEMENTS = [
    sample(
        f"block {block}, {window or 'no'} window, {dtype}",
        block=block,
        pool_size=960,
        window=window,
        rows_per_window=window and 9,
        dtype=dtype,
        batch=(33,),
        col_offset=64,
        depth=depth,
        num_hashes=num_hashes,
    )
    for block in (1, 4, 8, 16)
    for window, dtype, depth, num_hashes in (
        (None, BFLOAT16, 2, 4),
        (240, FLOAT16, 1, 2),
        (448, BFLOAT16, 1, 8),
    )
] + [sample("a large pool by elements", block=2, pool_size=2**17, batch=(33,), in_features=64)]
BATCHES = [
    sample(f"batch {batch}, depth {depth}, {dtype}", batch=batch, depth=depth, dtype=dtype)
    for batch in ((1,), (8,), (9,), (16,), (3, 6), (32,))
    for depth, dtype in ((1, BFLOAT16), (2, FLOAT16))
] + [
    sample("many hashes, batch 17", num_hashes=8, depth=1, batch=(17,)),
    sample("width 8, batch 17", width=8, batch=(17,)),
]  # fmt: skip
SAMPLES = [*NETWORKS, *PLACES, *ELEMENTS, *BATCHES]


def by_name(samples: list[Sample]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sample", samples, ids=lambda sample: sample.name)


def on_device(arguments: Arguments) -> Arguments:
    return arguments.map(lambda tensor: tensor.to(DEVICE))


def linear(sample: Sample, arguments: Arguments, backend: str) -> Tensor:
    weight = sample.weight._replace(backend=backend)
    output: Tensor = torch.ops.hfh.linear(*arguments, sample.out_features, *weight)
    return output


def check_linear(sample: Sample, backend: str) -> None:
    arguments = sample.arguments()
    with torch.no_grad():
        actual = linear(sample, on_device(arguments), backend)
        expected = sample.linear(arguments.double(), "reference")
    assert actual.dtype == sample.dtype
    assert_matches(actual.cpu(), expected, sample.dtype)


def can_run(sample: Sample, backend: str) -> bool:
    """By the limits that the documentation names."""
    batch = torch.Size(sample.batch).numel()
    block, depth = sample.hash_spec.block, sample.reconstruction.depth
    if backend == "cuda:tiles":
        many = sample.hash_spec.num_hashes > 4 or (depth > 1 and sample.reconstruction.width > 4)
        return block >= 32 and batch <= (16 if many else 32)
    if backend == "cuda:slot_products":
        slots = (sample.hash_spec.window or sample.hash_spec.pool_size) // block
        few_slots = slots <= min(512, 2**15 // block)
        most = 16 if sample.dtype == BFLOAT16 else 8
        return block >= 16 and few_slots and depth <= 1 and batch <= most
    return True


@pytest.mark.parametrize("backend", ["cuda:tiles", "cuda:slot_products", "cuda:panels"])
@by_name(SAMPLES)
def test_linear(sample: Sample, backend: str, poisoned_memory: None) -> None:
    if not can_run(sample, backend):
        with pytest.raises(RuntimeError, match=f"'{backend}' cannot run: "):
            check_linear(sample, backend)
        return
    check_linear(sample, backend)


@by_name(SAMPLES)
def test_backward_input(sample: Sample, poisoned_memory: None) -> None:
    arguments = sample.arguments()
    grad = sample.grad_output()
    with torch.no_grad():
        actual = torch.ops.hfh.linear_backward_input(
            grad.to(DEVICE), *on_device(arguments)[1:3], sample.in_features,
            *sample.weight._replace(backend="cuda"),
        )  # fmt: skip
        expected = grad.double() @ sample.materialize(arguments.double(), "reference")
    assert_matches(actual.cpu(), expected, sample.dtype)


@by_name(SAMPLES)
def test_materialize(sample: Sample, poisoned_memory: None) -> None:
    arguments = sample.arguments()
    with torch.no_grad():
        actual = torch.ops.hfh.materialize(
            *on_device(arguments)[1:3], sample.out_features, sample.in_features,
            *sample.weight._replace(backend="cuda"),
        )  # fmt: skip
        expected = sample.materialize(arguments.double(), "reference")
    assert_matches(actual.cpu(), expected, sample.dtype)


@by_name([*NETWORKS[4:8], PLACES[1], BATCHES[1]])
def test_trains(sample: Sample) -> None:
    """Output and all gradients through autograd."""
    arguments = sample.arguments()
    leaves = on_device(arguments).require_grad()
    grad = sample.grad_output()
    actual = differentiate(sample.linear(leaves, "auto"), leaves, grad.to(DEVICE))
    expected = run(sample, arguments.double(), "reference")
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        assert_matches(result.cpu(), expected[name], sample.dtype)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_compiled() -> None:
    torch.compiler.reset()
    layer = sample("compiled")
    leaves = on_device(layer.arguments()).require_grad()
    grad = layer.grad_output().to(DEVICE)
    compiled = torch.compile(layer.linear, fullgraph=True, backend="aot_eager")
    actual = differentiate(compiled(leaves, "auto"), leaves, grad)
    expected = differentiate(layer.linear(leaves, "auto"), leaves, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "operator",
    ["linear", "linear_backward_input", "linear_backward_weight", "materialize",
     "materialize_backward"],
)  # fmt: skip
def test_opcheck(operator: str) -> None:
    layer = sample("checked", num_hashes=1, depth=1)
    arguments = [
        value.detach().to(DEVICE).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for value in calls(layer)[operator]
    ]
    torch.library.opcheck(
        getattr(torch.ops.hfh, operator).default, tuple(arguments), rtol=1e-2, atol=1e-2
    )


def test_several_panels(poisoned_memory: None) -> None:
    """A panel has at most 16 MiB: of rows in the product, of columns in the input's gradient."""
    tall = sample("tall", out_features=2**17 + 40, in_features=64, batch=(33,), depth=1)
    check_linear(tall, "cuda")
    wide = dataclasses.replace(tall, out_features=2**16 + 8, in_features=192, batch=(1,))
    test_backward_input(wide, None)


@pytest.mark.parametrize("backend", ["cuda:tiles", "cuda:panels", "cuda:slot_products"])
def test_not_finite(backend: str) -> None:
    """What one row reads stays in that row."""
    layer = sample("not finite", num_hashes=1, depth=1, batch=(3,), out_features=40)
    for value in (torch.nan, torch.inf):
        arguments = layer.arguments()
        arguments.pool[64 * 7 : 64 * 8 : 5] = value
        with torch.no_grad():
            actual = linear(layer, on_device(arguments), backend).cpu()
            expected = layer.linear(arguments.double(), "reference")
        finite = expected.isfinite()
        assert finite.any()
        assert not finite.all()
        torch.testing.assert_close(actual.isfinite(), finite)
        assert_matches(actual[finite], expected[finite], layer.dtype)


def test_misaligned() -> None:
    """Views that begin at any element are read right, and left as they are."""
    layer = sample("misaligned", depth=1, batch=(5,))
    arguments = layer.arguments()

    def shifted(tensor: Tensor) -> Tensor:
        storage = tensor.new_empty(tensor.numel() + 1, device=DEVICE)
        return storage[1:].view(tensor.shape).copy_(tensor)

    with torch.no_grad():
        expected = linear(layer, on_device(arguments), "cuda:tiles")
        actual = linear(layer, arguments.map(shifted), "cuda:tiles")
        columns = arguments.input.t().contiguous().t().to(DEVICE)
        permuted = linear(layer, on_device(arguments)._replace(input=columns), "cuda:tiles")
    assert torch.equal(actual, expected)
    assert torch.equal(permuted, expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"in_features": 72}, "in_features and col_offset must be multiples of 64, received 72"),
        ({"col_offset": 32}, "in_features and col_offset must be multiples of 64, .* and 32"),
        ({"num_hashes": 5}, "no kernel for num_hashes 5, depth 2, width 4, relu"),
        ({"depth": 3}, "no kernel for num_hashes 4, depth 3, width 4, relu"),
    ],
)
def test_refusals(options: dict[str, Any], reason: str) -> None:
    layer = sample("refused", **options)
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run: .*{reason}"):
        linear(layer, on_device(layer.arguments()), "cuda")


@pytest.mark.parametrize("batch", [2, 40])
def test_rounds_a_small_float32_pool(batch: int) -> None:
    layer = sample("rounded", batch=(batch,), pool_size=640, dtype=FLOAT16)
    layer = dataclasses.replace(layer, pool_dtype=torch.float32)
    check_linear(layer, "cuda")
    test_backward_input(layer, None)


def test_refuses_an_unknown_kernel() -> None:
    layer = sample("unknown")
    with pytest.raises(ValueError, match=r"backend must be .*, received 'cuda:tile'"):
        linear(layer, on_device(layer.arguments()), "cuda:tile")


@pytest.mark.parametrize("backend", ["cuda:tiles", "cuda:slot_products", "cuda:panels"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_theta_in_half_precision(backend: str, dtype: torch.dtype) -> None:
    layer = sample("half theta", depth=1)
    arguments = layer.arguments()
    arguments = arguments._replace(theta=arguments.theta.to(dtype))
    with torch.no_grad():
        actual = linear(layer, on_device(arguments), backend)
        expected = layer.linear(arguments.double(), "reference")
    assert_matches(actual.cpu(), expected, layer.dtype)


def test_refuses_mixed_dtypes() -> None:
    layer = dataclasses.replace(sample("mixed"), pool_dtype=torch.float32)
    with pytest.raises(RuntimeError, match="received input in bfloat16 and pool in float32"):
        linear(layer, on_device(layer.arguments()), "cuda")


@pytest.mark.parametrize(
    ("batch", "columns", "out_features"),
    [((0,), 64, 3), ((2, 0), 64, 3), ((2,), 64, 0), ((2,), 0, 3)],
)
def test_empty(batch: tuple[int, ...], columns: int, out_features: int) -> None:
    layer = sample("empty", batch=batch, in_features=columns, out_features=out_features)
    arguments = on_device(layer.arguments())
    output = linear(layer, arguments, "cuda")
    assert output.shape == (*batch, out_features)
    expected = (
        torch.zeros_like(output) if arguments.bias is None else arguments.bias.expand_as(output)
    )
    assert torch.equal(output, expected)
