"""A text as character ids, split in two, and random windows of it."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.train.apart import count_apart, fingerprint_apart
from modula_agd.train.data import data_file
from modula_agd.train.fingerprint import digest
from modula_agd.train.pixels import DataError
from modula_agd.train.vocabulary import Vocabulary

SHAKESPEARE, TEXT = "shakespeare", "text:"


@dataclass(frozen=True)
class Characters:
    """A text as character ids, its last tenth held out.

    Args:
        name: as the user named it.
        vocabulary: its distinct characters in sorted order.
        train: ids of the first 90%.
        validation: ids of the rest.
        fingerprint: of the text, by which it is known again.
    """

    name: str
    vocabulary: Vocabulary
    train: Int[Tensor, " train"]
    validation: Int[Tensor, " validation"]
    fingerprint: str | None = None

    def to(self, device: torch.device | str) -> "Characters":
        """The same text on another device."""
        return replace(self, train=self.train.to(device), validation=self.validation.to(device))

    def apart(self, share: float) -> "Characters":
        """The training text alone, whose last share is held out in the place of what was."""
        cut = len(self.train) - count_apart(len(self.train), share, "characters")
        return replace(
            self,
            train=self.train[:cut],
            validation=self.train[cut:],
            fingerprint=fingerprint_apart(self.fingerprint, share),
        )

    def check(self, context: int) -> None:
        """Raise ``InvalidArgument`` unless windows of ``context`` characters, and their targets, fit into both splits."""
        longest = min(len(self.train), len(self.validation)) - 1
        if not 1 <= context <= longest:
            raise InvalidArgument(
                f"windows of {context} characters were asked for, but the text allows 1 to {longest}: the shorter of the two parts of "
                f"{self.name} has {longest + 1}, one more than a window. Shorten the context, take a longer text or, if a share is set "
                "apart, a larger one."
            )

    def sample(
        self, generator: torch.Generator, batch: int, context: int
    ) -> tuple[Int[Tensor, "batch context"], Int[Tensor, "batch context"]]:
        """Random windows of the training split, and the same windows one character later: the targets.

        Args:
            generator: on the CPU.
            batch: number of windows, ≥ 1, drawn with replacement.
            context: characters per window.

        Raises:
            InvalidArgument: a number is out of range.
        """
        self.check(context)
        if batch < 1:
            raise InvalidArgument(f"a batch of {batch} windows was asked for; it must be at least 1")
        return windows(self.train, self.draw(generator, batch, context), context)

    def draw(self, generator: torch.Generator, batch: int, context: int) -> Int[Tensor, " batch"]:
        """Where the windows of a batch begin."""
        return torch.randint(len(self.train) - context, (batch,), generator=generator)


def windows(
    ids: Int[Tensor, " length"], starts: Int[Tensor, " batch"], context: int
) -> tuple[Int[Tensor, "batch context"], Int[Tensor, "batch context"]]:
    """Windows of ``ids``, and the same windows one later.

    Args:
        ids: on any device.
        starts: where each window begins, from 0 to length − context − 1.
        context: ids per window, ≥ 1.
    """
    places = (starts[:, None] + torch.arange(context + 1, device=starts.device)).to(ids.device)
    found = ids[places]
    return found[:, :-1], found[:, 1:]


def characters(name: str = SHAKESPEARE, folder: Path | None = None) -> Characters:
    """Read a text.

    Args:
        name: "shakespeare", which is ``input.txt`` in ``folder`` or in ``folder/shakespeare``; or "text:FILE", in
            ``folder`` if one is given and it is there.
        folder: see above.

    Raises:
        DataError: the file is missing, is not UTF-8 text, or is too short to split.
    """
    if name.startswith(TEXT):
        file = Path(name.removeprefix(TEXT))
        places = [file] if folder is None else [folder / file, file]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise DataError(
                f"there is no text file {' or '.join(dict.fromkeys(map(str, places)))}. Name one as {TEXT}FILE, or its folder with "
                "--data-dir."
            )
    else:
        path = data_file(name, folder, "input.txt")
    try:
        # "-sig" drops the mark with which some editors begin a file, which is no character of the text
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start} (counted from 0). Convert it first."
        ) from error
    cut = len(text) * 9 // 10
    if cut < 2 or len(text) - cut < 2:
        raise DataError(
            f"{path} holds {len(text)} characters, but at least 20 are needed to hold out a tenth. Take a longer text."
        )
    points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    distinct, ids = points.unique(return_inverse=True)
    vocabulary = Vocabulary("".join(map(chr, distinct.tolist())))
    return Characters(name, vocabulary, ids[:cut], ids[cut:], digest([text]))
