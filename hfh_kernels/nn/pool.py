"""The vector behind the weights of many layers."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import nn

from hfh_kernels.ops.hash_index.reference import GOLDEN
from hfh_kernels.spec import require_int


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
