"""Where the commands get models from: a safetensors file, or ``package.module:factory``."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hfh.files import checkpoint
from hfh.files.checkpoint_contents import identity
from hfh.files.state_dict_model import state_dict_model

_MAX_DIFFERENCE = 300


class SourceError(ValueError):
    """What the user named does not lead to a model."""


def is_file(source: str) -> bool:
    """Whether a source names a file, not a factory."""
    return ":" not in source or Path(source).exists()


def load_model(source: str, weights: Path | None = None) -> nn.Module:
    """The model of a file or a factory.

    Args:
        source: path of a safetensors file, whose model then has no forward pass; or
            ``package.module:factory``, a module of torch.nn or a function that makes one. The
            working directory is searched too.
        weights: a safetensors file to load into what the factory made.

    Raises:
        SourceError: the source is neither, or the factory does not make a module.
        CheckpointError: a file is damaged or does not fit the model.
        OSError: a file cannot be read.
        Whatever importing or calling the factory raises.
    """
    if is_file(source):
        if weights is not None:
            raise SourceError(f"--weights goes with package.module:factory, received {source}")
        return state_dict_model(checkpoint.read(Path(source), of_any_program=True))
    model = _made_by(source)
    if weights is None:
        return model
    contents = checkpoint.read(weights, of_any_program=True)
    if contents.layers:
        return checkpoint.load(weights, model)
    try:
        model.load_state_dict(_with_ties(contents.state_dict(), model))
    except RuntimeError as error:
        # torch names every tensor, which may be thousands.
        difference = textwrap.shorten(str(error), _MAX_DIFFERENCE, placeholder=" ...")
        raise SourceError(f"{weights} does not fit {source}: {difference}") from error
    return model


def _with_ties(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Tensors that the model shares, by all of their names: files have them by one."""
    own = {
        name: identity(tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    given = {own[name]: tensor for name, tensor in state.items() if name in own}
    tied = {name: given[key] for name, key in own.items() if key in given}
    return tied | state


def _made_by(source: str) -> nn.Module:
    module_name, _, factory_name = source.partition(":")
    if not module_name or not factory_name:
        raise SourceError(f"a factory must be given as package.module:factory, received {source}")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise SourceError(f"{source}: no module named {error.name}") from error
        raise
    finally:
        sys.path.remove(os.getcwd())
    made = getattr(module, factory_name, None)
    if made is None:
        raise SourceError(f"{source}: {module_name} has no {factory_name!r}")
    if not isinstance(made, nn.Module) and callable(made):
        made = made()
    if not isinstance(made, nn.Module):
        raise SourceError(f"{source} must give a torch.nn.Module, received {type(made).__name__}")
    return made
