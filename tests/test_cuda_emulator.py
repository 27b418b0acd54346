"""The emulator itself, with kernels of its own: tests/cuda_emulator/self_test.cpp."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from tests.cuda_device import EMULATED, needs_cuda
from tests.cuda_emulator import build

pytestmark = [*needs_cuda, pytest.mark.skipif(not EMULATED, reason="nothing is emulated")]

ORDERS = ("forward", "reverse")
NUM_BLOCKS, NUM_THREADS = 3, 256


def call(name: str, *arguments: object) -> None:
    """Calls a function of self_test.cpp; RuntimeError with what it returns, if anything."""
    function = getattr(ctypes.CDLL(str(build.LIBRARY)), f"test_{name}")
    function.restype = ctypes.c_char_p
    reason = function(
        *(
            ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else argument
            for argument in arguments
        )
    )
    if reason:
        raise RuntimeError(reason.decode())


def reduction_error(*, with_barriers: bool) -> float:
    values = torch.randn(NUM_BLOCKS, NUM_THREADS)
    sums = torch.empty(NUM_BLOCKS)
    call("reduce", values, sums, NUM_BLOCKS, NUM_THREADS, with_barriers)
    return (sums - values.sum(1)).abs().max().item()


@pytest.mark.parametrize("order", ORDERS)
def test_barriers(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFH_EMULATOR_ORDER", order)
    assert reduction_error(with_barriers=True) < 1e-4


def test_missing_barriers_are_seen_in_one_of_the_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for order in ORDERS:
        monkeypatch.setenv("HFH_EMULATOR_ORDER", order)
        errors.append(reduction_error(with_barriers=False))
    assert any(math.isnan(error) for error in errors)


def test_deadlock() -> None:
    message = "deadlock: deadlock in block 0: thread 0 at __syncwarp, thread 1 to 63 at __syncthr"
    with pytest.raises(RuntimeError, match=message):
        call("deadlock")
    # The threads that were given up do no harm to the next launch.
    assert reduction_error(with_barriers=True) < 1e-4


def test_lanes_at_different_operations() -> None:
    message = "mismatch: .*at __ballot_sync, where thread 0 is at __shfl_xor_sync"
    with pytest.raises(RuntimeError, match=message):
        call("mismatch", torch.empty(32, dtype=torch.int32))


@pytest.mark.parametrize(("operand", "width"), [(0, 32), (1, 32), (16, 32), (3, 16), (5, 8)])
def test_shuffles(operand: int, width: int) -> None:
    values = torch.randint(1000, (64,), dtype=torch.int32)
    groups = values.view(-1, width)
    lanes = torch.arange(width)
    sources = {
        0: torch.full((width,), operand),
        1: torch.where(lanes >= operand, lanes - operand, lanes),
        2: torch.where(lanes + operand < width, lanes + operand, lanes),
        3: lanes ^ operand,
    }
    for kind, source in sources.items():
        result = torch.empty(64, dtype=torch.int32)
        call("shuffle", values, result, kind, operand, width)
        torch.testing.assert_close(result.view(-1, width), groups[:, source])


def test_votes() -> None:
    values = (torch.rand(4, 16) < 0.5).int()
    values[2], values[3] = 0, 1
    ballots, any_, all_ = (torch.empty(4, 16, dtype=torch.int32) for _ in range(3))
    call("vote", values, ballots, any_, all_)
    bits = (values.long() << torch.arange(16)).sum(1)
    # The second half of a warp votes with its high bits.
    expected = bits << torch.tensor([0, 16, 0, 16])
    assert torch.equal(ballots.long() & 0xFFFFFFFF, expected[:, None].expand(4, 16))
    assert torch.equal(any_, values.amax(1, keepdim=True).expand(4, 16))
    assert torch.equal(all_, values.amin(1, keepdim=True).expand(4, 16))


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_that_left_are_not_waited_for(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFH_EMULATOR_ORDER", order)
    ballots = torch.zeros(2, 32, dtype=torch.int32)
    call("exit_early", ballots)
    assert torch.equal(ballots[:, 16:].long() & 0xFFFFFFFF, torch.full((2, 16), 0xFFFF0000))
    assert not ballots[:, :16].any()


def copied(kind: str) -> tuple[Tensor, Tensor]:
    """64 floats and what a copy of them through shared memory gave."""
    kinds = ("async", "async unwaited", "bulk", "bulk unwaited", "bulk short", "misaligned")
    values, result = torch.randn(72), torch.empty(64)
    call("copy", values, result, kinds.index(kind))
    return values[:64], result


@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["async", "bulk"])
def test_copies(kind: str, order: str, copies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFH_EMULATOR_ORDER", order)
    monkeypatch.setenv("HFH_EMULATOR_COPIES", copies)
    values, result = copied(kind)
    assert torch.equal(result, values)


@pytest.mark.parametrize(("kind", "arrived"), [("async unwaited", 32), ("bulk unwaited", 0)])
def test_unwaited_copies_do_not_arrive(kind: str, arrived: int) -> None:
    values, result = copied(kind)
    assert torch.equal(result[:arrived], values[:arrived])
    assert result[arrived:].isnan().all()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bulk short", "deadlock in block 0: thread 0 to 31 at copy_barrier_wait"),
        ("misaligned", "copy_async16: misaligned"),
    ],
)
def test_wrong_copies(kind: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        copied(kind)


def test_bulk_copies_need_the_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFH_EMULATOR_CAPABILITY", "80")
    with pytest.raises(RuntimeError, match="copy_barrier_init on a device that lacks it"):
        copied("bulk")


def test_writes_outside_shared_memory() -> None:
    call("write_at", 127)
    for index in (128, -1):
        with pytest.raises(RuntimeError, match="block 0 wrote outside its shared memory of 128"):
            call("write_at", index)


def test_more_shared_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    call("shared_bytes", 227 * 1024)
    with pytest.raises(RuntimeError, match="232449 bytes of shared memory, of 232448"):
        call("shared_bytes", 227 * 1024 + 1)
    monkeypatch.setenv("HFH_EMULATOR_CAPABILITY", "80")
    with pytest.raises(RuntimeError, match="232448 bytes of shared memory, of 166912"):
        call("shared_bytes", 227 * 1024)


def test_addresses_and_indices() -> None:
    call("access", 0, 3)
    with pytest.raises(RuntimeError, match=r"self_test.cpp:\d+: misaligned address"):
        call("access", 1, 3)
    with pytest.raises(RuntimeError, match=r"self_test.cpp:\d+: index outside its array"):
        call("access", 0, 4)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_multiply_add(dtype: torch.dtype, depth: int) -> None:
    a, b = torch.randn(16, depth, dtype=dtype), torch.randn(depth, 8, dtype=dtype)
    product = torch.empty(16, 8)
    call("multiply", dtype == torch.bfloat16, depth, a, b, product)
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions(dtype: torch.dtype, with_relu: bool) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    # Halfway between two neighbours, where the even one is chosen, and just beside that.
    ties = (every[:-1] + every[1:]) / 2
    infinity = torch.tensor(math.inf)
    values = torch.cat([every, ties, ties.nextafter(infinity), ties.nextafter(-infinity)])
    values = torch.cat([values, torch.tensor([1e30, -1e30, 65519.0, 65520.0, 1e-30, math.nan])])
    packed = torch.empty(values.shape, dtype=dtype)
    unpacked = torch.empty_like(values)
    call("convert", dtype == torch.bfloat16, values, packed, unpacked, values.numel(), with_relu)
    expected = (values.relu() if with_relu else values).to(dtype)
    torch.testing.assert_close(packed, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(unpacked, expected.float(), rtol=0, atol=0, equal_nan=True)
    if not with_relu:
        numbers = ~values.isnan()
        assert torch.equal(packed.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])
