"""Time of one HFH layer against the dense layer it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hfh.machine import last_level_cache_bytes, memory_bytes
from hfh.timing import interleaved_medians
from hfh_kernels.nn import HFHLinear, Pool

STREAMED_OVER_CACHE = 1.5
MAX_STREAMED_BYTES = 2**31
UNKNOWN_CACHE_BYTES = 2**26


@dataclass(frozen=True)
class Kind:
    """A compressed layer that is timed."""

    depth: int
    block: int
    compression: int

    def __str__(self) -> str:
        return f"depth {self.depth}, block {self.block}, 1/{self.compression}"


KINDS = (Kind(2, 64, 16), Kind(1, 64, 16), Kind(1, 256, 64))


@dataclass(frozen=True)
class Timing:
    """Median seconds of one forward call, of the dense layer and of each kind of HFH layer."""

    num_layers: int
    batch: int
    dense: float
    hfh: dict[Kind, float]

    def ratio(self, kind: Kind) -> float:
        return self.hfh[kind] / self.dense


def layer_counts(features: int, max_layers: int) -> tuple[int, int]:
    """Layers that take turns: one, which stays cached, and a network larger than the cache.

    The network's dense weights together exceed the last-level cache by half, unless that takes
    more than max_layers, 2 GiB or a quarter of the memory.
    """
    cache = last_level_cache_bytes() or UNKNOWN_CACHE_BYTES
    limit = min(MAX_STREAMED_BYTES, (memory_bytes() or MAX_STREAMED_BYTES) // 4)
    weight_bytes = 4 * features**2
    num_layers = int(min(STREAMED_OVER_CACHE * cache, limit)) // weight_bytes + 1
    return 1, max(2, min(max_layers, num_layers))


class Network:
    """Dense and HFH layers of one shape; each call of a function takes the next layer in turn."""

    def __init__(self, features: int, num_layers: int) -> None:
        self.features = features
        self.num_layers = num_layers
        weight = nn.Linear(features, features, bias=False).weight.detach()
        # Copies stream from memory as different weights would, and are quicker to make.
        self.weights = [weight, *(weight.clone() for _ in range(num_layers - 1))]
        pools = {kind.compression: Pool(features**2 // kind.compression) for kind in KINDS}
        self.layers = {
            kind: [
                HFHLinear(
                    features,
                    features,
                    bias=False,
                    pool=pools[kind.compression],
                    depth=kind.depth,
                    block=kind.block,
                )
                for _ in range(num_layers)
            ]
            for kind in KINDS
        }

    @torch.inference_mode()
    def time(self, batch: int, repeats: int) -> Timing:
        """Interleaved medians of the forward pass at one batch size."""
        input = torch.randn(batch, self.features)
        weights = cycle(self.weights)

        def dense() -> Tensor:
            return linear(input, next(weights))

        def hfh(layers: cycle[HFHLinear]) -> Tensor:
            output: Tensor = next(layers)(input)
            return output

        functions: dict[str, Callable[[], object]] = {"dense": dense}
        for kind in KINDS:
            functions[str(kind)] = partial(hfh, cycle(self.layers[kind]))
        medians = interleaved_medians(functions, repeats, warmup=max(2, self.num_layers // 4))
        return Timing(
            self.num_layers, batch, medians["dense"], {kind: medians[str(kind)] for kind in KINDS}
        )
