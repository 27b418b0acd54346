from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import (
    HashSpec,
    Reconstruction,
    _extension,
    _triton,
    build_info,
    dispatch,
    functional,
    nn,
)
from tests.tolerances import TOLERANCE, relative_error

SPEC = HashSpec(seed=2**32 - 1, num_hashes=4, pool_size=256, block=8)
NETWORK = Reconstruction()
NUM_PARAMETERS = NETWORK.num_parameters(SPEC.num_hashes)


def linear(input: Tensor, pool: Tensor, theta: Tensor, **arguments: Any) -> Tensor:
    return functional.linear(
        input,
        pool,
        theta,
        **{"out_features": 5, "hash_spec": SPEC, "reconstruction": NETWORK, **arguments},
    )


@pytest.fixture
def extension_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_available", True)


@pytest.fixture
def extension_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_available", False)
    monkeypatch.setattr(_extension, "_reason", "no compiler")


def test_unknown_backend() -> None:
    message = (
        r"backend must be one of \('auto', 'cpu', 'cuda', 'triton', 'reference'\), received 'gpu'"
    )
    for ask in (dispatch.choose, dispatch.can_run):
        with pytest.raises(ValueError, match=message):
            ask("gpu", torch.ones(1))
    with pytest.raises(ValueError, match=message):
        linear(torch.ones(2, 3), torch.ones(256), torch.ones(NUM_PARAMETERS), backend="gpu")
    with pytest.raises(ValueError, match=message):
        functional.hash_index([0], [0], SPEC, backend="gpu")


@pytest.mark.usefixtures("extension_present")
@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([torch.ones(1)], None),
        ([torch.ones(1), torch.ones(1, dtype=torch.bfloat16)], None),
        ([torch.ones(1, dtype=torch.float64)] * 3, None),
        ([torch.ones(1, dtype=torch.int64)] * 2, None),
        ([], None),
        ([torch.ones(1), torch.ones(1).half()], r"does not support torch\.float16"),
        ([torch.ones(1), torch.ones(1).double()], r"does not mix torch\.float64"),
        ([torch.ones(1, device="meta")], "on the CPU, received one on meta"),
    ],
)
def test_limits_of_cpu(tensors: list[Tensor], reason: str | None) -> None:
    assert dispatch.can_run("reference", *tensors) is None
    if reason is None:
        assert dispatch.can_run("cpu", *tensors) is None
        assert dispatch.choose("auto", *tensors) == dispatch.choose("cpu", *tensors) == "cpu"
        assert dispatch.explain(*tensors) == "cpu: chosen"
    else:
        assert dispatch.choose("auto", *tensors) == "reference"
        with pytest.raises(RuntimeError, match=f"backend 'cpu' cannot run: .*{reason}"):
            dispatch.choose("cpu", *tensors)
        assert dispatch.explain(*tensors).splitlines() == [
            f"cpu: {dispatch.can_run('cpu', *tensors)}",
            f"cuda: {dispatch.can_run('cuda', *tensors)}",
            f"triton: {dispatch.can_run('triton', *tensors)}",
            "reference: chosen",
        ]


@pytest.fixture
def triton_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_found", True)
    monkeypatch.setattr(_triton, "_interpreted", False)


@pytest.mark.usefixtures("extension_present", "triton_present")
@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([], None),
        ([torch.ones(1)], r"tensors on cuda, received one on cpu"),
        ([torch.ones(1, device="meta")], r"tensors on cuda, received one on meta"),
    ],
)
def test_limits_of_triton(tensors: list[Tensor], reason: str | None) -> None:
    if reason is None:
        assert dispatch.can_run("triton", *tensors) is None
    else:
        with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run: .*{reason}"):
            dispatch.choose("triton", *tensors)


@pytest.mark.usefixtures("extension_present", "triton_present")
def test_interpreted_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_interpreted", True)
    assert dispatch.choose("auto", torch.ones(1), torch.ones(1).half()) == "triton"
    assert dispatch.choose("auto", torch.ones(1).double()) == "reference"
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run: TRITON_INTERPRET=1 gives"):
        dispatch.choose("cpu", torch.ones(1))


