"""Minimisers of the squared error of virtual weights, one memoryless round at a time.

A round depends on the pool and the thetas alone, so that a fit that was interrupted between rounds
continues to the same result from these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hfh.fit_error import Target, squared_error
from hfh_kernels.ops.materialize.reference import split_theta
from hfh_kernels.spec import Reconstruction

_CONJUGATE_GRADIENT_STEPS = 30
_LBFGS_STEPS = 30
_TANH_INPUT = 0.1
"""Standard deviation of what tanh sees at the start: it deviates by 1.3% from a line there."""


class Parameters(NamedTuple):
    """What is fitted: the pool [pool_size] and g's parameters, each [num_parameters]."""

    pool: Tensor
    thetas: list[Tensor]


class Problem(NamedTuple):
    """The targets, and the form of g behind each theta."""

    targets: Sequence[Target]
    networks: Sequence[Reconstruction]

    @property
    def is_deep(self) -> bool:
        """Whether some g is not linear."""
        return any(network.depth > 1 for network in self.networks)

    def linear(self) -> Problem:
        """The same with a linear g in place of every deeper one."""
        return Problem(
            self.targets, [Reconstruction(min(network.depth, 1)) for network in self.networks]
        )

    def error(self, parameters: Parameters) -> float:
        """The squared error that is minimised."""
        return squared_error(self.targets, *parameters, self.networks).value


def linear_start(problem: Problem) -> Parameters:
    """A pool of zeros and equal thetas, for :func:`linear_round` of ``problem.linear()``.

    Hashed signs make any other mixture as good.
    """
    layers = {target.theta: target.layer for target in problem.targets}
    dtype = problem.targets[0].dtype
    zeros = torch.zeros_like(layers[0].pool.weight, dtype=dtype, requires_grad=False)
    thetas = []
    for index, network in enumerate(problem.linear().networks):
        num_hashes = layers[index].hash_spec.num_hashes
        size = network.num_parameters(num_hashes)
        thetas.append(zeros.new_full((size,), num_hashes**-0.5))
    return Parameters(zeros, thetas)


def linear_round(problem: Problem, parameters: Parameters) -> Parameters:
    """The pool for fixed thetas by conjugate gradients, then all thetas for that pool exactly.

    The virtual weight A(theta) p is linear in the pool p for a linear g, and linear in theta. The
    normal equations' products A^T M A p come from the kernels' own forward and backward passes:
    no matrix A exists. Their condition number is small, as A is a random sparse matrix of more
    rows than columns.
    """
    targets, networks = problem

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
    targets, networks = problem

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
        # The pseudo-inverse, for a pool of zeros, say, leaves theta undetermined.
        solution = torch.linalg.pinv(matrix, hermitian=True) @ -vector.double()
        best.append(solution.to(vector))
    return best


def nonlinear_round(problem: Problem, parameters: Parameters) -> Parameters:
    """Some steps of L-BFGS with a strong-Wolfe line search, on pool and thetas together."""
    sizes = [parameters.pool.numel(), *(theta.numel() for theta in parameters.thetas)]
    point = torch.cat((parameters.pool, *parameters.thetas)).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=_LBFGS_STEPS,
        # A large pool's gradients are small numbers long before they are negligible.
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def parts() -> Parameters:
        pool, *thetas = point.detach().split(sizes)
        return Parameters(pool, thetas)

    def closure() -> float:
        value, pool, thetas = squared_error(problem.targets, *parts(), problem.networks)
        point.grad = torch.cat((pool, *thetas))
        return value

    optimizer.step(closure)
    return parts()


def nonlinear_start(problem: Problem, parameters: Parameters) -> Parameters:
    """Nearly the same virtual weights as of ``problem.linear()``, from the problem's own g.

    The pool has mean square 1.
    """
    largest = float(parameters.pool.abs().max())
    thetas = [
        theta if network.depth <= 1 else _deepened(theta, network, largest)
        for theta, network in zip(parameters.thetas, problem.networks, strict=True)
    ]
    return Parameters(parameters.pool, thetas)


def _deepened(mixture: Tensor, network: Reconstruction, largest: float) -> Tensor:
    """A g of depth 2 or more that computes mixture . a: exactly with relu, nearly so with tanh.

    The sum is split into channels, as many and as different as the width allows. With tanh each is
    a unit small enough for the linear part; with relu a pair of units, relu(c) and relu(-c), whose
    difference is c. A single relu is kept positive by its bias, and an odd one beside pairs starts
    without effect on the output, though not without a gradient.

    Args:
        mixture: [num_hashes]
        largest: magnitude of a pool element.

    Returns:
        theta [network.num_parameters(num_hashes)]
    """
    is_tanh, width = network.activation == "tanh", network.width
    is_paired = not is_tanh and width > 1
    num_channels = width // 2 if is_paired else width
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(num_channels, len(mixture), generator=generator).to(mixture)
    spread -= spread.mean(dim=0)
    first = (mixture + mixture.norm() * spread) / num_channels
    middle, last = torch.eye(num_channels).to(mixture), mixture.new_ones(1, num_channels)
    if is_tanh:
        gain = _TANH_INPUT / max(float(first.norm(dim=1).max()), torch.finfo(first.dtype).tiny)
        first, last = gain * first, last / gain
    elif is_paired:
        signs = mixture.new_tensor([[1.0, -1.0]])
        first = torch.kron(first, signs.view(2, 1))
        middle = torch.kron(middle, signs.view(2, 1) * signs)
        last = torch.kron(last, signs)
    theta = mixture.new_zeros(network.num_parameters(len(mixture)))
    layers = split_theta(theta, len(mixture), network)
    sources = [first, *[middle] * (len(layers) - 2), last]
    for (weight, _), source in zip(layers, sources, strict=True):
        weight[: source.shape[0], : source.shape[1]] = source
    if is_paired and width % 2:
        layers[0][0][-1] = mixture
        for weight, _ in layers[1:-1]:
            weight[-1, -1] = 1
    elif not is_tanh and width == 1:
        shift = mixture.abs().sum() * largest
        for (_, bias), sign in ((layers[0], 1), (layers[-1], -1)):
            assert bias is not None
            bias.fill_(float(sign * shift))
    return theta


def normalized(problem: Problem, parameters: Parameters) -> Parameters:
    """The same virtual weights of a linear problem from a pool of mean square 1.

    That is what learning rates and :func:`nonlinear_start` expect. Possible where every g can take
    the factor; where one has depth 0, parameters stay as they are.
    """
    size = float(parameters.pool.square().mean().sqrt())
    if size == 0 or any(network.depth == 0 for network in problem.networks):
        return parameters
    return Parameters(parameters.pool / size, [size * theta for theta in parameters.thetas])
