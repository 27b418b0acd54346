"""Rows of a virtual weight that a layer keeps as ordinary parameters instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfh_kernels.spec import require_int


class DenseRows(nn.Module):
    """Base of layers whose first ``dense_rows`` rows are the parameter ``dense``.

    Every pool element serves many rows, so frequent rows disturb each other; those are best kept
    apart. Rows count by rank: row i is that of index ``i``, or, with ``permutation`` (int64
    [num_rows], a buffer), ``permutation[i]`` is the row of index i.
    """

    dense: nn.Parameter | None
    permutation: Tensor | None

    def _register_dense_rows(
        self,
        dense_rows: int,
        permutation: Tensor | None,
        shape: tuple[int, int],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Register both; ``shape`` is that of the whole weight.

        Raises:
            TypeError: dense_rows is not an int, or permutation not an int64 tensor.
            ValueError: dense_rows is out of range, or permutation is no permutation of the rows.
        """
        num_rows, num_cols = shape
        require_int("dense_rows", dense_rows, 0, num_rows)
        if dense_rows == 0:
            self.register_parameter("dense", None)
        else:
            dense = torch.empty(dense_rows, num_cols, device=device, dtype=dtype)
            self.dense = nn.Parameter(dense)
        if permutation is not None:
            _require_permutation(permutation, num_rows)
            permutation = permutation.detach().clone().to(device)
        self.register_buffer("permutation", permutation)

    @property
    def dense_rows(self) -> int:
        """How many rows are parameters."""
        return 0 if self.dense is None else self.dense.shape[0]

    def _dense_state(self) -> dict[str, Any]:
        """What a checkpoint says of them: nothing where there are none."""
        return {"dense_rows": self.dense_rows} if self.dense_rows else {}

    def _dense_repr(self) -> str:
        rows = f"dense_rows={self.dense_rows}, " if self.dense_rows else ""
        return rows + ("permuted, " if self.permutation is not None else "")


def _require_permutation(permutation: Tensor, num_rows: int) -> None:
    if not isinstance(permutation, Tensor) or permutation.dtype != torch.int64:
        received = permutation.dtype if isinstance(permutation, Tensor) else type(permutation)
        raise TypeError(f"permutation must be an int64 tensor, received {received}")
    if permutation.shape != (num_rows,):
        raise ValueError(
            f"permutation must have shape [{num_rows}], received {list(permutation.shape)}"
        )
    if permutation.is_meta:
        return
    outside = (permutation < 0) | (permutation >= num_rows)
    if outside.any() or bool((permutation.bincount(minlength=num_rows) != 1).any()):
        raise ValueError(f"permutation must hold each of 0 to {num_rows - 1} once")
