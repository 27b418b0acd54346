"""``HFHMultiheadAttention``: torch.nn's layer with virtual projections."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hfh.compression.defaults import layer_block
from hfh_kernels import functional
from hfh_kernels.nn import HFHLinear, Pool
from hfh_kernels.spec import require_int


class PackedProjection(HFHLinear):
    """The projections to queries, keys and values as the rows of one virtual weight, no bias."""

    def forward(self, input: Tensor, rows: slice = slice(None)) -> Tensor:
        """input [..., in_features] to the features that ``rows`` names, all by default."""
        start, stop, _ = rows.indices(self.out_features)
        return functional.linear(
            input,
            self.pool.weight,
            self.theta,
            out_features=stop - start,
            hash_spec=self.hash_spec,
            reconstruction=self.reconstruction,
            scale=self.scale,
            row_offset=start,
        )


class HFHMultiheadAttention(nn.Module):
    """torch.nn.MultiheadAttention with virtual projections; no weight is materialised.

    The submodules are ``in_proj``, or with another kdim or vdim than embed_dim ``q_proj``,
    ``k_proj`` and ``v_proj``, and ``out_proj``; the other parameters have torch.nn's names.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first:
            as of ``torch.nn.MultiheadAttention``.
        pool: that the projections read.
        block: the longest; a projection of fewer columns takes the largest power of two in them.
        device, dtype: of parameters beside the pool.
        hash_arguments: as of :class:`hfh_kernels.nn.HFHLinear`: num_hashes, depth, width,
            activation, window, rows_per_window.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or embed_dim no multiple of num_heads.
    """

    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        pool: Pool,
        block: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hash_arguments: Any,
    ) -> None:
        super().__init__()
        require_int("embed_dim", embed_dim, 1, 2**32 // 3)
        require_int("num_heads", num_heads, 1, embed_dim)
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads={num_heads}, received {embed_dim}"
            )
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def arguments(cols: int) -> dict[str, Any]:
            block_of_layer = layer_block(block, cols)
            return {"pool": pool, "block": block_of_layer, **factory, **hash_arguments}

        if self._qkv_same_embed_dim:
            self.in_proj = PackedProjection(embed_dim, 3 * embed_dim, False, **arguments(embed_dim))
        else:
            self.q_proj = HFHLinear(embed_dim, embed_dim, False, **arguments(embed_dim))
            self.k_proj = HFHLinear(self.kdim, embed_dim, False, **arguments(self.kdim))
            self.v_proj = HFHLinear(self.vdim, embed_dim, False, **arguments(self.vdim))
        self.out_proj = HFHLinear(embed_dim, embed_dim, bias, **arguments(embed_dim))

        def register(name: str, wanted: bool, *shape: int) -> None:
            value = nn.Parameter(torch.empty(shape, **factory)) if wanted else None
            self.register_parameter(name, value)

        register("in_proj_bias", bias, 3 * embed_dim)
        register("bias_k", add_bias_kv, 1, 1, embed_dim)
        register("bias_v", add_bias_kv, 1, 1, embed_dim)
        self._reset()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Whether keys and values are as wide as queries; torch's transformer layers ask it."""
        return self.kdim == self.embed_dim == self.vdim

    def reset_parameters(self) -> None:
        """Draw all but the pool, which other layers read, anew."""
        for projection in self.children():
            if isinstance(projection, HFHLinear):
                projection.reset_parameters()
        self._reset()

    def _reset(self) -> None:
        """torch.nn's distributions: Xavier's variance 2 / (rows + cols), and biases of zero."""
        for name, projection in self.named_children():
            if isinstance(projection, HFHLinear) and name != "out_proj":
                projection.scale = math.sqrt(2 / sum(projection.weight_shape))
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention: the output, and the attention weights or None.

        With L queries and S keys:

        Args:
            query, key, value: [L, N, embed_dim], [S, N, kdim] and [S, N, vdim]; N first with
                ``batch_first``; or all without N.
            key_padding_mask: [N, S] (or [S]), True or -inf where a key is to be ignored.
            need_weights: whether to return the weights; scaled_dot_product_attention runs where
                not.
            attn_mask: [L, S] or [N * num_heads, L, S], True or -inf where a query may not attend.
            average_attn_weights: whether weights come as their mean over the heads.
            is_causal: says that attn_mask is the causal one, which must be given all the same.

        Returns:
            Output of query's shape; weights [N, L, S], or [N, num_heads, L, S] without averaging.

        Raises:
            TypeError: a mask is neither bool nor floating.
            ValueError: a shape is wrong, is_causal comes without attn_mask, or a tensor is nested.
        """
        self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given where is_causal is True, received None")
        is_batch = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not is_batch:
            q, k, v = (part.unsqueeze(0) for part in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        # The hint says nothing of padding, nor of keys added here, which every query attends to.
        is_causal = is_causal and key_padding_mask is None
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat((k, self.bias_k.expand(len(k), -1, -1)), dim=1)
            v = torch.cat((v, self.bias_v.expand(len(v), -1, -1)), dim=1)
        if self.add_zero_attn:
            k, v = (nn.functional.pad(part, (0, 0, 0, 1)) for part in (k, v))
        if mask is not None and k.shape[1] > mask.shape[-1]:
            mask = nn.functional.pad(mask, (0, k.shape[1] - mask.shape[-1]))
            is_causal = False
        q, k, v = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part in (q, k, v)
        )
        heads, weights = self._attend(q, k, v, mask, need_weights, is_causal)
        output: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batch:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, tensor, size in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if tensor.is_nested:
                raise ValueError(f"{name} must not be nested: use key_padding_mask")
            if tensor.dim() not in (2, 3) or tensor.dim() != query.dim():
                raise ValueError(
                    f"{name} must be 2-d or 3-d, as query is, received shape {list(tensor.shape)}"
                )
            if tensor.shape[-1] != size:
                raise ValueError(
                    f"{name} must have {size} features, received shape {list(tensor.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value must have key's shape {list(key.shape[:-1])} but for the features, "
                f"received shape {list(value.shape)}"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        size, bias = self.embed_dim, self.in_proj_bias
        projected: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:
            projected = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        elif query is key and key is value:
            projected = self.in_proj(query).chunk(3, dim=-1)
        elif key is value:
            keys_and_values = self.in_proj(key, rows=slice(size, None))
            projected = (
                self.in_proj(query, rows=slice(size)),
                *keys_and_values.chunk(2, dim=-1),
            )
        else:
            projected = tuple(
                self.in_proj(part, rows=slice(index * size, (index + 1) * size))
                for index, part in enumerate((query, key, value))
            )
        if bias is None:
            return projected
        return tuple(part + b for part, b in zip(projected, bias.chunk(3), strict=True))

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Both as one term for the logits [N, num_heads, L, S]; sizes may be 1."""
        batch, queries, keys = *q.shape[:2], k.shape[1]
        mask = None
        if attn_mask is not None:
            shapes = ((queries, keys), (batch * self.num_heads, queries, keys))
            if attn_mask.shape not in shapes:
                raise ValueError(
                    f"attn_mask must have shape {list(shapes[0])} or {list(shapes[1])}, "
                    f"received shape {list(attn_mask.shape)}"
                )
            mask = _as_term("attn_mask", attn_mask, q.dtype)
            if mask.dim() == 3:
                mask = mask.view(batch, self.num_heads, queries, keys)
            else:
                mask = mask.view(1, 1, queries, keys)
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, keys):
                raise ValueError(
                    f"key_padding_mask must have shape {[batch, keys]}, "
                    f"received shape {list(key_padding_mask.shape)}"
                )
            padding = _as_term("key_padding_mask", key_padding_mask, q.dtype)
            padding = padding.view(batch, 1, 1, keys)
            mask = padding if mask is None else mask + padding
        return mask

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        need_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            heads = nn.functional.scaled_dot_product_attention(
                q, k, v, None if is_causal else mask, dropout, is_causal
            )
            return heads, None
        logits = q / math.sqrt(self.head_dim) @ k.transpose(-2, -1)
        weights = (logits if mask is None else logits + mask).softmax(dim=-1)
        weights = nn.functional.dropout(weights, dropout)
        return weights @ v, weights

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _as_term(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as zeros and -inf; a floating one as it is."""
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool or floating, received {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