@pytest.mark.usefixtures("extension_present", "triton_present")
def test_triton_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_found", False)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run: Triton is not installed"):
        dispatch.choose("triton")


@pytest.mark.usefixtures("extension_missing", "triton_present")
def test_triton_without_the_extension() -> None:
    with pytest.raises(RuntimeError, match=r"needs the compiled extension, .*: no compiler"):
        dispatch.choose("triton")


@pytest.mark.usefixtures("extension_present")
def test_cpu_and_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dispatch.can_run("cpu", torch.ones(1)) is None
    with torch.autocast("cpu", dtype=torch.float16):
        assert dispatch.can_run("cpu", torch.ones(1)) is not None


@pytest.mark.usefixtures("extension_missing")
def test_cpu_without_the_extension() -> None:
    arguments = torch.ones(2, 3), torch.ones(256), torch.ones(NUM_PARAMETERS)
    assert linear(*arguments).shape == (2, 5)
    for run in (
        lambda: linear(*arguments, backend="cpu"),
        lambda: functional.hash_index([0], [0], SPEC, backend="cpu"),
    ):
        with pytest.raises(RuntimeError, match=r"'cpu' cannot run: .* not available: no compiler"):
            run()


def test_backends_agree(backend: str) -> None:
    arguments = torch.randn(6, 40), torch.randn(256), torch.randn(NUM_PARAMETERS)
    exact = linear(*(tensor.double() for tensor in arguments), backend="reference")
    out = linear(*arguments, backend=backend)
    assert relative_error(out, exact) < TOLERANCE[torch.float32]
    assert torch.equal(linear(*arguments), linear(*arguments, backend=dispatch.choose("auto")))


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_limits_are_traced(name: str) -> None:
    def function(tensor: Tensor) -> Tensor:
        return tensor + int(dispatch.can_run(name, tensor) is None)

    torch.compiler.reset()
    tensor = torch.ones(1)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tensor), function(tensor))


@pytest.mark.usefixtures("extension_present", "triton_present")
@pytest.mark.parametrize(
    "run",
    [
        lambda: functional.hash_index([0], [0], SPEC, backend="cuda"),
        lambda: functional.conv2d(
            torch.ones(1, 3, 4, 4),
            torch.ones(256),
            torch.ones(NUM_PARAMETERS),
            out_channels=2,
            kernel_size=1,
            hash_spec=SPEC,
            reconstruction=NETWORK,
            backend="cuda",
        ),
    ],
    ids=["hash_index", "conv2d"],
)
def test_operators_without_cuda_kernels(run: Any) -> None:
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: it has no such operator"):
        run()


