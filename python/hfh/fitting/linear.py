"""The least-squares pool and thetas where every g is linear.

A round depends on pool and thetas alone, so an interrupted fit continues to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hfh.fitting.error import squared_error
from hfh.fitting.problem import Parameters, Problem

_CONJUGATE_GRADIENT_STEPS = 30


def linear_start(problem: Problem) -> Parameters:
    """A pool of zeros and equal thetas, for :func:`linear_round`.

    Hashed signs make any other mixture as good.
    """
    target = problem.targets[0]
    pool = target.layer.pool.weight
    zeros = torch.zeros_like(pool, dtype=target.dtype, requires_grad=False)
    thetas = []
    for network, num_hashes in zip(problem.networks, problem.num_hashes, strict=True):
        size = network.num_parameters(num_hashes)
        thetas.append(zeros.new_full((size,), num_hashes**-0.5))
    return Parameters(zeros, thetas)


def linear_round(problem: Problem, parameters: Parameters) -> Parameters:
    """The pool for fixed thetas by conjugate gradients, then all thetas for that pool exactly.

    The virtual weight A(theta) p is linear in the pool p for a linear g, and linear in theta. The
    normal equations' products A^T M A p come from the kernels' own forward and backward passes:
    no matrix A exists. Without importance their condition number is small, A being a random sparse
    matrix of more rows than columns; with it, a round's few steps leave the rest to the next.
    """
    targets, networks, _ = problem

    def normal_product(direction: Tensor) -> Tensor:
        product = squared_error(
            targets, direction, parameters.thetas, networks, homogeneous=True
        ).pool
        return product.double()

    gradient = squared_error(targets, *parameters, networks).pool.double()
    step = _conjugate_gradients(
        lambda direction: normal_product(direction.to(parameters.pool)), -gradient
    )
    pool = parameters.pool + step.to(parameters.pool)
    return Parameters(pool, _best_thetas(problem, pool, parameters.thetas))


def _conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """An approximate solution x, from zero, of product(x) = right (Hestenes and Stiefel, 1952)."""
    solution = torch.zeros_like(right)
    residual, direction = right, right
    square = start = residual.dot(residual)
    for _ in range(_CONJUGATE_GRADIENT_STEPS):
        # Below this a product in float32 is noise.
        if not square > start * 1e-14:
            break
        image = product(direction)
        curvature = direction.dot(image)
        if not curvature > 0:
            break
        length = square / curvature
        solution = solution + length * direction
        residual = residual - length * image
        previous, square = square, residual.dot(residual)
        direction = residual + square / previous * direction
    return solution


def _best_thetas(problem: Problem, pool: Tensor, thetas: Sequence[Tensor]) -> list[Tensor]:
    """The least-squares linear g of every layer: at most 16 numbers each, whose normal equations
    are gathered a column at a time."""
    targets, networks, _ = problem

    def gradients(thetas: list[Tensor], homogeneous: bool) -> list[Tensor]:
        return squared_error(targets, pool, thetas, networks, homogeneous=homogeneous).thetas

    zeros = [torch.zeros_like(theta) for theta in thetas]
    right = gradients(zeros, homogeneous=False)
    columns = []
    for index in range(max(theta.numel() for theta in thetas)):
        units = [theta.clone() for theta in zeros]
        for unit in units:
            unit[index : index + 1] = 1
        columns.append(gradients(units, homogeneous=True))
    best = []
    for index, vector in enumerate(right):
        size = vector.numel()
        if size == 0:
            best.append(vector)
            continue
        matrix = torch.stack([column[index] for column in columns[:size]], dim=1).double()
        # The pseudo-inverse, for a pool of zeros or of one block leaves theta undetermined.
        inverse = torch.linalg.pinv(matrix, rtol=1e-6, hermitian=True)
        solution = inverse @ -vector.double()
        best.append(solution.to(vector))
    return best


def normalized(problem: Problem, parameters: Parameters) -> Parameters:
    """The same virtual weights of a linear problem from a pool of mean square 1.

    That is what learning rates and :func:`nonlinear_start` expect. Possible where every g can take
    the factor; where one has depth 0, parameters stay as they are.
    """
    size = float(parameters.pool.square().mean().sqrt())
    if size == 0 or any(network.depth == 0 for network in problem.networks):
        return parameters
    return Parameters(parameters.pool / size, [size * theta for theta in parameters.thetas])
