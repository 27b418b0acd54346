"""Peak memory of one layer of the table over its arguments, outputs and gradients, in bytes.

`python -m bench.peak_memory BATCH DTYPE BLOCK` prints that of the forward and the backward pass, on
two threads. Each measurement takes a process: what one has taken it seldom gives back. Linux only.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from bench.shapes import FORWARD_BACKWARD, IN_FEATURES, OUT_FEATURES
from hfh_kernels.nn import HFHLinear


def measure(batch: int, dtype: torch.dtype, block: int) -> tuple[int, int]:
    torch.set_num_threads(2)
    row = dataclasses.replace(FORWARD_BACKWARD, dtype=dtype, block=block)
    pool = row.pool()
    layer = row.layer(pool)
    # A small layer brings into being what torch and its libraries make on first use.
    small = HFHLinear(256, 256, bias=False, pool=pool, block=block)
    output = small(torch.randn(batch, 256, dtype=dtype, requires_grad=True))
    output.backward(torch.randn_like(output))
    pool.weight.grad = None

    input = torch.randn(batch, IN_FEATURES, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(batch, OUT_FEATURES, dtype=dtype)

    def backward() -> Iterable[Tensor]:
        output.backward(grad_output)
        return [x.grad for x in (input, *layer.parameters()) if x.grad is not None]

    forward_extra, (output,) = extra(lambda: [layer(input)])
    backward_extra, _ = extra(backward)
    return forward_extra, backward_extra


def extra(run: Callable[[], Iterable[Tensor]]) -> tuple[int, Iterable[Tensor]]:
    """What `run` takes at its peak beside the tensors that it returns."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve `run` unseen
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts anew
    results = run()
    returned = sum(tensor.numel() * tensor.element_size() for tensor in results)
    return _status("VmHWM") - before - returned, results


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    print(*measure(int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])))
