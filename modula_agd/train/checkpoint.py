"""Checkpoints: weights and optimizer state in one safetensors file, which is whole or absent at any moment."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from modula_agd.error import ModulaError
from modula_agd.train.extras import require

if TYPE_CHECKING:
    from modula_agd import State

_PARAMS, _STATE = "params.", "state."


class CheckpointError(ModulaError, ValueError):
    """A file is no checkpoint of this library."""


class Checkpoint(NamedTuple):
    """What a checkpoint file holds, on the CPU.

    Args:
        params: weights by name.
        state: the fields of the optimizer's state by name.
        metadata: texts by name, such as the step.
    """

    params: dict[str, Tensor]
    state: dict[str, Tensor]
    metadata: dict[str, str]


def save(path: Path, params: Mapping[str, Tensor], state: "State", metadata: Mapping[str, str]) -> None:
    """Write a checkpoint; a reader, or a crash, finds the old file or the new one, never half of one.

    Args:
        path: in an existing folder.
        params: weights by name, on any device.
        state: a named tuple of tensors.
        metadata: texts to keep with them.
    """
    require("writing a checkpoint", "safetensors")
    from safetensors.torch import save as serialised

    named = {f"{_PARAMS}{name}": value for name, value in params.items()}
    named |= {f"{_STATE}{name}": value for name, value in state._asdict().items()}
    # Fields of a state may share memory, which safetensors refuses to write.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in named.items()}
    replace(path, serialised(tensors, dict(metadata)))


def load(path: Path) -> Checkpoint:
    """Read what ``save`` wrote.

    Raises:
        CheckpointError: the file is missing or is not a checkpoint.
    """
    require("reading a checkpoint", "safetensors")
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}. Name a file that a training run has written.")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}. Name another, or train again.") from error
    params = {name.removeprefix(_PARAMS): value for name, value in tensors.items() if name.startswith(_PARAMS)}
    state = {name.removeprefix(_STATE): value for name, value in tensors.items() if name.startswith(_STATE)}
    if not params or len(params) + len(state) != len(tensors):
        raise CheckpointError(
            f"{path} holds tensors named {', '.join(sorted(tensors)[:3])}, but a checkpoint's begin with {_PARAMS!r} or "
            f"{_STATE!r}. Name a file that a training run has written."
        )
    return Checkpoint(params, state, metadata)


def replace(path: Path, content: bytes) -> None:
    """Write a file through a temporary one beside it, so that ``path`` is never half written.

    Args:
        path: in an existing folder; replaced if there.
        content: the whole file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
