"""``embedding`` and ``embedding_bag`` in a virtual table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfh_kernels import ops  # noqa: F401  (defines torch.ops.hfh)
from hfh_kernels.dispatch import choose
from hfh_kernels.functional.weight import require_pool_size, require_scalar, weight_fields
from hfh_kernels.ops.embedding import reference as embedding_reference
from hfh_kernels.ops.embedding_bag import reference as embedding_bag_reference
from hfh_kernels.spec import HashSpec, Reconstruction

_EMBEDDING: dict[str, Callable[..., Any]] = {
    "cpu": torch.ops.hfh.embedding.default,
    "cuda": torch.ops.hfh.embedding.default,
    "triton": torch.ops.hfh.embedding.default,
    "reference": embedding_reference.embedding,
}
_EMBEDDING_BAG: dict[str, Callable[..., Any]] = {
    "cpu": torch.ops.hfh.embedding_bag.default,
    "cuda": torch.ops.hfh.embedding_bag.default,
    "triton": torch.ops.hfh.embedding_bag.default,
    "reference": embedding_bag_reference.embedding_bag,
}


def embedding(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    num_embeddings: int,
    embedding_dim: int,
    hash_spec: HashSpec,
    reconstruction: Reconstruction,
    scale: float | Tensor = 1.0,
    row_offset: int = 0,
    col_offset: int = 0,
    dense: Tensor | None = None,
    permutation: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rows of the virtual table V [num_embeddings, embedding_dim], made as they are looked up.

    Differentiable in pool, theta, dense and scale. The table never exists, so a large
    num_embeddings costs nothing.

    Args:
        input: int32 or int64 [...], each in [0, num_embeddings).
        pool: floating [hash_spec.pool_size]
        theta: floating [reconstruction.num_parameters(hash_spec.num_hashes)], see
            :func:`materialize`.
        padding_idx: the index whose row is zeros and gets no gradient; negative ones count from
            the end. (``torch.nn.functional.embedding`` returns the stored row, which
            ``torch.nn.Embedding`` sets to zeros: a virtual row cannot be set.)
        max_norm, scale_grad_by_freq, sparse: must have their defaults. norm_type goes with
            max_norm.
        scale: factor on every virtual row; a 0-d tensor where it is learnable.
        row_offset, col_offset: where V starts within a larger virtual weight.
        dense: [k, embedding_dim] in pool's dtype: rows that take the place of V's first k, as they
            are. For frequent indices, which should not share.
        permutation: int64 [num_embeddings], the row that each index stands for: where indices are
            not sorted by frequency, the rank of each.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        [..., embedding_dim] in pool's dtype.

    Raises:
        IndexError: an index is out of range. On a GPU, as in torch's embedding there,
            an assertion fails in the kernel instead, and a later call raises.
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, a device, a size, an offset or an option is invalid.
        RuntimeError: the backend cannot run.
    """
    refuse_options(max_norm, scale_grad_by_freq, sparse)
    require_pool_size(pool, hash_spec)
    run = _EMBEDDING[choose(backend, pool, theta)]
    factor, fixed_scale = _split_scale(scale, dense)
    output: Tensor = run(
        input,
        pool,
        theta,
        dense,
        permutation,
        num_embeddings,
        embedding_dim,
        normalized_padding(padding_idx, num_embeddings),
        *weight_fields(hash_spec, reconstruction, fixed_scale, row_offset, col_offset, backend),
    )
    return output if factor is None else factor * output


