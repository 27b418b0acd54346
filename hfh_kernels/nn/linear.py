"""``HFHLinear``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfh_kernels import functional
from hfh_kernels.nn.dense_rows import DenseRows
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.nn.pool import Pool
from hfh_kernels.spec import require_int

if TYPE_CHECKING:
    from hfh_kernels.nn.embedding import HFHEmbedding


class HFHLinear(HFHLayer, DenseRows):
    """A linear layer by a virtual weight: input @ V.T + bias, V = scale * g(a) [out, in].

    The pool is the submodule ``pool``, g's parameters the flat parameter ``theta``. Initial
    virtual weights have mean 0 and the variance of ``torch.nn.Linear``'s, 1 / (3 in_features).
    A state dict also carries the hash, the reconstruction and the scale: loading adopts the
    checkpoint's seed and scale, and any other difference is an error.

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
        dense_rows: how many of V's rows, output features, are the ordinary parameter ``dense``
            [dense_rows, in_features] instead: for a projection to a vocabulary, the most frequent.
        permutation: int64 [out_features], the row of each output feature; None for its own. A
            buffer.
        device, dtype: of theta, bias and dense. ``torch.nn.utils.skip_init`` empties the pool as
            well, as it does all that a module holds.
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
        dense_rows: int = 0,
        permutation: Tensor | None = None,
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
        self._register_dense_rows(dense_rows, permutation, self.weight_shape, device, dtype)
        self._reset_dense()

    @classmethod
    def tied_to(
        cls,
        embedding: HFHEmbedding,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HFHLinear:
        """The output projection that shares an embedding's table: input @ table.T + bias.

        It has the embedding's pool, theta, dense rows and permutation, the same objects, and its
        hash and scale: what trains one trains the other. The row of padding_idx, which the
        embedding hides behind zeros, is here a row as any other.

        Args:
            embedding: the layer to share with; its rows become output features.
            bias: whether to add a learnable bias [num_embeddings].
            device, dtype: of the bias.
        """
        spec, network = embedding.hash_spec, embedding.reconstruction
        layer = cls(
            embedding.embedding_dim,
            embedding.num_embeddings,
            bias,
            pool=embedding.pool,
            num_hashes=spec.num_hashes,
            depth=network.depth,
            width=network.width,
            activation=network.activation,
            block=spec.block,
            window=spec.window,
            rows_per_window=spec.rows_per_window,
            seed=spec.seed,
            device=device,
            dtype=dtype,
            theta=embedding.theta,
        )
        layer.scale = embedding.scale
        layer.dense = embedding.dense
        layer.permutation = embedding.permutation
        return layer

    def reset_parameters(self) -> None:
        """Draw theta, bias and dense anew; the pool, which other layers read, stays as it is."""
        super().reset_parameters()
        self._reset_bias()
        self._reset_dense()

    def _reset_dense(self) -> None:
        if self.dense is not None:
            nn.init.normal_(self.dense, std=self.scale)

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
        if self.dense is None and self.permutation is None:
            return self._virtual_features(input, self.bias)
        output = self._virtual_features(input, None)
        if self.dense is not None:
            dense = nn.functional.linear(input, self.dense.to(input.dtype))
            output = torch.cat((dense, output), dim=-1)
        if self.permutation is not None:
            output = output.index_select(-1, self.permutation)
        return output if self.bias is None else output + self.bias

    def _virtual_features(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The output features whose rows of V are virtual."""
        return functional.linear(
            input,
            self.pool.weight,
            self.theta,
            bias,
            out_features=self.out_features - self.dense_rows,
            row_offset=self.dense_rows,
            **self._weight_arguments(),
        )

    def materialize(self) -> Tensor:
        """V [out_features, in_features] in the pool's dtype, differentiable."""
        rows = functional.materialize(
            self.pool.weight,
            self.theta,
            self.out_features - self.dense_rows,
            self.in_features,
            row_offset=self.dense_rows,
            **self._weight_arguments(),
        )
        if self.dense is not None:
            rows = torch.cat((self.dense.to(rows.dtype), rows))
        return rows if self.permutation is None else rows[self.permutation]

    def _own_state(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            **self._dense_state(),
        }

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._dense_repr()}{self._weight_repr()}"
        )
