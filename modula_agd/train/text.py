"""Character data: a text, its vocabulary, and random windows of it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.train.data import data_file
from modula_agd.train.pixels import DataError


@dataclass(frozen=True)
class Characters:
    """A text as character ids, its last tenth held out.

    Args:
        vocabulary: the distinct characters in sorted order; an id is an index into it.
        train: ids of the first 90%.
        validation: ids of the rest.
    """

    vocabulary: str
    train: Int[Tensor, " train"]
    validation: Int[Tensor, " validation"]

    def encode(self, text: str) -> Int[Tensor, " length"]:
        """The ids of a text.

        Raises:
            InvalidArgument: a character is not in the vocabulary.
        """
        unknown = sorted(set(text) - set(self.vocabulary))
        if unknown:
            raise InvalidArgument(
                f"the text to encode holds {unknown[0]!r}, which is not among the {len(self.vocabulary)} characters of the "
                "vocabulary. Leave such characters out."
            )
        return _ids(self.vocabulary, text)

    def decode(self, ids: Int[Tensor, " length"]) -> str:
        """The text of some ids.

        Raises:
            InvalidArgument: an id is out of range.
        """
        numbers = ids.tolist()
        for number in numbers:
            if not 0 <= number < len(self.vocabulary):
                raise InvalidArgument(
                    f"the id {number} was to be decoded, but ids run from 0 to {len(self.vocabulary) - 1}"
                )
        return "".join(self.vocabulary[number] for number in numbers)

    def sample(
        self, generator: torch.Generator, batch: int, context: int, *, validation: bool = False
    ) -> tuple[Int[Tensor, "batch context"], Int[Tensor, "batch context"]]:
        """Random windows, and the same windows one character later: the targets.

        Args:
            generator: on the CPU.
            batch: number of windows, ≥ 1, drawn with replacement.
            context: characters per window, from 1 to the length of the split less 1.
            validation: draw from the held-out tenth.

        Raises:
            InvalidArgument: a number is out of range.
        """
        ids = self.validation if validation else self.train
        if batch < 1:
            raise InvalidArgument(f"a batch of {batch} windows was asked for; it must be at least 1")
        if not 1 <= context < len(ids):
            raise InvalidArgument(
                f"windows of {context} characters were asked for, but the text allows 1 to {len(ids) - 1}. Shorten the context."
            )
        starts = torch.randint(len(ids) - context, (batch, 1), generator=generator)
        windows = ids[(starts + torch.arange(context + 1)).to(ids.device)]
        return windows[:, :-1], windows[:, 1:]


def characters(folder: Path | None, name: str = "shakespeare") -> Characters:
    """Read ``input.txt`` in ``folder`` or in ``folder/name``.

    Raises:
        DataError: the file is missing, is not UTF-8 text, or is too short to split.
    """
    path = data_file(name, folder, "input.txt")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}. Convert it first.") from error
    vocabulary = "".join(sorted(set(text)))
    cut = len(text) * 9 // 10
    if cut < 2 or len(text) - cut < 2:
        raise DataError(f"{path} holds {len(text)} characters, but at least 20 are needed to hold out a tenth.")
    ids = _ids(vocabulary, text)
    return Characters(vocabulary, ids[:cut], ids[cut:])


def _ids(vocabulary: str, text: str) -> Int[Tensor, " length"]:
    index = {character: position for position, character in enumerate(vocabulary)}
    return torch.tensor([index[character] for character in text], dtype=torch.int64)
