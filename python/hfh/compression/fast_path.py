"""The inference fast path of torch's transformer encoders, which reads dense weights itself.

``TransformerEncoderLayer`` and ``TransformerEncoder`` pass the weights of their parts to one fused
function where nothing needs a gradient. Each has an attribute that says whether it may.
"""

from __future__ import annotations

from torch import nn

from hfh_kernels.nn.layer import HFHLayer

_SWITCHES = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_KEPT = "_hfh_fast_path"


def disable(model: nn.Module) -> None:
    """Have every encoder with hashed parts call them; what it did before is kept for restore."""
    for module in model.modules():
        if not any(isinstance(part, HFHLayer) for part in module.modules()):
            continue
        for encoder, switch, off in _SWITCHES:
            if isinstance(module, encoder) and not hasattr(module, _KEPT):
                setattr(module, _KEPT, getattr(module, switch))
                setattr(module, switch, off)


def restore(model: nn.Module) -> None:
    """Undo :func:`disable`."""
    for module in model.modules():
        for encoder, switch, _ in _SWITCHES:
            if isinstance(module, encoder) and hasattr(module, _KEPT):
                setattr(module, switch, getattr(module, _KEPT))
                delattr(module, _KEPT)
