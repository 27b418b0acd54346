"""Triton's operators as PyTorch's own tools see them: opcheck, torch.compile, autocast, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfh_kernels.nn import HFHLinear, Pool
from hfh_kernels.ops import tuning
from tests.samples import BFLOAT16, FLOAT64, SAMPLES, Sample, differentiate
from tests.test_operators import calls
from tests.triton_device import DEVICE, needs_triton

pytestmark = [
    *needs_triton,
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
FEW = [sample for sample in SAMPLES if sample.dtype != FLOAT64][:4]
OPERATORS = (
    "hash_index",
    "materialize",
    "materialize_backward",
    "linear",
    "linear_backward_input",
    "linear_backward_weight",
)


def on_device(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to(DEVICE).requires_grad_(value.requires_grad)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("sample", FEW, ids=lambda sample: sample.name)
def test_opcheck(sample: Sample, operator: str) -> None:
    arguments = tuple(on_device(value) for value in calls(sample)[operator])
    # Atomic additions come in any order.
    torch.library.opcheck(getattr(torch.ops.hfh, operator).default, arguments, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sample", FEW, ids=lambda sample: sample.name)
def test_compiled(sample: Sample) -> None:
    torch.compiler.reset()
    arguments = sample.arguments().map(lambda tensor: tensor.to(DEVICE)).require_grad()
    grad_output = sample.grad_output().to(DEVICE)
    compiled = torch.compile(sample.linear, fullgraph=True, backend="aot_eager")
    actual = differentiate(compiled(arguments, "triton"), arguments, grad_output)
    expected = differentiate(sample.linear(arguments, "triton"), arguments, grad_output)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_dynamic_batch() -> None:
    layer = HFHLinear(48, 20, pool=Pool(640)).to(DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(torch.randn(6, 48, device=DEVICE))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 17, 65):
            input = torch.randn(batch, 48, device=DEVICE)
            torch.testing.assert_close(compiled(input), layer(input))


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = HFHLinear(48, 20, pool=Pool(640)).to(DEVICE)
    input = torch.randn(6, 48, device=DEVICE)
    with torch.autocast(DEVICE, dtype=dtype):
        output = layer(input)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), layer(input), rtol=2e-2, atol=2e-2)
    output.float().sum().backward()
    assert layer.pool.weight.grad is not None
    assert layer.pool.weight.grad.dtype == torch.float32


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_graph() -> None:
    layer = HFHLinear(128, 96, pool=Pool(640)).to(DEVICE)
    input = torch.randn(5, 128, device=DEVICE)
    with torch.no_grad():
        layer(input)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(input)
        input.copy_(torch.randn(5, 128, device=DEVICE))
        graph.replay()
        torch.testing.assert_close(output, layer(input))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("deterministic", [False, True])
def test_graph_of_gradients(deterministic: bool) -> None:
    layer = HFHLinear(128, 96, pool=Pool(640)).to(DEVICE)
    input = torch.randn(5, 128, device=DEVICE)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(input).square().sum(), list(layer.parameters()))

    torch.use_deterministic_algorithms(deterministic)
    try:
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            gradients()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = gradients()
        input.copy_(torch.randn(5, 128, device=DEVICE))
        graph.replay()
        torch.testing.assert_close(captured, gradients(), rtol=1e-4, atol=1e-4)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_stream() -> None:
    layer = HFHLinear(2048, 2048, pool=Pool(2**16)).to(DEVICE)
    input = torch.randn(64, 2048, device=DEVICE)
    expected = layer(input)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(input)
        torch.cuda._sleep(10_000_000)
        late.copy_(input)
        output = layer(late)
    stream.synchronize()
    torch.testing.assert_close(output, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    layer = HFHLinear(48, 20, pool=Pool(640))
    input = torch.randn(6, 48)
    outputs = [layer.to(f"cuda:{index}")(input.to(f"cuda:{index}")).cpu() for index in (0, 1)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("mode", tuning.MODES)
def test_tuning_changes_no_model(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFH_AUTOTUNE", mode)
    sample = SAMPLES[0]
    arguments = sample.arguments().map(lambda tensor: tensor.to(DEVICE))
    expected = sample.linear(arguments, "reference")
    torch.testing.assert_close(sample.linear(arguments, "triton"), expected, rtol=1e-4, atol=1e-4)


def test_unknown_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFH_AUTOTUNE", "always")
    with pytest.raises(ValueError, match=r"HFH_AUTOTUNE must be one of .*, received 'always'"):
        tuning.mode()
