"""The published figures of look-ups: prints them and writes results/embedding-MACHINE.json.

`python -m bench.embedding [--quick]`. Medians of interleaved runs in one process, each with new
random indices, so that no run finds the rows of the one before in a cache. Beside ours: torch's
operators on the dense table (its backward with a dense gradient, and with a sparse one, which only
some optimisers take), materialising the table and looking up in that, and, where they are
installed, thinc's HashEmbed and fbgemm-gpu's table-batched embedding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.candidates import Candidate
from bench.linear import RESULTS, medians
from bench.shapes import (
    EMBEDDING_DIM,
    LARGE_NUM_EMBEDDINGS,
    LOOKUP_ROWS,
    NUM_EMBEDDINGS,
    NUM_INDICES,
    LookupRow,
)
from hfh import machine
from hfh_kernels.nn import HFHEmbedding, HFHEmbeddingBag

Lookup = Callable[[Tensor], Tensor]
INDEX_SETS = 16


def lookups(
    row: LookupRow, layer: HFHEmbedding | HFHEmbeddingBag, table: Tensor
) -> dict[str, Lookup]:
    """Each candidate's forward pass."""
    offsets = torch.arange(0, NUM_INDICES, row.bag_size or NUM_INDICES)

    def on_table(table: Tensor, indices: Tensor, *, sparse: bool = False) -> Tensor:
        if row.bag_size:
            return F.embedding_bag(indices, table, offsets, mode="sum", sparse=sparse)
        return F.embedding(indices, table, sparse=sparse)

    return {
        "dense": lambda indices: on_table(table, indices),
        "dense, sparse gradient": lambda indices: on_table(table, indices, sparse=True),
        "materialize + look up": lambda indices: on_table(layer.materialize(), indices),
        "hfh": lambda indices: layer(*row.arguments(indices)),
    }


def with_indices(row: LookupRow, run: Callable[[Tensor], object]) -> Candidate:
    indices = itertools.cycle([row.indices() for _ in range(INDEX_SETS)]).__next__
    return lambda: run(indices())


def measure(row: LookupRow, table: torch.nn.Parameter, seconds: float) -> dict[str, Any]:
    pool = row.pool()
    layer = row.layer(pool)
    grad_output = row.grad_output()
    candidates = lookups(row, layer, table)

    def forward(look_up: Lookup) -> Callable[[Tensor], object]:
        return torch.no_grad()(look_up)

    def backward(look_up: Lookup, parameters: Sequence[Tensor]) -> Callable[[Tensor], object]:
        return lambda indices: torch.autograd.grad(look_up(indices), parameters, grad_output)

    def step(look_up: Lookup, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], object]:
        def run(indices: Tensor) -> None:
            optimizer.zero_grad()
            look_up(indices).backward(grad_output)
            optimizer.step()

        return run

    own = list(layer.parameters())
    parameters = {name: own if "dense" not in name else [table] for name in candidates}
    runs: dict[str, dict[str, Callable[[Tensor], object]]] = {
        "forward": {
            name: forward(run)
            for name, run in (candidates | third_party(row)).items()
            if name != "dense, sparse gradient"
        },
        "forward + backward": {
            name: backward(run, parameters[name]) for name, run in candidates.items()
        },
        "training step": {
            "dense": step(candidates["dense"], torch.optim.Adam([table])),
            "dense, sparse gradient": step(
                candidates["dense, sparse gradient"], torch.optim.SparseAdam([table])
            ),
            "hfh": step(candidates["hfh"], torch.optim.Adam(own)),
        },
    }
    if row.num_embeddings > NUM_EMBEDDINGS:
        # Of a table this large neither a gradient nor a copy fits every machine.
        look_ups = runs["forward"]
        del look_ups["materialize + look up"]
        runs = {"forward": look_ups}
    results = {}
    for what, functions in runs.items():
        # Apart, so that a run of seconds does not leave the others with a handful of repeats.
        slow = {name: f for name, f in functions.items() if name == "materialize + look up"}
        quick = {name: f for name, f in functions.items() if name not in slow}
        times = medians({name: with_indices(row, f) for name, f in quick.items()}, seconds)
        if slow:
            times |= medians({name: with_indices(row, f) for name, f in slow.items()}, seconds / 2)
        results[what] = {
            "seconds": times,
            "ratio": times["hfh"] / times["dense"],
            "ratio_sparse": times["hfh"] / times.get("dense, sparse gradient", times["dense"]),
            "target": row.targets.get(what),
        }
        table.grad = None
    return {"row": row.name, "results": results}


def third_party(row: LookupRow) -> dict[str, Lookup]:
    """Forward passes of other packages' tables, where they are installed."""
    found: dict[str, Lookup] = {}
    try:
        import thinc.api
    except ImportError:
        pass
    else:
        if not row.bag_size:
            num_rows = row.pool().weight.numel() // EMBEDDING_DIM
            hash_embed = thinc.api.HashEmbed(EMBEDDING_DIM, num_rows)
            hash_embed.initialize()
            found["thinc HashEmbed"] = lambda indices: hash_embed.predict(
                indices.numpy().astype("uint64")
            )
    try:
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as tbe
    except (ImportError, OSError):
        pass
    else:
        if row.bag_size:
            location = tbe.EmbeddingLocation.HOST
            table = tbe.SplitTableBatchedEmbeddingBagsCodegen(
                [(row.num_embeddings, EMBEDDING_DIM, location, tbe.ComputeDevice.CPU)],
                device=torch.device("cpu"),
            )
            offsets = torch.arange(0, NUM_INDICES + 1, row.bag_size)
            found["fbgemm table-batched"] = lambda indices: table(indices, offsets)
    return found


def measure_memory() -> dict[str, Any]:
    memory = {}
    for kind in ("embedding", "bag"):
        command = [sys.executable, "-m", "bench.peak_memory_embedding", kind]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        forward, backward = map(int, output.split())
        memory[kind] = {"forward_bytes": forward, "backward_bytes": backward}
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    rows = []
    for num_embeddings in (NUM_EMBEDDINGS, LARGE_NUM_EMBEDDINGS):
        table = torch.nn.Parameter(torch.empty(num_embeddings, EMBEDDING_DIM).normal_())
        rows += [
            measure(row, table, 0.2 if arguments.quick else 0.6)
            for row in LOOKUP_ROWS
            if row.num_embeddings == num_embeddings
        ]
    report = {
        "machine": machine.describe(),
        "quick": arguments.quick,
        "num_embeddings": [NUM_EMBEDDINGS, LARGE_NUM_EMBEDDINGS],
        "embedding_dim": EMBEDDING_DIM,
        "num_indices": NUM_INDICES,
        "rows": rows,
        "peak_memory": measure_memory() if sys.platform == "linux" else {},
    }
    for row in rows:
        for what, result in row["results"].items():
            target = f" (<= {result['target']})" if result["target"] else ""
            times = ", ".join(f"{name} {1e3 * s:.2f}" for name, s in result["seconds"].items())
            print(f"{row['row']:42} {what:18} {result['ratio']:.3f}{target}; ms: {times}")
    print(f"peak memory: {report['peak_memory']}")
    if not arguments.quick:
        slug = re.sub(r"[^a-z0-9]+", "-", report["machine"]["processor"].lower()).strip("-")
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"embedding-{slug}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
