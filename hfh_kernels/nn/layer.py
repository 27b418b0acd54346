"""What every layer over a pool shares: the hash, g, and what a checkpoint says of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from hfh_kernels import functional
from hfh_kernels.nn.pool import Pool
from hfh_kernels.ops.materialize.reference import split_theta
from hfh_kernels.spec import HashSpec, Reconstruction


class HFHLayer(nn.Module):
    """A module with a virtual weight V = scale * g(a) of ``weight_shape`` (rows, cols).

    The pool is the submodule ``pool``, g's parameters the flat parameter ``theta``. A state dict
    also carries the hash, the reconstruction and the scale: loading adopts the checkpoint's seed
    and scale, and any other difference is an error.

    Args:
        weight_shape: of the virtual weight, as a matrix.
        scale: factor on g's output, which starts with mean 0 and variance 1.
        pool: shared by as many layers as you like.
        num_hashes: pool elements behind one weight, 1 to 16.
        depth, width, activation: of g, see :class:`hfh_kernels.Reconstruction`.
        block, window, rows_per_window: of the hash, see :class:`hfh_kernels.HashSpec`.
        seed: of the hash; by default one that no other layer of the pool got by default.
        theta: the parameter of another layer, to share its g.
        device, dtype: of theta. ``torch.nn.utils.skip_init`` empties the pool as well, as it does
            all that a module holds.

    Raises:
        TypeError: pool is not a :class:`Pool`, or an argument has the wrong type.
        ValueError: an argument is out of range, or theta has the wrong shape.
    """

    theta: nn.Parameter

    def __init__(
        self,
        weight_shape: tuple[int, int],
        scale: float,
        *,
        pool: Pool,
        num_hashes: int,
        depth: int,
        width: int,
        activation: str,
        block: int,
        window: int | None,
        rows_per_window: int | None,
        seed: int | None,
        theta: nn.Parameter | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if not isinstance(pool, Pool):
            raise TypeError(f"pool must be a hfh_kernels.nn.Pool, received {type(pool).__name__}")
        self.weight_shape = weight_shape
        self.scale = scale
        self.hash_spec = HashSpec(
            seed=pool.next_seed() if seed is None else seed,
            num_hashes=num_hashes,
            pool_size=pool.weight.numel(),
            block=block,
            window=window,
            rows_per_window=rows_per_window,
        )
        self.reconstruction = Reconstruction(depth, width, activation)
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

    def reset_parameters(self) -> None:
        """Draw the layer's own parameters anew; the pool, which others read, stays as it is."""
        self._reset_theta()

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

    def materialize(self) -> Tensor:
        """The virtual weight as a matrix [rows, cols] in the pool's dtype, differentiable."""
        return functional.materialize(
            self.pool.weight, self.theta, *self.weight_shape, **self._weight_arguments()
        )

    def _weight_arguments(self) -> dict[str, Any]:
        """The arguments that every function of :mod:`hfh_kernels.functional` takes."""
        return {
            "hash_spec": self.hash_spec,
            "reconstruction": self.reconstruction,
            "scale": self.scale,
        }

    def _own_state(self) -> dict[str, Any]:
        """What the layer's kind adds to its extra state: plain numbers and strings."""
        raise NotImplementedError

    def get_extra_state(self) -> dict[str, Any]:
        """What the weights mean, as plain numbers and strings."""
        return {
            **self._own_state(),
            "scale": self.scale,
            **dataclasses.asdict(self.hash_spec),
            **dataclasses.asdict(self.reconstruction),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Adopt the checkpoint's seed and scale.

        Raises:
            TypeError, ValueError: the checkpoint has no valid seed or scale.
            ValueError: anything else differs between the checkpoint and this layer.
        """
        own = self.get_extra_state()
        for name in sorted(own.keys() | state.keys()):
            if name not in ("seed", "scale") and state.get(name) != own.get(name):
                raise ValueError(
                    f"the checkpoint's layer has {name}={state.get(name)!r}, "
                    f"this one has {name}={own.get(name)!r}"
                )
        seed: Any = state.get("seed")
        scale: Any = state.get("scale")
        if not isinstance(scale, float) or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite float, the checkpoint has {scale!r}")
        self.hash_spec = dataclasses.replace(self.hash_spec, seed=seed)
        self.scale = scale

    def _weight_repr(self) -> str:
        """The tail of every layer's ``extra_repr``."""
        window = ""
        if self.hash_spec.window is not None:
            window = (
                f"window={self.hash_spec.window}, "
                f"rows_per_window={self.hash_spec.rows_per_window}, "
            )
        network = self.reconstruction
        return (
            f"num_hashes={self.hash_spec.num_hashes}, "
            f"depth={network.depth}, width={network.width}, activation={network.activation!r}, "
            f"block={self.hash_spec.block}, {window}seed={self.hash_spec.seed}"
        )


_SAMPLE_SIZE = 2**16
