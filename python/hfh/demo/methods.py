"""The networks the demo compares: one architecture, compressed in different ways to one budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import nn

from hfh_kernels.nn import HFHLinear, Pool
from hfh_kernels.spec import Reconstruction

SIZES = (64, 256, 256, 10)
NUM_HASHES = 4


def num_parameters(network: nn.Module) -> int:
    """All of them, a shared pool once."""
    return sum(parameter.numel() for parameter in network.parameters())


@dataclass(frozen=True)
class Method:
    """A way to build the network from at most so many parameters."""

    name: str
    build: Callable[[int], nn.Sequential]


@dataclass(frozen=True)
class Case:
    """A method at 1 / compression of the dense network's parameters."""

    method: Method
    compression: int

    @property
    def key(self) -> tuple[str, int]:
        return self.method.name, self.compression

    def __str__(self) -> str:
        return f"{self.method.name} at 1/{self.compression}"

    def build(self) -> nn.Sequential:
        """A network with random parameters from torch's default generator."""
        return self.method.build(NUM_DENSE // self.compression)


def dense(budget: int, sizes: Sequence[int] = SIZES) -> nn.Sequential:
    """The uncompressed network; only ``sizes`` tells how large it is."""
    return _with_relu(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))


def small_dense(budget: int) -> nn.Sequential:
    """The dense network with hidden layers as wide as the budget allows."""

    def sizes(hidden: int) -> tuple[int, ...]:
        return SIZES[0], hidden, hidden, SIZES[-1]

    hidden = max(h for h in range(1, SIZES[1] + 1) if _num_dense(sizes(h)) <= budget)
    return dense(budget, sizes(hidden))


def hashed_nets(budget: int) -> nn.Sequential:
    """HashedNets (Chen et al., ICML 2015): a pool a layer, in proportion to its virtual weight."""
    for_pools = budget - NUM_BIASES
    num_weights = NUM_DENSE - NUM_BIASES
    return _with_relu(
        HFHLinear(
            inputs,
            outputs,
            pool=Pool(for_pools * inputs * outputs // num_weights),
            num_hashes=1,
            depth=0,
            block=1,
        )
        for inputs, outputs in pairwise(SIZES)
    )


def hfh(budget: int, *, depth: int, block: int) -> nn.Sequential:
    """HFH: one pool for all layers, of what biases and reconstruction networks leave."""
    num_theta = Reconstruction(depth).num_parameters(NUM_HASHES)
    for_pool = budget - NUM_BIASES - num_theta * (len(SIZES) - 1)
    pool = Pool(for_pool // block * block)
    return _with_relu(
        HFHLinear(inputs, outputs, pool=pool, num_hashes=NUM_HASHES, depth=depth, block=block)
        for inputs, outputs in pairwise(SIZES)
    )


def _num_dense(sizes: Sequence[int]) -> int:
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))


def _with_relu(layers: Iterable[nn.Module]) -> nn.Sequential:
    """The layers in a row with a ReLU between any two."""
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


NUM_DENSE = _num_dense(SIZES)
NUM_BIASES = sum(SIZES[1:])
DENSE = Method("dense", dense)
COMPRESSED = (
    Method("dense, narrower", small_dense),
    Method("HashedNets", hashed_nets),
    *(
        Method(f"HFH U4 depth {depth}, block {block}", partial(hfh, depth=depth, block=block))
        for depth in (1, 2)
        for block in (1, 32)
    ),
)
COMPRESSIONS = (16, 64)
CASES = (
    Case(DENSE, 1),
    *(Case(method, compression) for compression in COMPRESSIONS for method in COMPRESSED),
)
