"""The task of classifying images that are read from files as they are needed, by worker processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modula_agd.train.apart import NAME
from modula_agd.train.data import batches, batches_per_epoch
from modula_agd.train.facts import ImageFacts, unit
from modula_agd.train.fingerprint import listing
from modula_agd.train.image_folder import Files, ImageFolder, crop
from modula_agd.train.pixels import DataError
from modula_agd.train.seeds import AUGMENTATION, stream
from modula_agd.train.stopping import leave_to_parent
from modula_agd.train.task import Batch

Sample = tuple[UInt8[Tensor, "3 side side"], int]
Choice = tuple[int, int | None]
"""Index of a file, and the seed of its random crop; None for the centre."""


@dataclass(frozen=True)
class StreamTask:
    """Shuffled epochs of image files, cropped and mirrored at random; held out, the centre of each.

    Args:
        folder: the files.
        flat: give rows of features instead of images.
        workers: processes that read and decode, ≥ 0; 0 does it in this one.
        device: where batches shall arrive.
        part: which part of each batch to read, and of how many; each has as many files as the others.
        held_out: what the held-out files are called.
    """

    folder: ImageFolder
    flat: bool
    workers: int
    device: torch.device
    part: tuple[int, int] = (0, 1)
    held_out: str = "validation"

    @property
    def facts(self) -> ImageFacts:
        return self.folder.facts

    @cached_property
    def fingerprint(self) -> str:
        return listing(self.folder.train.paths, self.folder.validation.paths)

    def apart(self, share: float) -> "StreamTask":
        """The task of the training files alone, a share of which, drawn at random, is held out."""
        return replace(self, folder=self.folder.apart(share), held_out=NAME)

    def per_epoch(self, batch_size: int) -> int:
        return batches_per_epoch(len(self.folder.train.paths), batch_size)

    def shown(self, batch_size: int) -> int:
        return min(batch_size, len(self.folder.train.paths))

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        return self._load(
            self.folder.train, _Shuffled(len(self.folder.train.paths), batch_size, seed, start, self.part)
        )

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        part, parts = self.part
        order = torch.arange(len(self.folder.validation.paths)).split(batch_size)[part::parts]
        return self._load(self.folder.validation, [[(index, None) for index in part.tolist()] for part in order])

    def _load(self, files: Files, choices: Any) -> Iterator[Batch]:
        loader = DataLoader(
            _Crops(files, self.folder.side),
            batch_sampler=choices,
            num_workers=self.workers,
            collate_fn=_collated,
            worker_init_fn=leave_to_parent,
            # without one of its own the loader would advance torch's global generator
            generator=torch.Generator(),
            pin_memory=self.device.type == "cuda",
        )
        for loaded in loader:
            if isinstance(loaded, str):
                raise DataError(loaded)
            images, labels = (part.to(self.device, non_blocking=True) for part in loaded)
            yield Batch(unit(self.facts.standardised(images), flat=self.flat), labels)

    def __str__(self) -> str:
        sample = f"{self.facts.features} features" if self.flat else "×".join(map(str, self.facts.shape))
        return (
            f"{self.facts.name}: {len(self.folder.train.paths):,} training and {len(self.folder.validation.paths):,} "
            f"held-out samples of {sample}, {self.facts.classes} classes, read by {self.workers} processes"
        )


@dataclass(frozen=True)
class _Shuffled:
    """Batches of choices without end. The seeds are drawn here, so that the number of workers changes nothing."""

    count: int
    size: int
    seed: int
    start: int
    part: tuple[int, int]

    def __iter__(self) -> Iterator[list[Choice]]:
        noise = stream(self.seed, AUGMENTATION)
        for _ in range(self.start):
            torch.randint(2**62, (min(self.size, self.count),), generator=noise)
        for chosen in batches(self.count, self.size, stream(self.seed, 0), start=self.start):
            seeds = torch.randint(2**62, (len(chosen),), generator=noise)
            part, parts = self.part
            mine = slice(part * len(chosen) // parts, (part + 1) * len(chosen) // parts)
            yield list(zip(chosen[mine].tolist(), seeds[mine].tolist(), strict=True))


@dataclass(frozen=True)
class _Crops(Dataset):
    """One crop and its label for each choice; the text of the error where there is none to be had.

    An error that a worker raises reaches this process with the worker's traceback for a text, so it is handed over instead.
    """

    files: Files
    side: int

    def __getitem__(self, choice: Choice) -> Sample | str:
        index, seed = choice
        try:
            return crop(self.files.paths[index], self.side, seed), self.files.labels[index]
        except DataError as error:
            return str(error)


def _collated(
    samples: Sequence[Sample | str],
) -> tuple[UInt8[Tensor, "batch 3 side side"], Int[Tensor, " batch"]] | str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)
