"""The task of classifying images that are held in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from modula_agd.train.apart import NAME
from modula_agd.train.augmentation import CropFlip
from modula_agd.train.data import Classification, batches, batches_per_epoch
from modula_agd.train.facts import ImageFacts, unit
from modula_agd.train.seeds import AUGMENTATION, stream
from modula_agd.train.task import Batch


@dataclass(frozen=True)
class ImageTask:
    """Shuffled epochs of images, each scaled to RMS 1 as it is used.

    Args:
        data: on the device to train on.
        flat: give rows of features instead of images.
        augment: crop training images at random, and mirror them where they are in colour.
        held_out: what the held-out images are called.
    """

    data: Classification
    flat: bool
    augment: bool = False
    held_out: str = "test"

    @property
    def facts(self) -> ImageFacts:
        return self.data.facts

    @property
    def device(self) -> torch.device:
        return self.data.train.inputs.device

    @property
    def fingerprint(self) -> str | None:
        return self.data.fingerprint

    def to(self, device: torch.device | str) -> "ImageTask":
        """The same task on another device."""
        return replace(self, data=self.data.to(device))

    def apart(self, share: float) -> "ImageTask":
        """The task of the training images alone, a share of which, drawn at random, is held out."""
        return replace(self, data=self.data.apart(share), held_out=NAME)

    @cached_property
    def _augmentation(self) -> CropFlip:
        channels, height, width = self.facts.shape
        return CropFlip(height, width, flip=channels == 3)

    def per_epoch(self, batch_size: int) -> int:
        return batches_per_epoch(len(self.data.train.labels), batch_size)

    def shown(self, batch_size: int) -> int:
        return min(batch_size, len(self.data.train.labels))

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        images, labels = self.data.train
        noise = stream(seed, AUGMENTATION)
        if self.augment:
            self._augmentation.skip(noise, start)
        for chosen in batches(len(labels), batch_size, stream(seed, 0), self.device, start):
            batch = images.index_select(0, chosen)
            if self.augment:
                batch = self._augmentation(batch, noise)
            yield Batch(unit(batch, flat=self.flat), labels.index_select(0, chosen))

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        for images, labels in zip(*(part.split(batch_size) for part in self.data.validation), strict=True):
            yield Batch(unit(images, flat=self.flat), labels)

    def __str__(self) -> str:
        sample = f"{self.facts.features} features" if self.flat else "×".join(map(str, self.facts.shape))
        return (
            f"{self.facts.name}: {len(self.data.train.labels):,} training and {len(self.data.validation.labels):,} "
            f"held-out samples of {sample}, {self.facts.classes} classes"
        )
