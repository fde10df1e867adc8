"""The characters that a text is written in, and the ids that stand for them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from modula_agd.error import InvalidArgument


@dataclass(frozen=True)
class Vocabulary:
    """Distinct characters; an id is an index into them.

    Args:
        characters: in the order of their ids.
    """

    characters: str

    def __len__(self) -> int:
        return len(self.characters)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: position for position, character in enumerate(self.characters)}

    def encode(self, text: str) -> Int[Tensor, " length"]:
        """The ids of a text.

        Raises:
            InvalidArgument: a character is not in the vocabulary.
        """
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise InvalidArgument(
                f"the text to encode holds {unknown[0]!r}, which is not among the {len(self)} characters of the "
                "vocabulary. Leave such characters out."
            )
        return torch.tensor([self._ids[character] for character in text], dtype=torch.int64)

    def decode(self, ids: Int[Tensor, " length"]) -> str:
        """The text of some ids.

        Raises:
            InvalidArgument: an id is out of range.
        """
        numbers = ids.tolist()
        for number in numbers:
            if not 0 <= number < len(self):
                raise InvalidArgument(f"the id {number} was to be decoded, but ids run from 0 to {len(self) - 1}")
        return "".join(self.characters[number] for number in numbers)
