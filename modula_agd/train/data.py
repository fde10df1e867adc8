"""Classification data sets by name, held in memory: labelled images, standardised per channel."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.train.apart import drawn_apart, fingerprint_apart
from modula_agd.train.extras import require
from modula_agd.train.facts import ImageFacts, measured
from modula_agd.train.fingerprint import digest
from modula_agd.train.pixels import DataError, Pixels, at_row, from_hub, from_parquet

HUB = "hub:"
_DIGITS_SPLIT_SEED = 0


class Examples(NamedTuple):
    """Images and their labels.

    Args:
        inputs: standardised by the training images' channels.
        labels: class indices.
    """

    inputs: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, " batch"]

    def to(self, device: torch.device | str) -> "Examples":
        """The same examples on another device."""
        return Examples(self.inputs.to(device), self.labels.to(device))

    def of(self, chosen: Int[Tensor, " chosen"]) -> "Examples":
        """Some of the examples, by their index."""
        where = chosen.to(self.labels.device)
        return Examples(self.inputs.index_select(0, where), self.labels.index_select(0, where))


@dataclass(frozen=True)
class Classification:
    """A classification data set in memory.

    Args:
        facts: what the images are.
        train: examples to learn from.
        validation: examples held out.
        fingerprint: of the pixels and labels, by which they are known again.
    """

    facts: ImageFacts
    train: Examples
    validation: Examples
    fingerprint: str | None = None

    @property
    def name(self) -> str:
        """As the user named it."""
        return self.facts.name

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.facts.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.facts.shape

    @property
    def features(self) -> int:
        """Numbers in one image."""
        return self.facts.features

    def to(self, device: torch.device | str) -> "Classification":
        """The same data set on another device."""
        return replace(self, train=self.train.to(device), validation=self.validation.to(device))

    def apart(self, share: float) -> "Classification":
        """The training data alone, a share of which is held out in the place of what was."""
        learned, apart = drawn_apart(len(self.train.labels), share, "samples")
        return replace(
            self,
            train=self.train.of(learned),
            validation=self.train.of(apart),
            fingerprint=fingerprint_apart(self.fingerprint, share),
        )


def classification(name: str, folder: Path | None = None) -> Classification:
    """Load a data set.

    Args:
        name: "digits", which scikit-learn brings along; "mnist", "cifar10" or "cifar100", Parquet files; or "hub:NAME".
        folder: where ``train.parquet`` and ``test.parquet`` lie, or the folder above, with ``name/train.parquet``.

    Returns:
        The data set on the CPU; the test file (of digits: a fixed fifth) is held out as ``validation``.

    Raises:
        DataError: a file is missing or unreadable, or does not hold labelled images.
        InvalidArgument: the name is unknown.
    """
    if name.startswith(HUB):
        return _from_pixels(name, from_hub(name.removeprefix(HUB)), None)
    if name not in _LOADERS:
        raise InvalidArgument(f"there is no data set {name!r}; choose one of {', '.join(_LOADERS)}, or {HUB}NAME")
    return _LOADERS[name](name, folder)


def data_file(name: str, folder: Path | None, file: str) -> Path:
    """The path of a data set's file: in ``folder``, or in ``folder/name``.

    Raises:
        DataError: no folder was given, or the file is in neither place.
    """
    if folder is None:
        raise DataError(f"the data set {name!r} is read from files, but no folder was given. Name it with --data-dir.")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Name the one that holds {file} with --data-dir.")
    places = (folder / file, folder / name / file)
    for place in places:
        if place.is_file():
            return place
    raise DataError(
        f"the data set {name!r} needs {file}, but neither {places[0]} nor {places[1]} is a file. "
        "Name the folder that holds it with --data-dir."
    )


def batches(
    count: int, size: int, generator: torch.Generator, device: torch.device | str = "cpu", start: int = 0
) -> Iterator[Int[Tensor, " batch"]]:
    """Indices of minibatches without end: one freshly shuffled epoch after another.

    The last, partial batch of an epoch is dropped, unless there are fewer samples than one batch.

    Args:
        count: number of samples, ≥ 1.
        size: samples per batch, ≥ 1.
        generator: source of the shuffles, on the CPU, so that every device sees the same batches.
        device: where the indices shall live.
        start: batches to leave out, ≥ 0.
    """
    per_epoch = batches_per_epoch(count, size)
    epochs, first = divmod(start, per_epoch)
    for _ in range(epochs):
        torch.randperm(count, generator=generator)
    while True:
        order = torch.randperm(count, generator=generator).to(device)
        yield from order.split(size)[first:per_epoch]
        first = 0


def batches_per_epoch(count: int, size: int) -> int:
    """How many minibatches ``batches`` makes of one epoch."""
    return count // min(size, count)


def _from_pixels(name: str, splits: dict[str, Pixels], classes: int | None) -> Classification:
    train, test = splits["train"], splits["test"]
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{train.source} holds images of shape {tuple(train.images.shape[1:])} (channels, height, width), but "
            f"{test.source} of shape {tuple(test.images.shape[1:])}. Both must be alike."
        )
    classes = classes or train.classes or int(train.labels.max()) + 1
    for split in splits.values():
        if int(split.labels.max()) >= classes:
            row = int((split.labels >= classes).nonzero()[0])
            raise DataError(
                f"{at_row(split.source, row)} has the label {int(split.labels[row])}, but {name} has {classes} classes, "
                f"labelled 0 to {classes - 1}. Correct the labels, or check that this is the right file."
            )
    facts = measured(name, classes, train.images)
    return Classification(
        facts,
        Examples(facts.standardised(train.images), train.labels),
        Examples(facts.standardised(test.images), test.labels),
        digest(tensor for split in (train, test) for tensor in (split.images, split.labels)),
    )


def _parquet(classes: int) -> Callable[[str, Path | None], Classification]:
    def load(name: str, folder: Path | None) -> Classification:
        files = {split: data_file(name, folder, f"{split}.parquet") for split in ("train", "test")}
        return _from_pixels(name, from_parquet(files), classes)

    return load


def _digits(name: str, folder: Path | None) -> Classification:
    require("the digits data set", "sklearn")
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(_DIGITS_SPLIT_SEED))
    images = rearrange(torch.from_numpy(pixels).to(torch.uint8)[order], "b (c h w) -> b c h w", c=1, h=8)
    labels = torch.from_numpy(targets).long()[order]
    cut = len(labels) * 4 // 5
    return _from_pixels(
        name,
        {
            "train": Pixels(images[:cut], labels[:cut], 10, "digits (train)"),
            "test": Pixels(images[cut:], labels[cut:], 10, "digits (test)"),
        },
        10,
    )


_LOADERS: dict[str, Callable[[str, Path | None], Classification]] = {
    "digits": _digits,
    "mnist": _parquet(10),
    "cifar10": _parquet(10),
    "cifar100": _parquet(100),
}

NAMES = tuple(_LOADERS)
"""The classification data sets that have a name of their own and fit into memory."""
