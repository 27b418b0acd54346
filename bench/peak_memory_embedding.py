"""Peak memory of the published look-ups over their arguments, outputs and gradients, in bytes.

`python -m bench.peak_memory_embedding {embedding,bag}` prints that of the forward and the backward
pass, on two threads. Linux only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from bench.peak_memory import extra
from bench.shapes import BAG, EMBEDDING


def measure(kind: str) -> tuple[int, int]:
    torch.set_num_threads(2)
    row = EMBEDDING if kind == "embedding" else BAG
    layer = row.layer(row.pool())
    # A few indices bring into being what torch and its libraries make on first use.
    output = layer(*row.arguments(row.indices()[: row.bag_size or 1]))
    output.backward(torch.ones_like(output))
    layer.zero_grad()

    arguments = row.arguments(row.indices())
    grad_output = row.grad_output()

    def backward() -> Iterable[Tensor]:
        output.backward(grad_output)
        return [x.grad for x in layer.parameters() if x.grad is not None]

    forward_extra, (output,) = extra(lambda: [layer(*arguments)])
    backward_extra, _ = extra(backward)
    return forward_extra, backward_extra


if __name__ == "__main__":
    print(*measure(sys.argv[1]))
