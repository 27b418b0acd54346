"""``HFHEmbedding`` and ``HFHEmbeddingBag``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfh_kernels import functional
from hfh_kernels.functional.lookup import normalized_padding, refuse_options
from hfh_kernels.nn.dense_rows import DenseRows
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.nn.pool import Pool
from hfh_kernels.spec import COORDINATES, require_int


class _Table(HFHLayer, DenseRows):
    """What both layers share: the table and its parameters."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        max_norm: float | None,
        scale_grad_by_freq: bool,
        sparse: bool,
        *,
        pool: Pool,
        dense_rows: int,
        permutation: Tensor | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **hash_arguments: Any,
    ) -> None:
        require_int("num_embeddings", num_embeddings, 0, COORDINATES)
        require_int("embedding_dim", embedding_dim, 0, COORDINATES)
        refuse_options(max_norm, scale_grad_by_freq, sparse)
        super().__init__(
            (num_embeddings, embedding_dim),
            1.0,
            pool=pool,
            device=device,
            dtype=dtype,
            **hash_arguments,
        )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        padding = normalized_padding(padding_idx, num_embeddings)
        self.padding_idx = None if padding < 0 else padding
        # The dtype of the pool: a look-up returns rows of both kinds in one tensor.
        self._register_dense_rows(
            dense_rows, permutation, self.weight_shape, device, pool.weight.dtype
        )
        self._reset_dense()

    def reset_parameters(self) -> None:
        """Draw theta and the dense rows anew; the pool, which other layers read, stays as it is."""
        super().reset_parameters()
        self._reset_dense()

    def _reset_dense(self) -> None:
        if self.dense is not None:
            nn.init.normal_(self.dense)

    def materialize(self) -> Tensor:
        """The table [num_embeddings, embedding_dim] in the pool's dtype, differentiable.

        Row i is what index i looks up: zeros for padding_idx.
        """
        return self._look_up(torch.arange(self.num_embeddings, device=self.pool.weight.device))

    def _look_up(self, input: Tensor) -> Tensor:
        return functional.embedding(
            input, self.pool.weight, self.theta, self.padding_idx, **self._table_arguments()
        )

    def _table_arguments(self) -> dict[str, Any]:
        return {
            **self._weight_arguments(),
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "dense": self.dense,
            "permutation": self.permutation,
        }

    def _own_state(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            **self._dense_state(),
        }

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self._dense_repr()}"
            f"{self._weight_repr()}"
        )


class HFHEmbedding(_Table):
    """An embedding whose rows are computed from a pool as they are looked up.

    The table V = scale * g(a) [num_embeddings, embedding_dim] never exists, so its height costs
    nothing. Initial rows have mean 0 and variance 1, as those of ``torch.nn.Embedding``. The
    optimiser steps through the pool instead of the table, which for large tables is what makes
    training fast.

    Args:
        num_embeddings: rows of the table, at most 2**32.
        embedding_dim: size of a row.
        padding_idx: the index whose row is zeros, always, and gets no gradient; negative ones count
            from the end. (``torch.nn.Embedding`` only starts with zeros there.)
        max_norm, norm_type, scale_grad_by_freq, sparse: for ``torch.nn.Embedding``'s signature;
            anything but the defaults is an error that says why.
        pool: shared by as many layers as you like.
        num_hashes: pool elements behind one weight, 1 to 16.
        depth, width, activation: of g, see :class:`hfh_kernels.Reconstruction`.
        block, window, rows_per_window: of the hash, see :class:`hfh_kernels.HashSpec`.
        seed: of the hash; by default one that no other layer of the pool got by default.
        dense_rows: how many rows are the ordinary parameter ``dense`` instead, in the pool's dtype:
            the most frequent ones, which should not share.
        permutation: int64 [num_embeddings], the rank of each index; None where indices are sorted
            by frequency already, as vocabularies are. A buffer.
        device, dtype: of theta; ``dense`` has the pool's dtype.
        theta: the parameter of another layer, to share its g.

    Raises:
        TypeError: pool is not a :class:`Pool`, or an argument has the wrong type.
        ValueError: an argument is out of range, or theta has the wrong shape.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        pool: Pool,
        num_hashes: int = 4,
        depth: int = 2,
        width: int = 4,
        activation: str = "relu",
        block: int = 32,
        window: int | None = None,
        rows_per_window: int | None = None,
        seed: int | None = None,
        dense_rows: int = 0,
        permutation: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        theta: nn.Parameter | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            scale_grad_by_freq,
            sparse,
            pool=pool,
            num_hashes=num_hashes,
            depth=depth,
            width=width,
            activation=activation,
            block=block,
            window=window,
            rows_per_window=rows_per_window,
            seed=seed,
            dense_rows=dense_rows,
            permutation=permutation,
            device=device,
            dtype=dtype,
            theta=theta,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Indices [...] to rows [..., embedding_dim] in the pool's dtype."""
        return self._look_up(input)


class HFHEmbeddingBag(_Table):
    """Sums, means or maxima over bags of rows of a table like :class:`HFHEmbedding`'s.

    Args:
        num_embeddings: rows of the table, at most 2**32.
        embedding_dim: size of a row.
        mode: "sum", "mean" or "max".
        include_last_offset: whether offsets end with the end of the last bag.
        padding_idx: the index that bags leave out; negative ones count from the end.

    The other arguments and the errors are those of :class:`HFHEmbedding`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        pool: Pool,
        num_hashes: int = 4,
        depth: int = 2,
        width: int = 4,
        activation: str = "relu",
        block: int = 32,
        window: int | None = None,
        rows_per_window: int | None = None,
        seed: int | None = None,
        dense_rows: int = 0,
        permutation: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        theta: nn.Parameter | None = None,
    ) -> None:
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"mode must be 'sum', 'mean' or 'max', received {mode!r}")
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            scale_grad_by_freq,
            sparse,
            pool=pool,
            num_hashes=num_hashes,
            depth=depth,
            width=width,
            activation=activation,
            block=block,
            window=window,
            rows_per_window=rows_per_window,
            seed=seed,
            dense_rows=dense_rows,
            permutation=permutation,
            device=device,
            dtype=dtype,
            theta=theta,
        )
        self.mode = mode
        self.include_last_offset = include_last_offset

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Bags of indices to [bags, embedding_dim]; see :func:`functional.embedding_bag`."""
        return functional.embedding_bag(
            input,
            self.pool.weight,
            self.theta,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
            **self._table_arguments(),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"
