"""Dropout with an explicit source of randomness."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modula_agd.bound import Gain
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.layer import LinearBond, applied
from modula_agd.module import Module, Wrapper
from modula_agd.run import EVALUATION, Parameters, Run, Step
from modula_agd.space import Mask, Space, Tokens, finite


def probability(given: object, of: str) -> None:
    """Check a share of entries to drop.

    Raises:
        InvalidArgument: it is not at least 0 and below 1.
    """
    if not (finite(given) and 0 <= given < 1):  # pyright: ignore[reportOperatorIssue]
        raise InvalidArgument(f"{of} was given the probability {given!r}, which must be at least 0 and below 1")


def source(module: Module, run: Run) -> torch.Generator:
    """Where a training pass draws the masks of ``module`` from.

    Raises:
        InvalidArgument: it was given none.
    """
    if run.generator is None:
        raise InvalidArgument(
            f"{module!r} was trained without a source of randomness. Pass a torch.Generator on the batch's device: "
            "method.objective(params, inputs, targets, generator), network.run(params, inputs, generator=generator), "
            "model.generator = generator."
        )
    return run.generator


def dropped(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Each entry zeroed with probability ``share``, the others divided by what is left of 1."""
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= share
    return x * kept / (1 - share)


@dataclass(frozen=True)
class Dropout(LinearBond):
    """Each entry zeroed with probability p in training, the others divided by 1 − p; nothing in evaluation.

    Its bound is about one mask, the same before and after a step: then it is linear.

    Args:
        probability: p, 0 ≤ p < 1.

    Raises:
        InvalidArgument: it is not.
    """

    probability: float

    def __post_init__(self) -> None:
        probability(self.probability, "Dropout")

    @property
    def gain(self) -> Gain:
        kept = 1 - self.probability
        if kept == 1:
            return Gain.exact(1.0, "nothing is dropped", "any")
        return Gain.of(
            1 / kept,
            1 / math.sqrt(kept),
            source="what is kept is divided by 1 − p",
            witness="nothing dropped by chance",
            mean_field="a share 1 − p of the square is kept, divided by (1 − p)²",
        )

    def codomain_of(self, domain: Space) -> Space:
        if isinstance(domain, Tokens | Mask):
            raise SpaceMismatch(
                f"{self!r} drops numbers, but the module before it gives {domain}. Put it after the Embedding."
            )
        return super().codomain_of(domain)

    def domain_of(self, codomain: Space) -> Space | None:
        return codomain

    def forward(self, x: Any) -> Any:
        return x

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        if not run.training or self.probability == 0:
            return x
        generator = source(self, run)
        return applied(self, lambda: dropped(x, self.probability, generator), x)

    def __repr__(self) -> str:
        return f"Dropout({self.probability:g})"


@dataclass(frozen=True)
class WithDropout(Wrapper):
    """A module and dropout of what it gives, as one: parameters behind it have the names that they have without.

    Args:
        probability: p, 0 ≤ p < 1.
        inner: the module.

    Raises:
        InvalidArgument: p is not.
        SpaceMismatch: the module gives no numbers.
    """

    probability: float
    inner: Module

    def __post_init__(self) -> None:
        dropout = self._dropout
        if self.inner.codomain is not None:
            dropout.codomain_of(self.inner.codomain)

    @property
    def _dropout(self) -> Dropout:
        return Dropout(self.probability)

    @property
    def children(self) -> tuple[tuple[str, Module], ...]:
        return (("", self.inner),)

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        return self._dropout.apply(params, self.inner.apply(params, x, path, run), path, run)

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        return self._dropout.propagate(self.inner.propagate(x, step, path), step, path)

    def __repr__(self) -> str:
        return f"WithDropout({self.probability:g}, {self.inner!r})"
