"""Decay: what a weight loses of itself beside a step, so that norms cannot drift without end.

    W_k ← (1 − min(r·s_k, 1))·W_k − r·x_k·p_k·m_k·t·ω_k·u_k

with r the optimizer's multiplier, and rows into logits sqrt(i) times as far. Two rules for s_k. ``Relative`` is in units of the declared
norm: s_k = λ·x_k·p_k·m_k·t, so that each update is a mean of the weight and a point of the ball of radius ω_k/λ, which norms do not leave
once they are in it. That unit is a layer's own affair: kernels of a convolutional network come to tens of their declared sizes where
matrices of a deep MLP come to two, and one λ does not fit both (docs/trials.md). ``Fading`` has no unit: it lets a weight
forget over a time that grows with the run,

    s_n = c/(n + 50),  so that at step n what step i did counts  Π_{i<j≤n} (1 − s_j) ≈ ((i + 50)/(n + 50))^c,

as in averages of weights and of steps (``averaging.py``, ``step_average.py``): of itself a run keeps about the last 1/(c + 1), with
c = 1 the last half, however long it is, and of the initial weights (50/(n + 50))^c or more. No weight loses more than it moves of one of
declared size: where steps are short at first, norms stay near their sizes. (Of a multiplier r the power is r·c, so that one which comes
down ends the fading.) Of a weight of declared size ω_k < 1, where 1 is what keeps the size of activations, s_n is ω_k times that: it is
drawn small to grow, and with steps that are relative to ω_k it takes 1/ω_k as many to come to 1. (GPT-2 and nanoGPT draw weights so;
docs/trials.md.) Weights that make logits do not fade under cross-entropy: their length is how certain a classifier is, and training
wants that.

Decay is no part of the majorant, which is of the loss along the step alone: what it costs counts in no descent, and what it moves in no
growth, as in decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101). Counted in, steps come to rest where what they give and
what decay takes are even: of the same λ that is a milder decay, which cost MLPs more in training for what it gained held out, and a
convolutional network and a transformer less (docs/trials.md).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.run import Role
from modula_agd.space import finite
from modula_agd.state import Each

EARLY = 50
"""Steps that a run counts as having had before its first, or the first would take all that weights are initialised to."""


class Decay(ABC):
    """A rule for the share of itself that a weight loses with a step."""

    spares: ClassVar[frozenset[Role]] = frozenset()
    """Kinds of parameters that do not decay; what makes logits is of that kind under a loss in the max norm, cross-entropy, alone."""
    by_size: ClassVar[bool] = False
    """Whether s_k of a weight of declared size ω_k < 1 is ω_k times what ``shares`` says."""

    @abstractmethod
    def shares(self, lengths: Each, stretches: Each, steps: Int[Tensor, ""]) -> Each:
        """s_k ≥ 0 of each parameter; from 1 on, the optimizer's multiplier counted in, all of a weight. Pure: it changes no argument.

        What ``spares`` and ``by_size`` leave of it is counted afterwards.

        Args:
            lengths: p_k·m_k·t of each parameter, its relative step before it is stretched.
            stretches: x_k of each parameter.
            steps: n ≥ 1, this one counted, those left out not.
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
            raise InvalidArgument(
                f"a decay is a finite Python number λ ≥ 0, relative to declared sizes, or a rule such as Fading(), but is {self.rate!r}"
            )
        object.__setattr__(self, "rate", float(self.rate))

    def shares(self, lengths: Each, stretches: Each, steps: Int[Tensor, ""]) -> Each:
        return self.rate * lengths * stretches


@dataclass(frozen=True)
class Fading(Decay):
    """Decay without a unit: at step n, what step i did counts about (i/n)^c, and (i/n)^(c·ω) of a weight of declared size ω < 1.

    For training from scratch: weights that were trained before fade like all that a run begins with. Biases and gains do not fade. Nor
    does, under cross-entropy, the last layer, which makes logits: its length is how certain the network is. (One that is tied to an
    embedding does.)

    Args:
        power: c > 0; the default was chosen for five tasks at once, by losses in training and on a tenth of the training data that was
            held out of it (docs/trials.md).
        most: λ > 0: no weight loses more than λ times what it moves of one of declared size, which binds while c/(n + 50) is more.

    Raises:
        InvalidArgument: either is not a finite number above 0.
    """

    spares: ClassVar[frozenset[Role]] = frozenset(("vector", "logits"))
    by_size: ClassVar[bool] = True

    power: float = 1.0
    most: float = 1.0

    def __post_init__(self) -> None:
        for what in ("power", "most"):
            value = getattr(self, what)
            if not (finite(value) and value > 0):
                raise InvalidArgument(f"a fading decay was given {what}={value!r}, which must be a finite number > 0")
            object.__setattr__(self, what, float(value))

    def shares(self, lengths: Each, stretches: Each, steps: Int[Tensor, ""]) -> Each:
        return (self.most * lengths).clamp(max=self.power / (steps + EARLY))


def decay_of(given: object) -> Decay | None:
    """The rule that an option names: itself, or a number's relative decay; None of 0.

    Raises:
        InvalidArgument: it is neither, or a number that is no rate.
    """
    if isinstance(given, type) and issubclass(given, Decay):
        raise InvalidArgument(
            f"agd was given decay={given.__name__}, a class. Pass an instance: decay={given.__name__}(...)."
        )
    rule = given if isinstance(given, Decay) else Relative(given)  # pyright: ignore[reportArgumentType]
    return None if type(rule) is Relative and rule.rate == 0 else rule


def lost(
    rule: Decay,
    lengths: Each,
    stretches: Each,
    steps: Int[Tensor, ""],
    fades: Each,
    *,
    look: bool,
) -> Each:
    """s_k of each parameter by a rule, which may be a user's.

    Args:
        rule: what decides.
        lengths: as for ``Decay.shares``, as are the next two.
        stretches: x_k.
        steps: n.
        fades: the part of s_k that each parameter loses, ≥ 0.
        look: whether to ask for what is below 0 or NaN, which counts as 0 otherwise: asking a device would be a wait, and cut a graph.

    Raises:
        InvalidArgument: the rule returns something else.
    """
    shares = rule.shares(lengths, stretches, steps)
    if not isinstance(shares, Tensor) or shares.shape != lengths.shape:
        what = f"a tensor of shape {tuple(shares.shape)}" if isinstance(shares, Tensor) else repr(shares)
        raise InvalidArgument(
            f"the decay {rule!r} returned {what}, where the shares of {lengths.numel()} parameters belong. Make them of lengths, one each."
        )
    if look and not bool((shares >= 0).all()):
        raise InvalidArgument(f"the decay {rule!r} returned the shares {shares.tolist()}; each must be at least 0")
    counts = (fades > 0) & (shares > 0)
    return torch.where(counts, fades * shares.to(lengths.dtype), 0.0).clamp(max=torch.finfo(lengths.dtype).max)
