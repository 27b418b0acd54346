"""What must raise, and what looks odd but must work, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hfh_kernels import HashSpec, Reconstruction
from hfh_kernels import functional as hfh
from tests.tolerances import TOLERANCE, relative_error

SPEC = HashSpec(seed=3, num_hashes=4, pool_size=256, block=8)
NETWORK = Reconstruction()
IN_FEATURES, OUT_FEATURES = 20, 12


def make_arguments(**changes: Any) -> dict[str, Any]:
    return {
        "input": torch.randn(3, IN_FEATURES),
        "pool": torch.randn(SPEC.pool_size),
        "theta": torch.randn(NETWORK.num_parameters(SPEC.num_hashes)),
        "bias": torch.randn(OUT_FEATURES),
        "out_features": OUT_FEATURES,
        "hash_spec": SPEC,
        "reconstruction": NETWORK,
        **changes,
    }


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def assert_matches_reference(arguments: dict[str, Any], backend: str) -> Tensor:
    out = hfh.linear(**arguments, backend=backend)
    exact = hfh.linear(**double(arguments), backend="reference")
    assert relative_error(out, exact) < TOLERANCE[out.dtype]
    return out


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.tensor(1.0)}, ValueError, "input must have at least one dimension"),
        ({"pool": torch.ones(255)}, ValueError, "pool .*256.* received 255"),
        ({"pool": torch.ones(512)}, ValueError, "pool .*256.* received 512"),
        ({"pool": torch.tensor(1.0)}, ValueError, "pool .* received 1"),
        ({"pool": torch.ones(16, 16)}, ValueError, r"pool must be 1-d, received shape \[16, 16\]"),
        ({"theta": torch.ones(24)}, ValueError, r"theta must have shape \[25\].*24"),
        ({"theta": torch.ones(5, 5)}, ValueError, r"theta must have shape \[25\].*5, 5"),
        ({"theta": torch.tensor(1.0)}, ValueError, r"theta must have shape \[25\]"),
        ({"bias": torch.ones(1)}, ValueError, r"bias must have shape \[12\].*1"),
        ({"bias": torch.ones(1, 12)}, ValueError, r"bias must have shape \[12\].*1, 12"),
        ({"bias": torch.tensor(1.0)}, ValueError, r"bias must have shape \[12\]"),
        ({"bias": torch.ones(12).double()}, TypeError, "bias .* dtype"),
        ({"bias": torch.ones(12).bfloat16()}, TypeError, "bias .* dtype"),
        ({"out_features": -1, "bias": None}, ValueError, "received -1"),
        ({"row_offset": -1}, ValueError, "row_offset .* received -1"),
        ({"col_offset": -1}, ValueError, "col_offset .* received -1"),
        ({"row_offset": 2**32 - OUT_FEATURES + 1}, ValueError, "row_offset.*4294967285"),
        ({"col_offset": 2**32 - IN_FEATURES + 1}, ValueError, "col_offset.*4294967277"),
        ({"scale": torch.ones(1)}, ValueError, r"scale .* received shape \[1\]"),
        (
            {"scale": torch.tensor(1.0), "bias": torch.ones(1)},
            ValueError,
            r"bias must have shape \[12\]",
        ),
    ],
    ids=str,
)
def test_invalid_linear(
    changes: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    with pytest.raises(error, match=message):
        hfh.linear(**make_arguments(**changes), backend=backend)


@pytest.mark.parametrize("name", ["input", "pool", "theta", "bias"])
def test_integers_are_not_weights(name: str) -> None:
    integers = make_arguments()[name].to(torch.int32)
    with pytest.raises(TypeError, match=rf"{name} must .*(torch\.int32|Int)"):
        hfh.linear(**make_arguments(**{name: integers}))


@pytest.mark.parametrize("name", ["input", "pool", "theta", "bias"])
def test_another_device(name: str, backend: str) -> None:
    elsewhere = make_arguments()[name].to("meta")
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        hfh.linear(**make_arguments(**{name: elsewhere}), backend=backend)


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": torch.ones(16, 16)},
        {"pool": torch.ones(255)},
        {"theta": torch.ones(24)},
        {"rows": -1},
        {"cols": -1},
        {"row_offset": 2**32},
        {"col_offset": -1},
        {"scale": torch.ones(1)},
    ],
    ids=str,
)
def test_invalid_materialize(changes: dict[str, Any], backend: str) -> None:
    arguments = make_arguments(rows=OUT_FEATURES, cols=IN_FEATURES)
    for name in ("input", "bias", "out_features"):
        del arguments[name]
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        hfh.materialize(**{**arguments, **changes}, backend=backend)


VALID = {
    "seed": 3,
    "num_hashes": 4,
    "block": 8,
    "window": 0,
    "rows_per_window": 0,
    "depth": 2,
    "width": 4,
    "activation": "relu",
    "scale": 1.0,
    "row_offset": 0,
    "col_offset": 0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": -1},
        {"seed": 2**32},
        {"num_hashes": 0},
        {"num_hashes": 17},
        {"block": 0},
        {"block": 3},
        {"block": 512},
        {"window": 64},
        {"rows_per_window": 4},
        {"window": 264, "rows_per_window": 4},
        {"window": 12, "rows_per_window": 4},
        {"window": 64, "rows_per_window": 2**32},
        {"depth": -1},
        {"depth": 4},
        {"width": 0},
        {"width": 17},
        {"activation": "gelu"},
    ],
    ids=str,
)
def test_operators_check_the_weight_themselves(changes: dict[str, Any]) -> None:
    """Whoever calls torch.ops.hfh directly has no HashSpec that validated its numbers."""
    tensors = (make_arguments()[name] for name in ("input", "pool", "theta", "bias"))
    with pytest.raises(ValueError, match="|".join(changes)):
        torch.ops.hfh.linear(*tensors, OUT_FEATURES, *{**VALID, **changes}.values())


def test_nan_in_the_pool_reaches_its_weights_only(backend: str) -> None:
    arguments = make_arguments()
    arguments["pool"][17] = torch.nan
    offsets, _ = hfh.hash_index(range(OUT_FEATURES), range(IN_FEATURES), SPEC)
    touched = (offsets == 17).any(-1)
    assert touched.any()
    assert not touched.any(1).all()
    out = hfh.linear(**arguments, backend=backend)
    assert torch.equal(out.isnan(), touched.any(1).expand_as(out))
    weight = hfh.materialize(
        arguments["pool"],
        arguments["theta"],
        OUT_FEATURES,
        IN_FEATURES,
        hash_spec=SPEC,
        reconstruction=NETWORK,
        backend=backend,
    )
    assert torch.equal(weight.isnan(), touched)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(value: float, activation: str, depth: int, backend: str) -> None:
    network = Reconstruction(depth, activation=activation)
    theta = torch.randn(network.num_parameters(SPEC.num_hashes))
    arguments = make_arguments(theta=theta, reconstruction=network)
    for name in ("pool", "input"):
        changed = arguments[name].clone()
        changed[..., 5] = value
        given = {**arguments, name: changed}
        out = hfh.linear(**given, backend=backend)
        exact = hfh.linear(**double(given), backend="reference")
        assert torch.equal(out.isfinite(), exact.isfinite())
        assert torch.equal(out.isnan(), exact.isnan())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_batch(shape: tuple[int, ...], backend: str) -> None:
    arguments = make_arguments(input=torch.randn(*shape, IN_FEATURES))
    tensors = [arguments[name].requires_grad_() for name in ("input", "pool", "theta", "bias")]
    out = hfh.linear(**arguments, backend=backend)
    assert out.shape == (*shape, OUT_FEATURES)
    grads = torch.autograd.grad(out.sum(), tensors)
    for tensor, grad in zip(tensors, grads, strict=True):
        assert grad.shape == tensor.shape
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_no_features(has_bias: bool, backend: str) -> None:
    bias = torch.randn(OUT_FEATURES, requires_grad=True) if has_bias else None
    arguments = make_arguments(input=torch.randn(3, 0), bias=bias)
    arguments["pool"].requires_grad_()
    out = hfh.linear(**arguments, backend=backend)
    expected = torch.zeros(3, OUT_FEATURES) if bias is None else bias.expand(3, -1)
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), arguments["pool"])
    assert torch.equal(grad, torch.zeros_like(grad))

    arguments = make_arguments(out_features=0, bias=None)
    assert hfh.linear(**arguments, backend=backend).shape == (3, 0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows_cols", [(0, 0), (0, 4), (4, 0)])
def test_no_weight(rows_cols: tuple[int, int], backend: str) -> None:
    pool = torch.randn(SPEC.pool_size, requires_grad=True)
    weight = hfh.materialize(
        pool,
        make_arguments()["theta"],
        *rows_cols,
        hash_spec=SPEC,
        reconstruction=NETWORK,
        backend=backend,
    )
    assert weight.shape == rows_cols
    (grad,) = torch.autograd.grad(weight.sum(), pool)
    assert torch.equal(grad, torch.zeros_like(pool))


INPUTS = {
    "vector": torch.randn(IN_FEATURES),
    "four dimensions": torch.randn(2, 1, 3, IN_FEATURES),
    "transposed": torch.randn(IN_FEATURES, 3).T,
    "permuted": torch.randn(IN_FEATURES, 2, 3).permute(2, 1, 0),
    "strided": torch.randn(6, 2 * IN_FEATURES)[::2, ::2],
    "expanded batch": torch.randn(1, IN_FEATURES).expand(4, -1),
    "expanded features": torch.randn(4, 1).expand(-1, IN_FEATURES),
    "scalar everywhere": torch.tensor(0.5).expand(3, IN_FEATURES),
    "unaligned": torch.randn(3 * IN_FEATURES + 1)[1:].view(3, IN_FEATURES),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("input", INPUTS.values(), ids=INPUTS.keys())
def test_layouts_of_the_input(input: Tensor, backend: str) -> None:
    arguments = make_arguments(input=input)
    out = assert_matches_reference(arguments, backend)
    assert out.shape == (*input.shape[:-1], OUT_FEATURES)
    assert out.is_contiguous()


@pytest.mark.usefixtures("poisoned_memory")
def test_layouts_of_the_parameters(backend: str) -> None:
    arguments = make_arguments(
        pool=torch.randn(2 * SPEC.pool_size)[::2],
        theta=torch.randn(1).expand(25),
        bias=torch.randn(OUT_FEATURES, 3)[:, 1],
    )
    tensors = [arguments[name] for name in ("pool", "theta", "bias")]
    for index, name in enumerate(("pool", "theta", "bias")):
        arguments[name] = tensors[index] = tensors[index].detach().requires_grad_()
    out = assert_matches_reference(arguments, backend)
    exact: dict[str, Any] = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    reference_out = hfh.linear(**exact, backend="reference")
    grads = torch.autograd.grad(out.square().sum(), tensors)
    references = torch.autograd.grad(reference_out.square().sum(), tensors)
    for grad, reference in zip(grads, references, strict=True):
        assert relative_error(grad, reference.double()) < 10 * TOLERANCE[torch.float32]


def test_layouts_of_the_gradient(backend: str) -> None:
    arguments = make_arguments(input=torch.randn(4, 3, IN_FEATURES))
    tensors = [arguments[name].requires_grad_() for name in ("input", "pool", "theta", "bias")]
    grad_outputs = {
        "expanded": torch.tensor(2.0).expand(4, 3, OUT_FEATURES),
        "permuted": torch.randn(OUT_FEATURES, 3, 4).permute(2, 1, 0),
    }
    for grad_output in grad_outputs.values():
        out = hfh.linear(**arguments, backend=backend)
        grads = torch.autograd.grad(out, tensors, grad_output)
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        named = dict(zip(("input", "pool", "theta", "bias"), exact, strict=True))
        out = hfh.linear(**{**arguments, **named}, backend="reference")
        references = torch.autograd.grad(out, exact, grad_output.double())
        for grad, reference in zip(grads, references, strict=True):
            assert relative_error(grad, reference) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("needed", ["input", "pool", "theta", "bias"])
def test_only_what_requires_grad_gets_one(needed: str, backend: str) -> None:
    arguments = make_arguments()
    arguments[needed].requires_grad_()
    out = hfh.linear(**arguments, backend=backend)
    torch.autograd.backward(out.sum())
    for name in ("input", "pool", "theta", "bias"):
        assert (arguments[name].grad is not None) == (name == needed)


def test_nothing_requires_grad(backend: str) -> None:
    assert not hfh.linear(**make_arguments(), backend=backend).requires_grad
    arguments = make_arguments()
    arguments["pool"].requires_grad_()
    with torch.no_grad():
        assert not hfh.linear(**arguments, backend=backend).requires_grad
    with torch.inference_mode():
        assert_matches_reference(arguments, backend)


def test_second_derivative_is_right_or_refused(backend: str) -> None:
    """Never silently zero."""
    arguments = make_arguments(reconstruction=Reconstruction(activation="tanh"))
    pool = arguments["pool"].requires_grad_()
    out = hfh.linear(**arguments, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), pool, create_graph=True)
    penalised = out.sum() + grad.square().sum()
    if backend == "reference":
        (first,) = torch.autograd.grad(out.sum(), pool, retain_graph=True)
        (both,) = torch.autograd.grad(penalised, pool)
        assert not torch.allclose(first, both)
    else:
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(penalised, pool)


def test_arguments_are_left_alone(backend: str) -> None:
    arguments = make_arguments()
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.requires_grad_()
    torch.autograd.backward(hfh.linear(**arguments, backend=backend).sum())
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name])