def test_auto_skips_the_backend_that_lacks_the_operator() -> None:
    tensor = torch.ones(1)
    first = dispatch.choose("auto", tensor)
    assert dispatch.choose("auto", tensor, lacking=first) not in (first, "auto")


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_linear(backend: str, dynamic: bool | None, scale: float | Tensor) -> None:
    def function(input: Tensor, pool: Tensor, theta: Tensor) -> Tensor:
        return linear(input, pool, theta, scale=scale, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    parameters = [torch.randn(256), torch.randn(NUM_PARAMETERS)]
    for batch in (3, 5, 8):
        tensors = [torch.randn(batch, 6), *parameters]
        for tensor in tensors:
            tensor.requires_grad_()
        outputs = compiled(*tensors), function(*tensors)
        torch.testing.assert_close(*outputs)
        grads = (torch.autograd.grad(out.square().sum(), tensors) for out in outputs)
        torch.testing.assert_close(*grads)


def test_compiled_for_each_seed_and_scale(backend: str) -> None:
    def function(input: Tensor, spec: HashSpec, scale: float) -> Tensor:
        return linear(input, pool, theta, hash_spec=spec, scale=scale, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    pool, theta = torch.randn(256), torch.randn(NUM_PARAMETERS)
    for seed in (0, 2**31, 2**32 - 1):
        spec = HashSpec(seed=seed, pool_size=256)
        input = torch.randn(4 + seed % 3, 6)
        scale = 0.5 + seed / 2**32
        torch.testing.assert_close(compiled(input, spec, scale), function(input, spec, scale))


def test_compiled_layers() -> None:
    torch.compiler.reset()
    pool = nn.Pool(256)
    model = torch.nn.Sequential(
        nn.HFHLinear(6, 8, pool=pool),
        torch.nn.ReLU(),
        nn.HFHLinear(8, 8, pool=pool, depth=1, window=64, rows_per_window=4),
        nn.HFHLinear(8, 3, pool=pool, depth=3, bias=False),
    )
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        input = torch.randn(batch, 6)
        outputs = compiled(input), model(input)
        torch.testing.assert_close(*outputs)
        parameters = list(model.parameters())
        grads = (torch.autograd.grad(out.square().sum(), parameters) for out in outputs)
        torch.testing.assert_close(*grads)


def test_compiled_under_autocast() -> None:
    torch.compiler.reset()
    layer = nn.HFHLinear(6, 8, pool=nn.Pool(256))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = torch.randn(4, 6)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            out, expected = compiled(input), layer(input)
        assert out.dtype == expected.dtype == dtype
        assert relative_error(out, layer(input).double()) < TOLERANCE[dtype]


def test_reference_traces_to_few_operators() -> None:
    """Inductor inlines a chain of x ^ (x >> k) exponentially, so the hash must stay one call."""
    graphs: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend=capture)
    arguments = torch.randn(2, 6), torch.randn(256), torch.randn(NUM_PARAMETERS)
    compiled(*arguments, backend="reference")
    (graph,) = graphs
    assert "xor" not in graph.code
    assert len(graph.graph.nodes) < 100


def run_without_extension(script: str) -> None:
    prelude = "import sys; sys.modules['hfh_kernels._C'] = None\n"
    subprocess.run([sys.executable, "-c", prelude + textwrap.dedent(script)], check=True)


def test_package_without_the_extension() -> None:
    run_without_extension("""
        import warnings
        import torch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import hfh_kernels
            import hfh_kernels.nn
            layer = hfh_kernels.nn.HFHLinear(6, 4, pool=hfh_kernels.nn.Pool(64))
            expected = layer(torch.ones(2, 6))
        messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
        assert len(messages) == 1, messages
        assert messages[0].startswith("hfh_kernels: compiled extension not available ("), messages
        assert messages[0].endswith("); using the plain PyTorch reference"), messages
        info = hfh_kernels.build_info()
        assert info["extension"] is False and info["reason"] in messages[0], info

        def linear(input):
            weight = (layer.hash_spec.seed, 4, 32, 0, 0, 2, 4, "relu", layer.scale, 0, 0)
            parameters = layer.pool.weight, layer.theta, layer.bias
            return torch.ops.hfh.linear(input, *parameters, 4, *weight)

        assert torch.equal(linear(torch.ones(2, 6)), expected)
        linear(torch.ones(2, 6)).sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        for function in (linear, layer):
            compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
            for batch in (2, 3):
                out = compiled(torch.ones(batch, 6))
                # Of this batch: equal rows need not be multiplied in the same order.
                assert torch.equal(out, layer(torch.ones(batch, 6))), (out, expected)
                out.sum().backward()
        with torch.autocast("cpu"):
            assert linear(torch.ones(2, 6)).dtype == torch.bfloat16
    """)


def test_build_info() -> None:
    info = build_info()
    assert info["version"] == "0.1.0"
    assert info["torch"] == torch.__version__
    assert info["extension"] is _extension.available()
    assert (info["reason"] is None) == info["extension"]
    if info["extension"]:
        assert {"compiler", "cpu_capability", "cpu_capabilities", "cuda", "pybind11"} <= info.keys()
