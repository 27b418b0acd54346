"""The HFH toolkit, built on hfh_kernels, and the command ``hfh``.

Names are imported when they are first used: the command's help needs no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfh.compression.compress import compress as compress
    from hfh.compression.dense import materialize as materialize
    from hfh.compression.report import Report as Report
    from hfh.costs.cost_model import cost as cost
    from hfh.files.checkpoint import load as load
    from hfh.files.checkpoint import save as save
    from hfh.fitting.finetune import finetune as finetune
    from hfh.fitting.fit import fit as fit
    from hfh.fitting.moments import second_moments as second_moments
    from hfh.layers.attention import HFHMultiheadAttention as HFHMultiheadAttention
    from hfh.layers.recurrent import HFHGRU as HFHGRU
    from hfh.layers.recurrent import HFHLSTM as HFHLSTM

_MODULES = {
    "compress": "hfh.compression.compress",
    "materialize": "hfh.compression.dense",
    "Report": "hfh.compression.report",
    "cost": "hfh.costs.cost_model",
    "load": "hfh.files.checkpoint",
    "save": "hfh.files.checkpoint",
    "finetune": "hfh.fitting.finetune",
    "fit": "hfh.fitting.fit",
    "second_moments": "hfh.fitting.moments",
    "HFHMultiheadAttention": "hfh.layers.attention",
    "HFHGRU": "hfh.layers.recurrent",
    "HFHLSTM": "hfh.layers.recurrent",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
