"""Layers whose weights are computed from a shared pool."""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hfh_kernels import functional
from hfh_kernels.ops.hash_index.reference import GOLDEN
from hfh_kernels.ops.materialize.reference import split_theta
from hfh_kernels.spec import HashSpec, Reconstruction, require_int


class Pool(nn.Module):
    """The vector that every layer built on it reads its weights from.

    One module, registered in each layer and one parameter in all: ``parameters()`` and
    ``state_dict()`` of a model list it once, and copying, pickling or moving the model keeps it
    shared. A state dict holds it where the model's traversal meets it first, and loads from
    wherever the checkpoint has it.

    Elements start as standard normal numbers; each layer brings its own scale.

    Args:
        size: number of elements, 1 <= size < 2**31, a multiple of the block of every layer.
        dtype, device: of the parameter ``weight`` [size].
        generator: source of the initial values.

    Raises:
        TypeError: size is not an int.
        ValueError: size is out of range.
    """

    weight: nn.Parameter

    def __init__(
        self,
        size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_int("size", size, 1, 2**31 - 1)
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self._num_seeds = 0
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every element anew."""
        nn.init.normal_(self.weight, generator=generator)

    def next_seed(self) -> int:
        """The next layer's seed, distinct from all before; every pool hands out the same ones."""
        self._num_seeds += 1
        return self._num_seeds * GOLDEN % 2**32

    def extra_repr(self) -> str:
        return f"size={self.weight.numel()}"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # One call of state_dict() makes one _metadata object: it tells the calls apart.
        call = getattr(destination, "_metadata", None)
        last_call = _saves.get(self)
        if call is not None:
            if last_call is not None and last_call() is call:
                return
            _saves[self] = weakref.ref(call)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # One call of load_state_dict() passes one missing_keys list to all modules.
        load = _loads.get(self)
        if load is None or load.missing_keys is not missing_keys:
            load = _loads[self] = _Load(missing_keys)
        num_missing = len(missing_keys)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        key = prefix + "weight"
        if key in state_dict:
            load.found = True
            if load.reported in missing_keys:
                missing_keys.remove(load.reported)
        elif load.found or load.reported is not None:
            del missing_keys[num_missing:]
        else:
            load.reported = key


@dataclasses.dataclass
class _Load:
    """What one call of load_state_dict() has seen of one pool."""

    missing_keys: list[str]
    found: bool = False
    reported: str | None = None


# Kept outside the pools, so that they pickle and copy without them.
_saves: weakref.WeakKeyDictionary[Pool, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_loads: weakref.WeakKeyDictionary[Pool, _Load] = weakref.WeakKeyDictionary()


class HFHLinear(nn.Module):
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

    theta: nn.Parameter
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
        super().__init__()
        if not isinstance(pool, Pool):
            raise TypeError(f"pool must be a hfh_kernels.nn.Pool, received {type(pool).__name__}")
        require_int("in_features", in_features, 0, 2**32)
        require_int("out_features", out_features, 0, 2**32)
        self.in_features = in_features
        self.out_features = out_features
        self.hash_spec = HashSpec(
            seed=pool.next_seed() if seed is None else seed,
            num_hashes=num_hashes,
            pool_size=pool.weight.numel(),
            block=block,
            window=window,
            rows_per_window=rows_per_window,
        )
        self.reconstruction = Reconstruction(depth, width, activation)
        self.scale = 1 / math.sqrt(3 * max(1, in_features))
        self.pool = pool
        num_parameters = self.reconstruction.num_parameters(num_hashes)
        if theta is None:
            self.theta = nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
            self._reset_theta()
        elif theta.shape != (num_parameters,):
            raise ValueError(
                f"theta must have shape [{num_parameters}], received shape {list(theta.shape)}"
            )
        else:
            self.theta = theta
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
            self._reset_bias()
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Draw theta and bias anew; the pool, which other layers read, stays as it is."""
        self._reset_theta()
        self._reset_bias()

    @torch.no_grad()
    def _reset_theta(self) -> None:
        """Normal weights, then each unit of g shifted and scaled to mean 0 and variance 1.

        The statistics are over standard normal elements: exact for the first layer, after it
        those of a fixed sample (data-dependent initialisation as in LSUV, arXiv 1511.06422).
        """
        if self.theta.is_meta:
            return
        num_hashes = self.hash_spec.num_hashes
        generator = torch.Generator().manual_seed(0)
        half = torch.randn(num_hashes, _SAMPLE_SIZE // 2, generator=generator, device="cpu")
        values = torch.cat((half, -half), dim=1).to(self.theta.device)
        theta = torch.randn(self.theta.shape, device=self.theta.device)
        activation = torch.relu if self.reconstruction.activation == "relu" else torch.tanh
        for layer, (weight, bias) in enumerate(split_theta(theta, num_hashes, self.reconstruction)):
            if layer == 0:
                mean, std = torch.zeros(()), weight.norm(dim=1)
            else:
                values = activation(values)
                std, mean = torch.std_mean(weight @ values, dim=1)
            weight /= std[:, None]
            values = weight @ values
            if bias is not None:
                bias.copy_(-mean / std)
                values += bias[:, None]
        self.theta.copy_(theta)

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

    def materialize(self) -> Tensor:
        """The virtual weight [out_features, in_features] in the pool's dtype, differentiable."""
        return functional.materialize(
            self.pool.weight,
            self.theta,
            self.out_features,
            self.in_features,
            hash_spec=self.hash_spec,
            reconstruction=self.reconstruction,
            scale=self.scale,
        )

    def get_extra_state(self) -> dict[str, Any]:
        """What the weights mean, as plain numbers and strings."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "scale": self.scale,
            **dataclasses.asdict(self.hash_spec),
            **dataclasses.asdict(self.reconstruction),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Adopt the checkpoint's seed.

        Raises:
            TypeError, ValueError: the checkpoint has no valid seed.
            ValueError: anything else differs between the checkpoint and this layer.
        """
        own = self.get_extra_state()
        for name in sorted(own.keys() | state.keys()):
            if name != "seed" and state.get(name) != own.get(name):
                raise ValueError(
                    f"the checkpoint's layer has {name}={state.get(name)!r}, "
                    f"this one has {name}={own.get(name)!r}"
                )
        seed: Any = state.get("seed")
        self.hash_spec = dataclasses.replace(self.hash_spec, seed=seed)

    def extra_repr(self) -> str:
        window = ""
        if self.hash_spec.window is not None:
            window = (
                f"window={self.hash_spec.window}, "
                f"rows_per_window={self.hash_spec.rows_per_window}, "
            )
        network = self.reconstruction
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, num_hashes={self.hash_spec.num_hashes}, "
            f"depth={network.depth}, width={network.width}, activation={network.activation!r}, "
            f"block={self.hash_spec.block}, {window}seed={self.hash_spec.seed}"
        )


_SAMPLE_SIZE = 2**16
