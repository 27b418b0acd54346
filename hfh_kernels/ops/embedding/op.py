"""``hfh::embedding`` and its gradient: rows of a table that is hashed, not stored."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hfh_kernels.ops.embedding import reference
from hfh_kernels.ops.library import WEIGHT, define, require_same_device


def fake_embedding(
    indices: Tensor,
    pool: Tensor,
    theta: Tensor,
    dense: Tensor | None,
    permutation: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    *arguments: Any,
) -> Tensor:
    require_devices(pool, indices=indices, theta=theta, dense=dense, permutation=permutation)
    return pool.new_empty((*indices.shape, embedding_dim))


def fake_embedding_backward(
    grad: Tensor,
    indices: Tensor,
    pool: Tensor,
    theta: Tensor,
    dense: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    require_devices(pool, grad=grad, indices=indices, theta=theta, dense=dense)
    return fake_gradients(pool, theta, dense, grad.shape[-1])


def require_devices(pool: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            require_same_device(name, tensor, "pool", pool)


def fake_gradients(
    pool: Tensor, theta: Tensor, dense: Tensor | None, embedding_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_dense = 0 if dense is None else dense.shape[0]
    return (
        pool.new_empty(pool.shape),
        theta.new_empty(theta.shape),
        pool.new_empty((num_dense, embedding_dim)),
    )


define(
    "embedding",
    "(Tensor indices, Tensor pool, Tensor theta, Tensor? dense, Tensor? permutation, "
    f"int num_embeddings, int embedding_dim, int padding_idx, {WEIGHT}) -> Tensor",
    reference=reference.embedding,
    fake=fake_embedding,
)
define(
    "embedding_backward",
    "(Tensor grad, Tensor indices, Tensor pool, Tensor theta, Tensor? dense, Tensor? permutation, "
    f"int num_embeddings, int padding_idx, {WEIGHT}) -> (Tensor, Tensor, Tensor)",
    reference=reference.embedding_backward,
    fake=fake_embedding_backward,
)
