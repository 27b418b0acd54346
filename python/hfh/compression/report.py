"""What became of each layer of a compressed model, and what the whole came to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hfh.text_table import text_table
from hfh_kernels import dispatch
from hfh_kernels.nn import HFHEmbedding, HFHEmbeddingBag, HFHLinear
from hfh_kernels.nn.layer import HFHLayer


@dataclass(frozen=True, kw_only=True)
class Row:
    """One virtual weight, or one layer that was left as it was."""

    name: str
    """Path of the module in the compressed model."""
    kind: str
    """Its class in the dense model."""
    shape: tuple[int, ...]
    """Of the weight; of a layer that was left, with several of them, of none."""
    dense_parameters: int
    """Of the weight in the dense model, 0 where another row has counted it: it is tied."""
    lookups: float
    """Look-ups that building the whole weight makes in each pool element, on average."""
    block: int | None
    regime: str
    """How it will run on the device where it is."""
    skipped: str | None
    """Why it was left dense; None for a virtual weight."""

    @classmethod
    def of_layer(
        cls, name: str, kind: str, layer: HFHLayer, shape: tuple[int, ...], *, is_tied: bool
    ) -> Row:
        """The row of a virtual weight; ``is_tied`` where another row counts it."""
        rows, cols = layer.weight_shape
        spec = layer.hash_spec
        return cls(
            name=name,
            kind=kind,
            shape=shape,
            dense_parameters=0 if is_tied else rows * cols,
            lookups=rows * cols * spec.num_hashes / spec.pool_size,
            block=spec.block,
            regime=regime(layer),
            skipped=None,
        )

    @classmethod
    def of_skipped(
        cls, name: str, kind: str, shape: tuple[int, ...], dense_parameters: int, reason: str
    ) -> Row:
        """The row of a layer that was left dense."""
        return cls(
            name=name,
            kind=kind,
            shape=shape,
            dense_parameters=dense_parameters,
            lookups=0.0,
            block=None,
            regime="dense",
            skipped=reason,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """Rows, one a virtual weight and one a layer left dense, and totals."""

    rows: list[Row]
    dense_parameters: int
    """Of the model before, shared ones once."""
    compressed_parameters: int
    """Of the model after: pool, every g, and all that is dense."""
    pool_size: int
    window: int | None
    rows_per_window: int | None
    ratio_asked: float
    fit: Any = None
    """What :func:`hfh.fit` returned, with init="fit"."""

    @property
    def ratio(self) -> float:
        """Parameters after, over parameters before."""
        return self.compressed_parameters / self.dense_parameters

    @property
    def virtual_parameters(self) -> int:
        """Dense parameters that virtual weights have replaced."""
        return sum(row.dense_parameters for row in self.rows if row.skipped is None)

    def table(self) -> str:
        """Plain text: a line a row, then the totals."""
        heading = ("layer", "kind", "shape", "dense", "look-ups", "regime or reason")
        text = text_table(heading, [_cells(row) for row in self.rows], left=(0, 1, 5))
        window = "none: a layer draws from the whole pool"
        if self.window is not None:
            window = f"{self.window:,} elements for {self.rows_per_window} rows"
        return (
            f"{text}\n\n"
            f"parameters: {self.dense_parameters:,} -> {self.compressed_parameters:,}\n"
            f"ratio: {self.ratio:.5g}, asked {self.ratio_asked:.5g}\n"
            f"pool: {self.pool_size:,} elements behind {self.virtual_parameters:,} weights\n"
            f"window: {window}"
        )

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """Rows, totals and the report of the fit as one JSON object."""
        fields = {name: getattr(self, name) for name in _TOTALS}
        fields["fit"] = None if self.fit is None else json.loads(self.fit.to_json())
        return json.dumps({"rows": [asdict(row) for row in self.rows], **fields})


def regime(layer: HFHLayer) -> str:
    """How a layer runs on the device and in the dtype it has."""
    tensors = (layer.pool.weight, layer.theta)
    backend = dispatch.choose("auto", *tensors)
    if backend == "reference":
        wanted = "triton" if layer.pool.weight.is_cuda else "cpu"
        return f"reference, materialises: {dispatch.can_run(wanted, *tensors)}"
    if backend == "cuda":
        backend = "cuda or triton, by layer and batch"
    if isinstance(layer, (HFHEmbedding, HFHEmbeddingBag)):
        return f"{backend}: rows as they are looked up"
    spec = layer.hash_spec
    # The kernels choose by batch; csrc/cpu/slots.cpp has the conditions.
    if (
        backend == "cpu"
        and isinstance(layer, HFHLinear)
        and layer.pool.weight.dtype != torch.float64
        and layer.reconstruction.depth == 1
        and layer.weight_shape[1] % spec.block == 0
        and spec.block % _SLOT_PRODUCT_BLOCK == 0
    ):
        return "cpu: slot products or tiles of weights, by batch"
    return f"{backend}: tiles of weights"


def _cells(row: Row) -> tuple[str, ...]:
    reason = row.regime if row.skipped is None else f"dense: {row.skipped}"
    return (
        row.name or "(model)",
        row.kind,
        " x ".join(map(str, row.shape)),
        f"{row.dense_parameters:,}",
        f"{row.lookups:,.1f}" if row.skipped is None else "",
        reason,
    )


_SLOT_PRODUCT_BLOCK = 16
_TOTALS = (
    "dense_parameters",
    "compressed_parameters",
    "virtual_parameters",
    "ratio_asked",
    "ratio",
    "pool_size",
    "window",
    "rows_per_window",
)
