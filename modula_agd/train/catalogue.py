"""Tasks by the name of their data, as ``--data`` gives it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from modula_agd.error import InvalidArgument
from modula_agd.train.data import HUB, NAMES, classification
from modula_agd.train.image_folder import IMAGENET, image_folder
from modula_agd.train.image_task import ImageTask
from modula_agd.train.stream_task import StreamTask
from modula_agd.train.text import SHAKESPEARE, TEXT, characters
from modula_agd.train.text_task import TextTask

Source = Literal["memory", "files", "text"]

EVERY_NAME = (*NAMES, IMAGENET, SHAKESPEARE, f"{TEXT}FILE", f"{HUB}NAME")
"""How data sets are named, for help and errors."""

CONTEXT = 64
_MOST_WORKERS = 8

# Which data have which option, and the remedy where they have it not.
_OPTIONS: dict[str, tuple[Source, str]] = {
    "augment": ("memory", f"{IMAGENET} is always augmented, text never"),
    "context": ("text", f"only text ({SHAKESPEARE}, {TEXT}FILE) is cut into windows"),
    "workers": ("files", f"only {IMAGENET} is read while training"),
}


def source(name: str) -> Source:
    """Where the data of that name come from: images held in memory, image files, or a text.

    Raises:
        InvalidArgument: there is no data set of that name.
    """
    if name == IMAGENET:
        return "files"
    if name == SHAKESPEARE or (name.startswith(TEXT) and len(name) > len(TEXT)):
        return "text"
    if name in NAMES or (name.startswith(HUB) and len(name) > len(HUB)):
        return "memory"
    raise InvalidArgument(f"there is no data set {name!r}; choose one of {', '.join(EVERY_NAME)}")


def kind(name: str) -> str:
    """The kind of data: "images" or "text"."""
    return "text" if source(name) == "text" else "images"


def check(name: str, given: Mapping[str, object]) -> None:
    """Raise ``InvalidArgument`` where an option is given that the data of that name do not have."""
    for option in given:
        if option not in _OPTIONS:
            raise InvalidArgument(
                f"the option {option} was given for the data {name}, but the options of data are {', '.join(_OPTIONS)}, and "
                "everywhere folder, flat and device."
            )
        wanted, why = _OPTIONS[option]
        if source(name) != wanted:
            raise InvalidArgument(f"the option {option} was given for the data {name}, but {why}. Leave it out.")


def task(
    name: str,
    folder: Path | str | None = None,
    *,
    flat: bool = False,
    device: torch.device | str = "cpu",
    **options: int | bool,
) -> ImageTask | StreamTask | TextTask:
    """Open a data set by its name.

    Args:
        name: one of ``EVERY_NAME``.
        folder: where its files are.
        flat: give images as rows of features.
        device: where batches shall arrive.
        options: of data in memory ``augment`` (False); of text ``context`` (64 characters); of image files ``workers`` (the
            processors, at most 8).

    Raises:
        InvalidArgument: the name is unknown, or the data have no such option.
        DataError: files are missing or unreadable.
    """
    check(name, options)
    place, folder = torch.device(device), None if folder is None else Path(folder)
    match source(name):
        case "memory":
            return ImageTask(classification(name, folder).to(place), flat, bool(options.get("augment", False)))
        case "files":
            workers = options.get("workers", min(os.cpu_count() or 1, _MOST_WORKERS))
            return StreamTask(image_folder(folder, name), flat, int(workers), place)
        case "text":
            return TextTask(characters(name, folder).to(place), int(options.get("context", CONTEXT)))
