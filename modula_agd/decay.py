"""Decay: what a weight loses of itself beside a step, so that norms cannot drift without end.

    W_k ← (1 − s_k)·W_k − x_k·p_k·m_k·t·ω_k·u_k

Two rules for s_k. ``Relative`` is in units of the declared norm: s_k = λ·x_k·p_k·m_k·t, so that each update is a mean of the weight and a
point of the ball of radius ω_k/λ, which norms do not leave once they are in it. That unit is a layer's own affair: kernels of a
convolutional network come to tens of their declared sizes where matrices of a deep MLP come to two, and one λ does not fit both
(docs/benchmarks.md). ``Fading`` has none: it lets a weight forget over a time that grows with the run,

    s_n = c/(n + 50),  so that at step n what step i did counts  Π_{i<j≤n} (1 − s_j) ≈ ((i + 50)/(n + 50))^c,

as in averages of weights and of steps (``averaging.py``, ``step_average.py``): of itself a run keeps about the last 1/(c + 1), however long
it is, and of the initial weights (50/n)^c. No weight loses more than it moves of one of declared size: where steps are short at first,
norms stay near their sizes.

Decay is no part of the majorant, which is of the loss along the step alone: what it costs counts in no descent, and what it moves in no
growth, as in decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101). Counted in, steps come to rest where what they give and
what decay takes are even, which trained worse and generalised worse (docs/benchmarks.md).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.space import finite
from modula_agd.state import Each

EARLY = 50
"""Steps that a run counts as having had before its first, or the first would take all that weights are initialised to."""


class Decay(ABC):
    """A rule for the share of itself that a weight loses with a step."""

    @abstractmethod
    def shares(self, lengths: Each, stretches: Each, steps: Int[Tensor, ""]) -> Each:
        """s_k ≥ 0 of each parameter, 0 of one that does not move; above 1, where an optimizer's multiplier is less, all of a weight.

        Args:
            lengths: p_k·m_k·t of each parameter, its relative step before it is stretched.
            stretches: x_k of each parameter.
            steps: n ≥ 1, this one counted.
        """


@dataclass(frozen=True)
class Relative(Decay):
    """Decay in units of the declared norm: a weight loses λ times what it moves of a weight of declared size.

    Its norm tends to at most size/λ, times sqrt(i) of rows into logits, which go so much further than a unit step.

    Args:
        rate: λ ≥ 0; 0 is no decay.

    Raises:
        InvalidArgument: the rate is negative or not finite.
    """

    rate: float

    def __post_init__(self) -> None:
        if not (finite(self.rate) and self.rate >= 0):
            raise InvalidArgument(f"a relative decay was given rate={self.rate!r}, which must be a finite number ≥ 0")

    def shares(self, lengths: Each, stretches: Each, steps: Int[Tensor, ""]) -> Each:
        return self.rate * lengths * stretches


@dataclass(frozen=True)
class Fading(Decay):
    """Decay without a unit: at step n, what step i did counts about (i/n)^c.

    For training from scratch: weights that were trained before fade like all that a run begins with.

    Args:
        power: c > 0; the default was chosen for five tasks at once, by losses in training and on a tenth of the training data that was
            held out of it (docs/benchmarks.md).
        most: λ > 0: no weight loses more than λ times what it moves of one of declared size, which binds while c/n is more.

    Raises:
        InvalidArgument: either is not a finite number above 0.
    """

    power: float = 0.75
    most: float = 1.0

    def __post_init__(self) -> None:
        for what in ("power", "most"):
            value = getattr(self, what)
            if not (finite(value) and value > 0):
                raise InvalidArgument(f"a fading decay was given {what}={value!r}, which must be a finite number > 0")

    def shares(self, lengths: Each, stretches: Each, steps: Int[Tensor, ""]) -> Each:
        return (self.most * lengths).clamp(max=self.power / (steps + EARLY))


def decay_of(given: object) -> Decay | None:
    """The rule that an option names: itself, or a number's relative decay; None of 0.

    Raises:
        InvalidArgument: it is neither, or a number that is no rate.
    """
    if isinstance(given, Decay):
        return None if given == Relative(0.0) else given
    if isinstance(given, type) and issubclass(given, Decay):
        raise InvalidArgument(
            f"agd was given decay={given.__name__}, a class. Pass an instance: decay={given.__name__}(...)."
        )
    if not (finite(given) and given >= 0):  # pyright: ignore[reportOperatorIssue]
        raise InvalidArgument(
            f"agd was given decay={given!r}, which must be a finite number ≥ 0, the relative decay λ, or a rule such as Fading()"
        )
    return Relative(float(given)) if given else None  # pyright: ignore[reportArgumentType]
