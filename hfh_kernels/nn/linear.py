"""``HFHLinear``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hfh_kernels import functional
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.nn.pool import Pool
from hfh_kernels.spec import require_int


class HFHLinear(HFHLayer):
    """A linear layer by a virtual weight: input @ V.T + bias, V = scale * g(a) [out, in].

    The pool is the submodule ``pool``, g's parameters the flat parameter ``theta``. Initial
    virtual weights have mean 0 and the variance of ``torch.nn.Linear``'s, 1 / (3 in_features).
    A state dict also carries the hash, the reconstruction and the scale: loading adopts the
    checkpoint's seed, and any other difference is an error.

    HashedNets (Chen et al., ICML 2015) is ``num_hashes=1, depth=0, block=1`` with a pool a layer.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether to add a learnable bias [out_features].
        pool: shared by as many layers as you like.
        num_hashes: pool elements behind one weight, 1 to 16.
        depth, width, activation: of g, see :class:`hfh_kernels.Reconstruction`.
        block, window, rows_per_window: of the hash, see :class:`hfh_kernels.HashSpec`.
        seed: of the hash; by default one that no other layer of the pool got by default.
        device, dtype: of theta and bias. ``torch.nn.utils.skip_init`` empties the pool as well, as
            it does all that a module holds.
        theta: the parameter of another layer, to share its g.

    Raises:
        TypeError: pool is not a :class:`Pool`, or an argument has the wrong type.
        ValueError: an argument is out of range, or theta has the wrong shape.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        theta: nn.Parameter | None = None,
    ) -> None:
        require_int("in_features", in_features, 0, 2**32)
        require_int("out_features", out_features, 0, 2**32)
        super().__init__(
            (out_features, in_features),
            1 / math.sqrt(3 * max(1, in_features)),
            pool=pool,
            num_hashes=num_hashes,
            depth=depth,
            width=width,
            activation=activation,
            block=block,
            window=window,
            rows_per_window=rows_per_window,
            seed=seed,
            theta=theta,
            device=device,
            dtype=dtype,
        )
        self.in_features = in_features
        self.out_features = out_features
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
            self._reset_bias()
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Draw theta and bias anew; the pool, which other layers read, stays as it is."""
        super().reset_parameters()
        self._reset_bias()

    def _reset_bias(self) -> None:
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, self.in_features))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] to [..., out_features]."""
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"input must have {self.in_features} features, received shape {list(input.shape)}"
            )
        return functional.linear(
            input,
            self.pool.weight,
            self.theta,
            self.bias,
            out_features=self.out_features,
            hash_spec=self.hash_spec,
            reconstruction=self.reconstruction,
            scale=self.scale,
        )

    def _own_state(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._weight_repr()}"
        )
