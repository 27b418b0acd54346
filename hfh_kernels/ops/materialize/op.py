"""``hfh::materialize`` and its gradient: the virtual weight as a tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hfh_kernels.ops.library import WEIGHT, define, require_same_device
from hfh_kernels.ops.materialize import reference


def fake_materialize(pool: Tensor, theta: Tensor, rows: int, cols: int, *weight: Any) -> Tensor:
    require_same_device("theta", theta, "pool", pool)
    return pool.new_empty((rows, cols))


def fake_materialize_backward(
    grad: Tensor, pool: Tensor, theta: Tensor, *weight: Any
) -> tuple[Tensor, Tensor]:
    require_same_device("grad", grad, "pool", pool)
    require_same_device("theta", theta, "pool", pool)
    return pool.new_empty(pool.shape), theta.new_empty(theta.shape)


define(
    "materialize",
    f"(Tensor pool, Tensor theta, int rows, int cols, {WEIGHT}) -> Tensor",
    reference=reference.materialize,
    fake=fake_materialize,
)
define(
    "materialize_backward",
    f"(Tensor grad, Tensor pool, Tensor theta, {WEIGHT}) -> (Tensor, Tensor)",
    reference=reference.materialize_backward,
    fake=fake_materialize_backward,
)
