"""Deeper reconstruction networks, started as linear ones and trained from there.

A round depends on pool and thetas alone, so an interrupted fit continues to the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfh.fitting.error import squared_error
from hfh.fitting.problem import Parameters, Problem
from hfh_kernels.ops.materialize.reference import split_theta
from hfh_kernels.spec import Reconstruction

_STEPS = 300
"""Of a round."""
_TANH_INPUT = 0.1
"""Standard deviation of what tanh sees at the start: it deviates by 1.3% from a line there."""


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


def nonlinear_round(problem: Problem, parameters: Parameters, learning_rate: float) -> Parameters:
    """Steps of Adam on pool and thetas together, its rate falling to zero along a cosine.

    The learning rate is relative to a pool of mean square 1 and to the size of each of g's layers.
    """
    units = [torch.ones_like(parameters.pool)]
    for theta, num_hashes, network in zip(
        parameters.thetas, problem.num_hashes, problem.networks, strict=True
    ):
        units.append(_sizes(theta, num_hashes, network))
    point = [t / unit for t, unit in zip((parameters.pool, *parameters.thetas), units, strict=True)]

    def current() -> Parameters:
        pool, *thetas = (tensor * unit for tensor, unit in zip(point, units, strict=True))
        return Parameters(pool, thetas)

    optimizer = torch.optim.Adam(point, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        gradients = squared_error(problem.targets, *current(), problem.networks)
        for tensor, gradient, unit in zip(
            point, (gradients.pool, *gradients.thetas), units, strict=True
        ):
            tensor.grad = gradient * unit
        optimizer.step()
        schedule.step()
    return current()


def _sizes(theta: Tensor, num_hashes: int, network: Reconstruction) -> Tensor:
    """For every parameter of g the root mean square of its layer's weights."""
    sizes = torch.ones_like(theta)
    for (weight, _), (of_weight, of_bias) in zip(
        split_theta(theta, num_hashes, network),
        split_theta(sizes, num_hashes, network),
        strict=True,
    ):
        size = float(weight.square().mean().sqrt()) or 1.0
        of_weight.fill_(size)
        if of_bias is not None:
            of_bias.fill_(size)
    return sizes
