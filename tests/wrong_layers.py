"""Three layers, a loss and a norm whose claims are false, each in one number: what the verification must catch."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from modula_agd import Atom, Bond, Constant, Features, Frobenius, Gain, Grade, Loss, Norm, RowNorm
from modula_agd.norm import BlockNorm, Direction


@dataclass(frozen=True)
class OverconfidentReLU(Bond):
    """Claims Lipschitz constant 0.95; the truth is 1."""

    gain: ClassVar[Gain] = Gain.exact(0.95, "wishful thinking")
    at_zero: ClassVar[float] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x)


@dataclass(frozen=True)
class ForgetfulCosine(Bond):
    """Claims φ(0) = 0; the truth is 1."""

    gain: ClassVar[Gain] = Gain.exact(1.0, "|sin| ≤ 1")
    at_zero: ClassVar[float] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x.cos()


@dataclass(frozen=True)
class RowwiseLinear(Atom):
    """A Linear between RMS spaces whose norm is that of a map into the max norm, which is too small."""

    fan_out: int
    fan_in: int

    @property
    def domain(self) -> Features:
        return Features(self.fan_in)

    @property
    def codomain(self) -> Features:
        return Features(self.fan_out)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.fan_out, self.fan_in

    @property
    def norm(self) -> Norm:
        return RowNorm(1 / math.sqrt(self.fan_in))

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        return x @ weight.T


@dataclass(frozen=True)
class FlatSquareLoss(Loss):
    """The square loss with 97% of its curvature."""

    curvature: ClassVar[Constant] = Constant(0.97, Grade.PROVED, "a slip of the pen")
    max_norm: ClassVar[bool] = False

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean(-1) / 2


@dataclass(frozen=True)
class Overshooting(BlockNorm):
    """The Frobenius norm with directions that come out 2% too long, as an iteration that overshoots would make them."""

    def factor(self, shape: torch.Size) -> float:
        return Frobenius().factor(shape)

    def dims(self, shape: torch.Size) -> tuple[int, ...]:
        return Frobenius().dims(shape)

    def direction(self, gradient: Tensor) -> Direction:
        base, factor = super().direction(gradient)
        return Direction(base, 1.02 * factor)