def embedding_bag(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    num_embeddings: int,
    embedding_dim: int,
    hash_spec: HashSpec,
    reconstruction: Reconstruction,
    scale: float | Tensor = 1.0,
    row_offset: int = 0,
    col_offset: int = 0,
    dense: Tensor | None = None,
    permutation: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sums, means or maxima of bags of rows of the virtual table V.

    Differentiable in pool, theta, dense, scale and per_sample_weights.

    Args:
        input: int32 or int64, each in [0, num_embeddings): [N] with offsets, or [B, n] for B bags
            of n.
        pool, theta, num_embeddings, embedding_dim, scale, row_offset, col_offset, dense,
            permutation: see :func:`embedding`.
        offsets: int32 or int64 [B], where in input each bag begins; None for a 2-d input.
        max_norm, scale_grad_by_freq, sparse: must have their defaults.
        mode: "sum", "mean" or "max".
        per_sample_weights: floating, of input's shape in pool's dtype: factors on the rows, for
            mode "sum" only.
        include_last_offset: whether offsets has one more element, the end of the last bag.
        padding_idx: the index that bags leave out; negative ones count from the end.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        [B, embedding_dim] in pool's dtype; empty bags are zeros.

    Raises:
        IndexError: an index is out of range. On a GPU, as in torch's embedding there,
            an assertion fails in the kernel instead, and a later call raises.
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, a device, a size, an offset or an option is invalid.
        RuntimeError: the backend cannot run.
    """
    refuse_options(max_norm, scale_grad_by_freq, sparse)
    require_pool_size(pool, hash_spec)
    if per_sample_weights is not None and per_sample_weights.shape != input.shape:
        raise ValueError(
            f"per_sample_weights must have input's shape {list(input.shape)}, "
            f"received {list(per_sample_weights.shape)}"
        )
    if input.dim() == 2:
        if offsets is not None:
            raise ValueError("offsets must be None for a 2-d input, whose rows are the bags")
        bags, entries = input.shape
        offsets = torch.arange(bags + include_last_offset, device=input.device) * entries
        input = input.reshape(-1)
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.reshape(-1)
    elif offsets is None:
        raise ValueError(
            f"offsets must be given for an input of shape {list(input.shape)}: only a 2-d one has "
            "bags of its own"
        )
    elif input.dim() != 1:
        raise ValueError(f"input must be 1-d or 2-d, received shape {list(input.shape)}")
    if mode == "max" and isinstance(scale, Tensor):
        raise ValueError(
            "scale must be a float where mode is 'max', which it does not commute with"
        )
    run = _EMBEDDING_BAG[choose(backend, pool, theta)]
    factor, fixed_scale = _split_scale(scale, dense)
    output: Tensor = run(
        input,
        offsets,
        pool,
        theta,
        dense,
        permutation,
        per_sample_weights,
        num_embeddings,
        embedding_dim,
        mode,
        include_last_offset,
        normalized_padding(padding_idx, num_embeddings),
        *weight_fields(hash_spec, reconstruction, fixed_scale, row_offset, col_offset, backend),
    )[0]
    return output if factor is None else factor * output


def refuse_options(max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
    """Raise ValueError for options of torch's embeddings that a virtual table cannot have."""
    if max_norm is not None:
        raise ValueError(
            "max_norm must be None: it rewrites stored rows, and those of a virtual table are not "
            f"stored; received {max_norm}"
        )
    if scale_grad_by_freq:
        raise ValueError(
            "scale_grad_by_freq must be False: a pool element serves many rows, so no one row's "
            "frequency is that of its gradient; received True"
        )
    if sparse:
        raise ValueError(
            "sparse must be False: the gradient is that of the pool, which is small and dense; "
            "received True"
        )


def normalized_padding(padding_idx: int | None, num_embeddings: int) -> int:
    """padding_idx as an index, or -1 for none."""
    if padding_idx is None:
        return -1
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"padding_idx must be in [-num_embeddings, num_embeddings), here "
            f"num_embeddings={num_embeddings}; received {padding_idx}"
        )
    return padding_idx % num_embeddings


def _split_scale(scale: float | Tensor, dense: Tensor | None) -> tuple[Tensor | None, float]:
    """The factor on the operator's result, and the scale that the operator is given."""
    if not isinstance(scale, Tensor):
        return None, scale
    require_scalar(scale)
    if dense is not None:
        raise ValueError("scale must be a float beside dense rows, which it does not apply to")
    return scale, 1.0
