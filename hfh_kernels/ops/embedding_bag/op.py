"""``hfh::embedding_bag`` and its gradient: sums, means and maxima of rows that are hashed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfh_kernels.ops.embedding.op import fake_gradients, require_devices
from hfh_kernels.ops.embedding_bag import reference
from hfh_kernels.ops.library import WEIGHT, define


def fake_embedding_bag(
    indices: Tensor,
    offsets: Tensor,
    pool: Tensor,
    theta: Tensor,
    dense: Tensor | None,
    permutation: Tensor | None,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    mode: str,
    include_last_offset: bool,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    require_devices(
        pool, indices=indices, offsets=offsets, theta=theta, dense=dense, permutation=permutation,
        per_sample_weights=per_sample_weights,
    )  # fmt: skip
    num_bags = offsets.shape[0] - include_last_offset
    winners = (num_bags if mode == "max" else 0, embedding_dim)
    return (
        pool.new_empty((num_bags, embedding_dim)),
        pool.new_empty(winners, dtype=torch.int64),
    )


def fake_embedding_bag_backward(
    grad: Tensor,
    winners: Tensor,
    indices: Tensor,
    offsets: Tensor,
    pool: Tensor,
    theta: Tensor,
    dense: Tensor | None,
    permutation: Tensor | None,
    per_sample_weights: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_devices(pool, grad=grad, indices=indices, theta=theta, dense=dense)
    num_factors = 0 if per_sample_weights is None else indices.shape[0]
    return *fake_gradients(pool, theta, dense, grad.shape[1]), pool.new_empty((num_factors,))


define(
    "embedding_bag",
    "(Tensor indices, Tensor offsets, Tensor pool, Tensor theta, Tensor? dense, "
    "Tensor? permutation, Tensor? per_sample_weights, int num_embeddings, int embedding_dim, "
    f"str mode, bool include_last_offset, int padding_idx, {WEIGHT}) -> (Tensor, Tensor)",
    reference=reference.embedding_bag,
    fake=fake_embedding_bag,
)
define(
    "embedding_bag_backward",
    "(Tensor grad, Tensor winners, Tensor indices, Tensor offsets, Tensor pool, Tensor theta, "
    "Tensor? dense, Tensor? permutation, Tensor? per_sample_weights, int num_embeddings, "
    f"str mode, bool include_last_offset, int padding_idx, {WEIGHT})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.embedding_bag_backward,
    fake=fake_embedding_bag_backward,
)
