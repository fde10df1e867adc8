"""Text from a trained network, one character after another."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.train.facts import TextFacts
from modula_agd.train.restore import Restored


def continuation(
    trained: Restored, prompt: str, length: int, *, temperature: float = 1.0, generator: torch.Generator
) -> Iterator[str]:
    """Characters that follow a prompt, each drawn from softmax(scores/temperature).

    Args:
        trained: a network of text.
        prompt: at least one character of its vocabulary; only the last ``context`` of them, and of what follows, are seen.
        length: how many characters to draw, ≥ 0.
        temperature: dimensionless, ≥ 0; 1 draws from what the network believes, 0 takes the likeliest character.
        generator: on the CPU.

    Raises:
        InvalidArgument: the network knows no text, the prompt is empty or holds an unknown character, or a number is out of
            range.
    """
    facts = trained.recipe.facts
    if not isinstance(facts, TextFacts):
        raise InvalidArgument(
            f"text was asked of a network of the architecture {trained.recipe.arch}, which was trained on {facts}. "
            "Name a run of gpt."
        )
    if not prompt:
        raise InvalidArgument("text was to follow an empty prompt; give it at least one character")
    if length < 0 or not 0 <= temperature < float("inf"):
        raise InvalidArgument(
            f"{length} characters at temperature {temperature} were asked for; both must be ≥ 0, and finite"
        )
    return _drawn(trained, facts, facts.vocabulary.encode(prompt), length, temperature, generator)


def _drawn(
    trained: Restored,
    facts: TextFacts,
    prompt: Int[Tensor, " length"],
    length: int,
    temperature: float,
    generator: torch.Generator,
) -> Iterator[str]:
    device = next(iter(trained.params.values())).device
    seen = prompt[-facts.context :].to(device)
    for _ in range(length):
        with torch.no_grad():
            scores = trained.network(trained.average, seen[None], trained.average)[0, -1].double().cpu()
        if not bool(scores.isfinite().all()):
            raise InvalidArgument(
                "the network's scores of the next character hold NaN or infinity: its weights are damaged, or far too large. "
                "Train again."
            )
        if temperature == 0:
            drawn = scores.argmax()
        else:
            # the largest score is taken away first: divided by a small temperature, it would leave the range of numbers
            chances = ((scores - scores.max()) / temperature).softmax(-1)
            drawn = chances.multinomial(1, generator=generator).squeeze(0)
        seen = torch.cat((seen, drawn[None].to(device)))[-facts.context :]
        yield facts.vocabulary.decode(drawn[None])
