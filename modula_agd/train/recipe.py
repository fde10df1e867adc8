"""The recipe of a network: what to build it from again, as a text that fits into a checkpoint."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from einops import rearrange
from jaxtyping import Num
from torch import Tensor

from modula_agd import Module
from modula_agd.error import InvalidArgument
from modula_agd.train.architecture import ARCHITECTURES, build
from modula_agd.train.checkpoint import CheckpointError
from modula_agd.train.facts import Facts, ImageFacts, Images, TextFacts, unit
from modula_agd.train.vocabulary import Vocabulary

KEY = "recipe"
"""Under which a checkpoint's metadata has the text."""


@dataclass(frozen=True)
class Recipe:
    """An architecture with its options, for some data.

    Args:
        arch: a key of ``ARCHITECTURES``.
        options: a value of every option that the architecture has.
        logits: whether the outputs are ``Logits``.
        facts: what the data are.
    """

    arch: str
    options: Mapping[str, Any]
    logits: bool
    facts: Facts

    def network(self) -> Module:
        """The network; equal recipes give equal ones."""
        return build(self.arch, self.facts, logits=self.logits, **self.options)

    def inputs(self, raw: Images | Sequence[str]) -> Num[Tensor, "batch *shape"]:
        """What the network takes, from what people have.

        Args:
            raw: images in the units of the stored pixels (bytes, for files), of the shape that the facts tell; or texts of
                one length, at most the context.

        Raises:
            InvalidArgument: images of another shape, texts of different lengths, or an unknown character.
        """
        if isinstance(self.facts, TextFacts):
            return _ids(self.facts, raw)
        if not isinstance(raw, Tensor) or raw.ndim != 4 or tuple(raw.shape[1:]) != self.facts.shape:
            given = f"of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else type(raw).__name__
            raise InvalidArgument(
                f"images [batch, {', '.join(map(str, self.facts.shape))}] were expected, as those of {self.facts.name}, but got "
                f"{given}. Crop or resize them."
            )
        return unit(self.facts.standardised(raw), flat=ARCHITECTURES[self.arch].takes == "rows")

    def __str__(self) -> str:
        """JSON, which ``recipe`` reads."""
        kind = "images" if isinstance(self.facts, ImageFacts) else "text"
        told = {"arch": self.arch, "options": dict(self.options), "logits": self.logits}
        return json.dumps({**told, "data": {"kind": kind, **asdict(self.facts)}}, ensure_ascii=False)


def _ids(facts: TextFacts, texts: Any) -> Tensor:
    if isinstance(texts, str | Tensor) or not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidArgument(f"a list of texts was expected, as {facts} is what the network knows, but got {texts!r}")
    lengths = {len(text) for text in texts}
    if len(lengths) > 1 or not 1 <= min(lengths) <= facts.context:
        raise InvalidArgument(
            f"texts of {' and '.join(map(str, sorted(lengths)))} characters were given; they must all have one length, from 1 to "
            f"{facts.context}. Cut them."
        )
    return rearrange(facts.vocabulary.encode("".join(texts)), "(b t) -> b t", b=len(texts))


def recipe(text: str) -> Recipe:
    """Read what ``str(recipe)`` wrote.

    Raises:
        CheckpointError: the text is no recipe of this version.
    """
    try:
        told = json.loads(text)
        data = told["data"]
        kind = data.pop("kind")
        facts = _image_facts(data) if kind == "images" else _text_facts(data)
        return Recipe(str(told["arch"]), {**told["options"]}, told["logits"], facts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the recipe of the network cannot be read: {error!r}. It was written by another version; train again with this one."
        ) from error


def _image_facts(data: dict[str, Any]) -> ImageFacts:
    listed: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return ImageFacts(**listed)


def _text_facts(data: dict[str, Any]) -> TextFacts:
    return TextFacts(**{**data, "vocabulary": Vocabulary(**data["vocabulary"])})
