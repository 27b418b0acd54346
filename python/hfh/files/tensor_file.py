"""safetensors files that are either whole or not there, with a checksum over all they hold."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

CHECKSUM = "hfh_checksum"
"""The metadata key of the checksum."""


class CheckpointError(ValueError):
    """A file, named first in the message, does not hold what it should."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum; a crash leaves the old file or the new one.

    Args:
        path: replaced where it exists. If anything fails, it is as before and nothing else is left.
        tensors: on any device and with any strides; tensors that share memory are written each.
        metadata: any strings by any key but that of the checksum.

    Raises:
        OSError: path cannot be written to.
    """
    path = path.resolve()
    to_write = {name: _own_memory(tensor) for name, tensor in tensors.items()}
    metadata = {**metadata, CHECKSUM: _checksum(to_write, metadata)}
    # In the same folder, since a rename is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(to_write, temporary, metadata)
        # safetensors makes files that only their owner can read, whatever the umask says.
        temporary.chmod(mode)
        _flush(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, safetensors.SafetensorError):
            raise OSError(f"{path} cannot be written: {error}") from error
        if isinstance(error, OSError) and error.filename is not None:
            error.filename = os.fspath(path)
        raise
    if os.name != "nt":
        _flush(path.parent)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a safetensors file.

    The checksum is checked where there is one: files of other programs have none.

    Raises:
        CheckpointError: the file is no safetensors file, is cut short or was changed.
        OSError: it cannot be read.
    """
    with path.open("rb"):
        pass  # safetensors reports a missing file without its errno
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors, metadata):
        raise CheckpointError(f"{path}: damaged, its checksum is not that of its contents")
    return tensors, metadata


def _own_memory(tensor: Tensor) -> Tensor:
    """Contiguous, on the CPU, and alone in its memory, as safetensors demands."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone()


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 in hexadecimal of metadata and of each tensor's name, dtype, shape and bytes."""
    items = sorted((key, value) for key, value in metadata.items() if key != CHECKSUM)
    digest = hashlib.sha256(json.dumps(items).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """To the disk: a file's contents, or a folder's list of files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
