"""Runs every sample where an access outside a tensor ends the process; see test_memory.py.

The arguments end, or begin, at a page that may not be touched. Results lie in the heap, which
glibc's malloc checks for writes past the end if it is told to.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from tests import convolution_samples as convolutions
from tests.convolution_samples import CONVOLUTIONS
from tests.lookups import BAGS, LOOKUPS, results
from tests.samples import SAMPLES, run
from tests.sweep import SWEEP

_libc = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS = 0


def guarded(tensor: Tensor, *, at_end: bool) -> Tensor:
    """A copy in pages of its own: between two forbidden ones, flush with one of them."""
    num_bytes = tensor.numel() * tensor.element_size()
    page = mmap.PAGESIZE
    num_pages = -(-num_bytes // page)
    memory = mmap.mmap(-1, (num_pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + (num_pages + 1) * page):
        if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = (num_pages + 1) * page - num_bytes if at_end else page
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)


def run_all(guard: Callable[[Tensor], Tensor]) -> None:
    for sample in [*SAMPLES, *SWEEP[::3]]:
        arguments = sample.arguments().map(lambda x: guard(x) if x.numel() else x)
        run(sample, arguments)
        sample.materialize(arguments)
    for convolution in CONVOLUTIONS:
        arguments = convolution.arguments()
        guarded_arguments = arguments.map(guard)._replace(
            input=guard(arguments.input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            if convolution.channels_last
            else guard(arguments.input)
        )
        convolutions.run(convolution, guarded_arguments)
    for lookup in [*LOOKUPS, *BAGS]:
        leaves = lookup.leaves().map(lambda x: guard(x) if x.numel() else x).require_grad()
        indices = lookup.indices()
        output = lookup.run(leaves, "cpu", guard(indices) if indices.numel() else indices)
        results(output, leaves)


def overrun() -> None:
    """The mistake that malloc is expected to catch."""
    tensor = torch.zeros(1000)
    ctypes.memset(tensor.data_ptr() + 4000, 1, 4)


def touch_guard() -> None:
    ctypes.string_at(guarded(torch.zeros(10), at_end=True).data_ptr(), 41)


if __name__ == "__main__":
    what = {
        "end": lambda: run_all(lambda tensor: guarded(tensor, at_end=True)),
        "begin": lambda: run_all(lambda tensor: guarded(tensor, at_end=False)),
        "overrun": overrun,
        "touch": touch_guard,
    }
    what[sys.argv[1]]()
    print("survived")
