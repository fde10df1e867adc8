"""Checkpoints: all that a run needs to go on, in one safetensors file, whole or absent at any moment."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from modula_agd.error import InvalidArgument, ModulaError
from modula_agd.train.extras import require
from modula_agd.train.files import replace

if TYPE_CHECKING:
    from modula_agd import State

FORMAT = 1
"""The version of the file's layout; a file without one, of before there were any, has 0."""

_FORMAT_KEY = "format"
_PARTS = ("params", "buffers", "state", "average", "loop")


class CheckpointError(ModulaError, ValueError):
    """A file is no checkpoint of this library, or not one that can be gone on from."""


class Checkpoint(NamedTuple):
    """What a checkpoint file holds, on the CPU.

    Args:
        params: weights by name.
        buffers: running statistics by name; empty for most networks.
        state: the tensors of the optimizer's state by name: of the field, and below it of the weight where there are many.
        average: averaged weights and running statistics, by the names of both.
        metadata: texts by name, such as the step.
        loop: what else the training loop needs to go on as if it had never ended, by name; empty where nobody goes on.
        format: version of the file's layout.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    state: dict[str, Tensor]
    average: dict[str, Tensor]
    metadata: dict[str, str]
    loop: dict[str, Tensor] = {}  # noqa: RUF012 (a named tuple's default, which nothing writes to)
    format: int = FORMAT


def save(
    path: Path,
    params: Mapping[str, Tensor],
    state: "State",
    metadata: Mapping[str, str],
    buffers: Mapping[str, Tensor] | None = None,
    average: Mapping[str, Tensor] | None = None,
    loop: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint; a reader, or a crash, finds the old file or the new one, never half of one.

    Args:
        path: in an existing folder.
        params: weights by name, on any device.
        state: a named tuple of tensors, of mappings and of named tuples of such.
        metadata: texts to keep with them.
        buffers: running statistics by name.
        average: averaged weights and running statistics by name.
        loop: other tensors to keep, by name.

    Raises:
        OSError: the file could not be written, and the old one is still there.
    """
    require("writing a checkpoint", "safetensors")
    from safetensors.torch import save as serialised

    parts = zip(_PARTS, (params, buffers or {}, state, average or {}, loop or {}), strict=True)
    # Fields of a state may share memory, which safetensors refuses to write.
    tensors = {
        name: value.detach().cpu().clone().contiguous() for part, values in parts for name, value in _flat(part, values)
    }
    replace(path, serialised(tensors, {**metadata, _FORMAT_KEY: str(FORMAT)}))


def _flat(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor with its dotted name."""
    if value is None:
        return
    if isinstance(value, Tensor):
        yield path, value
        return
    fields = value._asdict() if hasattr(value, "_asdict") else value
    if not isinstance(fields, Mapping):
        raise InvalidArgument(f"a checkpoint holds tensors, but {path} is {type(value).__name__}")
    for name, part in fields.items():
        yield from _flat(f"{path}.{name}", part)


def load(path: Path) -> Checkpoint:
    """Read what ``save`` wrote.

    Raises:
        CheckpointError: the file is missing, is not a checkpoint, or is of a later version.
    """
    require("reading a checkpoint", "safetensors")
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}. Name a file that a training run has written.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            version = _version(metadata.pop(_FORMAT_KEY, "0"), path)
            # copies lie in memory as torch allocates it: sums may be rounded otherwise where tensors are aligned otherwise
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}. Name another, or train again."
        ) from error
    params, buffers, state, average, loop = (
        {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
        for part in _PARTS
    )
    if not params or len(params) + len(buffers) + len(state) + len(average) + len(loop) != len(tensors):
        raise CheckpointError(
            f"{path} holds tensors named {', '.join(sorted(tensors)[:3])}, but a checkpoint's begin with "
            f"{', '.join(_PARTS)} and a dot. Name a file that a training run has written."
        )
    return Checkpoint(params, buffers, state, average, metadata, loop, version)


def _version(text: str, path: Path) -> int:
    """The version that a file says it has, if this library can read it."""
    if not text.isdecimal():
        raise CheckpointError(
            f"{path} says that it has the format {text!r}, which is no number. It was written by another program; name a file that "
            "a training run has written."
        )
    if int(text) > FORMAT:
        raise CheckpointError(
            f"{path} has the format {text}, but this version of modula_agd reads formats up to {FORMAT}. A later version wrote it: "
            "install that one."
        )
    return int(text)


def state_like(example: "State", tensors: Mapping[str, Tensor]) -> "State":
    """A state from the tensors that a checkpoint holds of it, to go on from.

    Args:
        example: a state of the same method, such as ``method.init(params)``.
        tensors: ``Checkpoint.state``.

    Raises:
        CheckpointError: the tensors are not those of such a state.
    """
    return _filled(example, dict(tensors), "")


def _filled(example: Any, tensors: dict[str, Tensor], path: str) -> Any:
    below = {name.removeprefix(f"{path}."): value for name, value in tensors.items() if name.startswith(f"{path}.")}
    inside = below if path else tensors
    if isinstance(example, Mapping):
        return inside
    if hasattr(example, "_asdict"):
        return type(example)(**{name: _filled(part, inside, name) for name, part in example._asdict().items()})
    if example is not None and path not in tensors:
        raise CheckpointError(
            f"the checkpoint's state has no {path}. It was written by another method or version; start from method.init."
        )
    if example is None:
        return None
    if tensors[path].shape != example.shape:
        raise CheckpointError(
            f"the checkpoint's {path} has shape {tuple(tensors[path].shape)}, where {tuple(example.shape)} was expected. It belongs to "
            "another network or method; start from method.init."
        )
    # where and in what precision the example is: a clock, say, is on the CPU wherever the rest may be
    return tensors[path].to(example)
