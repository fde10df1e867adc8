"""Fingerprints of data, by which a run that goes on knows the data that it began with."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_LENGTH = 16


def digest(parts: Iterable[Tensor | str]) -> str:
    """Of every number and every character, and their order: some tenths of a second for CIFAR-10.

    Args:
        parts: tensors on the CPU, or texts.
    """
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            found.update(part.encode("utf-8", "surrogatepass"))
        else:
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(part.contiguous().numpy().data.cast("B"))
    return found.hexdigest()[:_LENGTH]


def listing(*splits: tuple[Path, ...]) -> str:
    """Of the names and the order of files too many to be read.

    Their sizes do not count: a file that turned out to be damaged, and ended a run, may be repaired before it goes on.

    Args:
        splits: paths of each split; only the names of a file and of its folder, the class, count, so that all may be moved.
    """
    return digest("\n".join(f"{path.parent.name}/{path.name}" for path in paths) + "\n\n" for paths in splits)
