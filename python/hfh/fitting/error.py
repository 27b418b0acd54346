"""The squared error of virtual weights against dense ones, a strip of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hfh_kernels.functional import materialize
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.spec import Reconstruction

STRIP_ELEMENTS = 2**22
"""Weights that exist at a time: 16 MiB in float32, far more than the kernels need to be busy."""


@dataclass(frozen=True)
class Target:
    """What one layer's virtual weight should become.

    Args:
        layer: whose hash and scale are used; its parameters are neither read nor changed.
        weight: floating [rows, cols], any device; row 0 is row ``row_offset`` of the layer's
            virtual weight.
        row_offset: how many rows of the virtual weight come before.
        importance: of a residual R [rows, cols], whose squared error is trace(R M R^T): M itself
            [cols, cols], or its diagonal [cols], or None for the identity.
        factor: on that squared error.
        theta: index of g's parameters, which layers may share.
    """

    layer: HFHLayer
    weight: Tensor
    row_offset: int
    importance: Tensor | None
    factor: float
    theta: int

    @property
    def dtype(self) -> torch.dtype:
        """Of all arithmetic: at least float32, whatever the pool's is."""
        return torch.promote_types(self.layer.pool.weight.dtype, torch.float32)

    def strips(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, some rows of weight), of STRIP_ELEMENTS at most wherever a row has fewer."""
        rows = max(1, STRIP_ELEMENTS // max(1, self.weight.shape[1]))
        for start in range(0, len(self.weight), rows):
            yield start, self.weight[start : start + rows]

    def virtual_rows(
        self, start: int, rows: int, pool: Tensor, theta: Tensor, network: Reconstruction
    ) -> Tensor:
        """The layer's virtual weight in the place of rows of ``weight``, differentiable."""
        return materialize(
            pool,
            theta,
            rows,
            self.weight.shape[1],
            hash_spec=self.layer.hash_spec,
            reconstruction=network,
            scale=self.layer.scale,
            row_offset=self.row_offset + start,
        )

    def weigh(self, residual: Tensor) -> Tensor:
        """residual @ M."""
        if self.importance is None:
            return residual
        return (
            residual * self.importance if self.importance.dim() == 1 else residual @ self.importance
        )

    def errors(self, pool: Tensor, theta: Tensor, network: Reconstruction) -> tuple[float, float]:
        """||V - W|| / ||W||, plain and in the norm of ``importance``; ||V|| where W is zero."""
        sums = torch.zeros(4, dtype=torch.float64, device=pool.device)
        for start, rows in self.strips():
            wanted = rows.to(pool)
            residual = self.virtual_rows(start, len(rows), pool, theta, network) - wanted
            for index, matrix in enumerate((residual, wanted)):
                sums[index] += matrix.square().sum()
                sums[2 + index] += (self.weigh(matrix) * matrix).sum()
        plain, norm, weighted, weighted_norm = sums.clamp(min=0).sqrt().tolist()
        return plain / (norm or 1.0), weighted / (weighted_norm or 1.0)


class Gradients(NamedTuple):
    """The squared error, and its gradients with respect to the pool and to every theta."""

    value: float
    pool: Tensor
    thetas: list[Tensor]


@torch.enable_grad()
def squared_error(
    targets: Sequence[Target],
    pool: Tensor,
    thetas: Sequence[Tensor],
    networks: Sequence[Reconstruction],
    *,
    homogeneous: bool = False,
) -> Gradients:
    """Sum over the targets of factor * trace(R M R^T) with R = V - W, and its gradients.

    Memory is that of one strip and of the gradients, however large the layers.

    Args:
        targets: of one pool.
        pool: float32 or float64 [pool_size]
        thetas: in pool's dtype, one per index in ``targets``.
        networks: the form of g of each theta.
        homogeneous: take W as zero. Where V is linear in the pool (or in theta), the gradient is
            then the product with the matrix of the normal equations.
    """
    value = torch.zeros((), dtype=torch.float64, device=pool.device)
    pool = pool.detach().requires_grad_()
    thetas = [theta.detach().requires_grad_() for theta in thetas]
    pool_gradient = torch.zeros_like(pool)
    theta_gradients = [torch.zeros_like(theta) for theta in thetas]
    for target in targets:
        theta = thetas[target.theta]
        for start, rows in target.strips():
            virtual = target.virtual_rows(start, len(rows), pool, theta, networks[target.theta])
            residual = virtual.detach() if homogeneous else virtual.detach() - rows.to(pool)
            weighed = target.weigh(residual).mul(2 * target.factor)
            value += (weighed * residual).sum().double() / 2
            of_pool, of_theta = torch.autograd.grad(
                virtual, (pool, theta), weighed, materialize_grads=True
            )
            pool_gradient += of_pool
            theta_gradients[target.theta] += of_theta
    return Gradients(float(value), pool_gradient, theta_gradients)
