"""The task of predicting the next character."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from modula_agd.train.apart import NAME
from modula_agd.train.facts import TextFacts
from modula_agd.train.seeds import stream
from modula_agd.train.task import Batch
from modula_agd.train.text import Characters, windows

# An evaluation of a long text costs no more than one of half a million characters at a context of 128.
_MOST_WINDOWS = 4096


@dataclass(frozen=True)
class TextTask:
    """Random windows to learn from; held out, a fixed set of windows that lie side by side.

    Args:
        text: on the device to train on.
        context: characters per window, ≥ 1.
        held_out: what the held-out text is called.
    """

    text: Characters
    context: int
    held_out: str = "validation"

    def __post_init__(self) -> None:
        self.text.check(self.context)

    @property
    def facts(self) -> TextFacts:
        return TextFacts(self.text.name, self.text.vocabulary, self.context)

    @property
    def device(self) -> torch.device:
        return self.text.train.device

    @property
    def fingerprint(self) -> str | None:
        return self.text.fingerprint

    def to(self, device: torch.device | str) -> "TextTask":
        """The same task on another device."""
        return replace(self, text=self.text.to(device))

    def apart(self, share: float) -> "TextTask":
        """The task of the training text alone, whose last share is held out."""
        return replace(self, text=self.text.apart(share), held_out=NAME)

    def per_epoch(self, batch_size: int) -> int:
        # Windows are drawn with replacement: an epoch shows as many characters as the split has.
        return max(1, len(self.text.train) // (batch_size * self.context))

    def shown(self, batch_size: int) -> int:
        return batch_size

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        generator = stream(seed, 0)
        for _ in range(start):
            self.text.draw(generator, batch_size, self.context)
        while True:
            yield Batch(*self.text.sample(generator, batch_size, self.context))

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """Windows without overlap over the held-out text; of a long one, 4,096 of them, evenly spread."""
        count = (len(self.text.validation) - 1) // self.context
        starts = torch.arange(count) * self.context
        if count > _MOST_WINDOWS:
            starts = starts[torch.arange(_MOST_WINDOWS) * count // _MOST_WINDOWS]
        for part in starts.split(batch_size):
            yield Batch(*windows(self.text.validation, part, self.context))

    def __str__(self) -> str:
        return (
            f"{self.text.name}: {len(self.text.train):,} training and {len(self.text.validation):,} held-out characters, "
            f"{self.facts.classes} distinct, in windows of {self.context}"
        )
