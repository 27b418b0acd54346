"""``linear`` by a virtual weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfh_kernels import ops  # noqa: F401  (defines torch.ops.hfh)
from hfh_kernels.dispatch import choose
from hfh_kernels.functional.weight import require_pool_size, require_scalar, weight_fields
from hfh_kernels.ops.library import require_bias
from hfh_kernels.ops.linear import reference as linear_reference
from hfh_kernels.spec import HashSpec, Reconstruction

_LINEAR: dict[str, Callable[..., Any]] = {
    "cpu": torch.ops.hfh.linear.default,
    "cuda": torch.ops.hfh.linear.default,
    "triton": torch.ops.hfh.linear.default,
    "reference": linear_reference.linear,
}


def linear(
    input: Tensor,
    pool: Tensor,
    theta: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    hash_spec: HashSpec,
    reconstruction: Reconstruction,
    scale: float | Tensor = 1.0,
    row_offset: int = 0,
    col_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """input @ V.T + bias, where V [out_features, in_features] is the virtual weight.

    Differentiable in input, pool, theta, bias and scale.

    Args:
        input: floating [..., in_features]
        pool: floating [hash_spec.pool_size]
        theta: floating [reconstruction.num_parameters(hash_spec.num_hashes)], see
            :func:`materialize`.
        bias: [out_features] in input's dtype, or None.
        scale: factor on every weight; a 0-d tensor where it is learnable.
        row_offset, col_offset: where V starts within a larger virtual weight.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        [..., out_features] in input's dtype, or in that of autocast where it is on.

    Raises:
        TypeError: a tensor is not floating-point, or bias differs from input in dtype.
        ValueError: a shape, a device, a size or an offset is invalid.
        RuntimeError: the backend cannot run.
    """
    require_pool_size(pool, hash_spec)
    run = _LINEAR[choose(backend, input, pool, theta)]
    if isinstance(scale, Tensor):
        require_scalar(scale)
        weight = weight_fields(hash_spec, reconstruction, 1.0, row_offset, col_offset, backend)
        output: Tensor = scale * run(input, pool, theta, None, out_features, *weight)
        if bias is None:
            return output
        require_bias(bias, input, out_features)
        return output + bias.to(output.dtype)
    weight = weight_fields(hash_spec, reconstruction, scale, row_offset, col_offset, backend)
    output = run(input, pool, theta, bias, out_features, *weight)
    return output
