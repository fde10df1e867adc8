"""A share of the training data, set apart to be looked at while training, so that what is held out is left for the end."""

import torch
from jaxtyping import Int
from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.space import finite
from modula_agd.train.fingerprint import digest

NAME = "set-apart"
"""What an evaluation of that share is called."""


def count_apart(count: int, share: float, what: str) -> int:
    """How many of ``count`` are set apart.

    Args:
        count: of the training data.
        share: of them, above 0 and below 1.
        what: is counted.

    Raises:
        InvalidArgument: the share is none, or leaves one side nothing.
    """
    if not (finite(share) and 0 < share < 1):
        raise InvalidArgument(
            f"a share {share!r} of the training data was to be set apart; it must be above 0 and below 1"
        )
    apart = round(share * count)
    if not 0 < apart < count:
        raise InvalidArgument(
            f"a share of {share:g} of {count:,} {what} was to be set apart, which leaves {apart:,} to look at and {count - apart:,} to "
            "learn from. Choose another share, or more data."
        )
    return apart


def drawn_apart(count: int, share: float, what: str) -> tuple[Int[Tensor, " learned"], Int[Tensor, " apart"]]:
    """Which samples to learn from and which are set apart, drawn without regard to their order; the same for equal arguments."""
    apart = count_apart(count, share, what)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[apart:].sort().values, order[:apart].sort().values


def fingerprint_apart(whole: str | None, share: float) -> str | None:
    """Of data of which a share is set apart, from that of all."""
    return None if whole is None else digest([f"{whole} without {float(share)!r}"])
