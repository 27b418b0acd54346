"""``hfh::linear`` and its gradients: a matmul by a virtual weight that never exists in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hfh_kernels.ops.library import WEIGHT, define, define_autocast, require_same_device
from hfh_kernels.ops.linear import reference


def fake_linear(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    out_features: int,
    *weight: Any,
) -> Tensor:
    require_same_device("pool", pool, "input", input)
    require_same_device("theta", theta, "input", input)
    if bias is not None:
        require_same_device("bias", bias, "input", input)
    return input.new_empty((*input.shape[:-1], out_features))


def fake_linear_backward_input(
    grad_output: Tensor, pool: Tensor, theta: Tensor, in_features: int, *weight: Any
) -> Tensor:
    require_same_device("pool", pool, "grad_output", grad_output)
    require_same_device("theta", theta, "grad_output", grad_output)
    return grad_output.new_empty((*grad_output.shape[:-1], in_features))


def fake_linear_backward_weight(
    grad_output: Tensor, input: Tensor, pool: Tensor, theta: Tensor, *weight: Any
) -> tuple[Tensor, Tensor]:
    require_same_device("input", input, "grad_output", grad_output)
    require_same_device("pool", pool, "grad_output", grad_output)
    require_same_device("theta", theta, "grad_output", grad_output)
    return pool.new_empty(pool.shape), theta.new_empty(theta.shape)


define(
    "linear",
    f"(Tensor input, Tensor pool, Tensor theta, Tensor? bias, int out_features, {WEIGHT})"
    " -> Tensor",
    reference=reference.linear,
    fake=fake_linear,
)
define(
    "linear_backward_input",
    f"(Tensor grad_output, Tensor pool, Tensor theta, int in_features, {WEIGHT}) -> Tensor",
    reference=reference.linear_backward_input,
    fake=fake_linear_backward_input,
)
define(
    "linear_backward_weight",
    f"(Tensor grad_output, Tensor input, Tensor pool, Tensor theta, {WEIGHT}) -> (Tensor, Tensor)",
    reference=reference.linear_backward_weight,
    fake=fake_linear_backward_weight,
)
define_autocast("linear")
