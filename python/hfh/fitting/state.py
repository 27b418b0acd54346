"""How far a fit is, and the file it continues from."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hfh.fitting.error import Target
from hfh.fitting.problem import Parameters, Problem


@dataclass(frozen=True)
class State:
    """All that the next round depends on.

    Args:
        stage: "linear", "nonlinear" or "done".
        error: of the parameters, in the stage's own terms; infinite before the first round.
        linear_error: the last one of the linear stage.
        learning_rate: of the next nonlinear round.
        linear_rounds, nonlinear_rounds: how many ran.
    """

    parameters: Parameters
    stage: str = "linear"
    error: float = math.inf
    linear_error: float = math.inf
    learning_rate: float = 0.03
    linear_rounds: int = 0
    nonlinear_rounds: int = 0

    @property
    def rounds(self) -> int:
        """How many ran in all."""
        return self.linear_rounds + self.nonlinear_rounds


class StateFile:
    """A safetensors file of one fit's state.

    Args:
        path: of the file.
        problem, options: what the fit depends on; a file made for others is an error.

    Raises:
        ImportError: safetensors is missing.
    """

    def __init__(self, path: Path, problem: Problem, options: Sequence[float]) -> None:
        try:
            from hfh.files import tensor_file
        except ModuleNotFoundError as error:
            raise ImportError(f"a checkpoint needs safetensors: {error}") from error
        self._tensor_file = tensor_file
        self._path = path
        self._device = problem.targets[0].layer.pool.weight.device
        self._fingerprint = _fingerprint(problem, options)

    def load(self) -> State | None:
        """The state, on the pool's device; None where there is no file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, or belongs to another fit.
        """
        if not self._path.exists():
            return None
        try:
            tensors, metadata = self._tensor_file.read(self._path)
            tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
            progress = json.loads(metadata["progress"])
            thetas = [tensors[f"theta.{index}"] for index in range(len(tensors) - 1)]
            state = State(Parameters(tensors["pool"], thetas), **progress)
            is_same = metadata["fingerprint"] == self._fingerprint
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"checkpoint {self._path} is not that of a fit: {error}") from error
        if not is_same:
            raise ValueError(
                f"checkpoint {self._path} is that of a fit of other weights or with other options; "
                "remove it to start anew"
            )
        return state

    def save(self, state: State) -> None:
        """Replace the file as a whole: whoever reads it finds this state or the one before.

        Raises:
            OSError: the file cannot be written.
        """
        pool, thetas = state.parameters
        tensors = {"pool": pool, **{f"theta.{index}": theta for index, theta in enumerate(thetas)}}
        progress = {name: value for name, value in vars(state).items() if name != "parameters"}
        metadata = {"fingerprint": self._fingerprint, "progress": json.dumps(progress)}
        self._tensor_file.write(self._path, tensors, metadata)


def _fingerprint(problem: Problem, options: Sequence[float]) -> str:
    """Of everything that decides the result of a fit but the machine."""
    parts: list[object] = [*options]
    for target in problem.targets:
        layer = target.layer
        parts += [asdict(layer.hash_spec), asdict(layer.reconstruction), layer.scale]
        parts += [
            target.row_offset,
            target.theta,
            *target.weight.shape,
            str(layer.pool.weight.dtype),
        ]
        parts.append(_checksum(target))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _checksum(target: Target) -> int:
    """CRC-32 of weight and importance."""
    strips = [rows for _, rows in target.strips()]
    if target.importance is not None:
        strips.append(target.importance)
    checksum = 0
    for strip in strips:
        checksum = zlib.crc32(_bytes(strip), checksum)
    return checksum


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
