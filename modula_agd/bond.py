"""Bonds: the layers that have no weight, each known by a Lipschitz constant with its source.

Elementwise nonlinearities are a table of facts with one theorem over it: if |φ(x) − φ(y)| ≤ c·|x − y| for numbers, then
the same holds for vectors in every norm of this library. Mean-field values are sqrt(E (φ(z) − φ(0))²) for
z ~ N(0, 1): how far from φ(0) a typical RMS-1 input comes out.
"""

import math
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from modula_agd import bound as algebra
from modula_agd.bound import Bound, Gain
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.layer import Bond, LinearBond
from modula_agd.module import parts_of
from modula_agd.space import Features, Image, Logits, Sequence, Space, Tuple, Volume, finite, positive


@dataclass(frozen=True)
class Fact:
    """What is known of a function of one number.

    Args:
        name: how it is printed.
        function: applied elementwise.
        gain: its Lipschitz constant; the witness is a pair (x, y) with |φ(x) − φ(y)| = c·|x − y|, or nearly.
        at_zero: |φ(0)|.
        limit: sup |φ|.
        second: sup |φ″| where φ is twice differentiable; 0 for a linear function; None where it has a kink.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    gain: Gain
    at_zero: float = 0.0
    limit: float = math.inf
    second: float | None = None


def _fact(
    name: str, function: Callable[[Tensor], Tensor], c: float, near: tuple[float, float], typical: float, **rest: Any
) -> Fact:
    gain = Gain.of(
        c, typical, f"sup |φ′|, attained at {near[0]:g}", near, "mean field: RMS of φ(z) − φ(0), z ~ N(0, 1)"
    )
    return Fact(name, function, gain, **rest)


FACTS = {
    fact.name: fact
    for fact in (
        _fact("ReLU", functional.relu, 1.0, (0.0, 1.0), math.sqrt(0.5)),
        _fact("Abs", torch.abs, 1.0, (0.0, 1.0), 1.0),
        # the slope of x·Φ(x) is largest where its second derivative vanishes, at sqrt(2)
        _fact("GELU", functional.gelu, 1.1289041452, (1.414, 1.4144), 0.6520900878, second=0.7978845609),
        _fact("SiLU", functional.silu, 1.0998393202, (2.399, 2.3996), 0.5964692112, second=0.5),
        _fact("Tanh", torch.tanh, 1.0, (0.0, 1e-4), 0.6279287304, limit=1.0, second=0.7698003590),
        _fact("Sigmoid", torch.sigmoid, 0.25, (-1e-4, 1e-4), 0.2082763449, at_zero=0.5, limit=1.0, second=0.0962250449),
    )
}
"""The table. Values are rounded up in the last digit; tests recompute each by search and by quadrature."""


@dataclass(frozen=True)
class Elementwise(Bond):
    """A function of one number, applied to every entry.

    Args:
        fact: what is known of it.
    """

    fact: Fact

    @property
    def gain(self) -> Gain:
        return self.fact.gain

    @property
    def at_zero(self) -> float:
        return self.fact.at_zero

    @property
    def limit(self) -> float:
        return self.fact.limit

    @property
    def curvature(self) -> float | None:
        if self.fact.second is None:
            return None
        if self.fact.second == 0:
            return 0.0
        if self.on is None:
            return None
        # ‖Δ²‖_RMS ≤ sqrt(d)·‖Δ‖²_RMS, attained by one nonzero entry; in the max norm ‖Δ²‖ = ‖Δ‖²
        spread = 1.0 if self.on.max_norm else math.sqrt(self.on.width)
        return spread * self.fact.second / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.fact.function(x)

    def __repr__(self) -> str:
        return f"{self.fact.name}()"


@dataclass(frozen=True)
class _Leaky:
    """Leaky ReLU as a value: equal slopes compare equal, which a lambda would not."""

    slope: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.leaky_relu(x, self.slope)


def ReLU() -> Elementwise:
    """max(x, 0)."""
    return Elementwise(FACTS["ReLU"])


def LeakyReLU(slope: float = 0.01) -> Elementwise:
    """x for x ≥ 0, slope·x below.

    Raises:
        InvalidArgument: the slope is not a finite number.
    """
    if not finite(slope):
        raise InvalidArgument(f"LeakyReLU was given slope={slope!r}, which must be a finite number")
    steeper = max(1.0, abs(slope))
    near = (0.0, 1.0) if steeper == 1 else (-1.0, 0.0)
    return Elementwise(_fact(f"LeakyReLU[{slope:g}]", _Leaky(slope), steeper, near, math.sqrt((1 + slope**2) / 2)))


def GELU() -> Elementwise:
    """x·Φ(x), the exact form."""
    return Elementwise(FACTS["GELU"])


def SiLU() -> Elementwise:
    """x·sigmoid(x)."""
    return Elementwise(FACTS["SiLU"])


def Tanh() -> Elementwise:
    """tanh(x)."""
    return Elementwise(FACTS["Tanh"])


def Sigmoid() -> Elementwise:
    """1/(1 + exp(−x))."""
    return Elementwise(FACTS["Sigmoid"])


def Abs() -> Elementwise:
    """|x|."""
    return Elementwise(FACTS["Abs"])


@dataclass(frozen=True)
class _Linear(LinearBond, ABC):
    """Shared by the bonds that are linear and do not enlarge the norm."""

    gain: ClassVar[Gain] = Gain.exact(
        1.0, "an average or a rearrangement never exceeds the supremum over positions", "constant input"
    )


@dataclass(frozen=True)
class Identity(_Linear):
    """x."""

    def forward(self, x: Any) -> Any:
        return x

    def __repr__(self) -> str:
        return "Identity()"


@dataclass(frozen=True)
class Flatten(_Linear):
    """Image(c) of known size → Features(c·height·width); RMS over all is at most the supremum of RMS over channels.

    Args:
        height: pixels.
        width: pixels.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        positive("the height of a Flatten", self.height)
        positive("the width of a Flatten", self.width)

    def codomain_of(self, domain: Space) -> Space:
        if not isinstance(domain, Image):
            raise SpaceMismatch(f"{self!r} takes an Image, but the module before it gives {domain}. Drop the Flatten.")
        return Features(domain.width * self.height * self.width)

    def domain_of(self, codomain: Space) -> Space | None:
        channels, rest = divmod(codomain.width, self.height * self.width)
        return Image(channels) if isinstance(codomain, Features) and rest == 0 and channels > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.height, self.width):
            raise SpaceMismatch(
                f"{self!r} was given images of {x.shape[-2]}×{x.shape[-1]} pixels. Build it for the size that reaches it."
            )
        return rearrange(x, "... c h w -> ... (c h w)")

    def __repr__(self) -> str:
        return f"Flatten({self.height}, {self.width})"


@dataclass(frozen=True)
class ToSequence(_Linear):
    """Image(c) → Sequence(c): the pixels row by row, each a position with its channels as features."""

    def codomain_of(self, domain: Space) -> Space:
        if not isinstance(domain, Image):
            raise SpaceMismatch(f"{self!r} takes an Image, but the module before it gives {domain}")
        return Sequence(domain.width)

    def domain_of(self, codomain: Space) -> Space | None:
        return Image(codomain.width) if isinstance(codomain, Sequence) else None

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "... c h w -> ... (h w) c")

    def __repr__(self) -> str:
        return "ToSequence()"


@dataclass(frozen=True)
class Softmax(Bond):
    """softmax over n scores, to n probabilities in the maximum norm.

    A change of scores by ε moves them by at most tanh(ε/2) each, 2·tanh(ε/2) together.
    """

    gain: ClassVar[Gain] = Gain.exact(0.5, "|Δp| ≤ tanh(ε/2) ≤ ε/2 for each", "two equal scores, moved apart")
    limit: ClassVar[float] = 1.0  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def at_zero(self) -> float:
        return 1.0 if self.on is None else 1 / self.on.width

    @property
    def curvature(self) -> float | None:
        # half of the l1 remainder of bound.attention, as the changes of probabilities sum to 0
        return 1 / (3 * math.sqrt(3))

    def codomain_of(self, domain: Space) -> Space:
        if not isinstance(domain, Logits):
            raise SpaceMismatch(f"{self!r} takes scores in Logits(n), but the module before it gives {domain}")
        return domain

    def domain_of(self, codomain: Space) -> Space | None:
        return codomain if isinstance(codomain, Logits) else None

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    def __repr__(self) -> str:
        return "Softmax()"


@dataclass(frozen=True)
class Mean(_Linear):
    """Average over positions: Sequence(c), Image(c) or Volume(c) → Features(c)."""

    def codomain_of(self, domain: Space) -> Space:
        if not isinstance(domain, Sequence | Image | Volume):
            raise SpaceMismatch(
                f"{self!r} averages over the positions of a Sequence, an Image or a Volume, but {domain} has none"
            )
        return Features(domain.width)

    def forward(self, x: Tensor) -> Tensor:
        # without a domain (never in a typed chain) the number of dimensions cannot tell an image from a sequence
        first = -1 if self.on is None else self.on.axis
        return x.mean(-2) if first == -1 else x.mean(tuple(range(first + 1, 0)))

    def __repr__(self) -> str:
        return "Mean()"


@dataclass(frozen=True)
class UnitBall(Bond):
    """x/max(1, ‖x‖) with the norm over features at each position: the projection to the unit ball.

    1-Lipschitz because RMS is a Euclidean norm; in the max norm the constant would be 2, so Logits are refused.
    """

    gain: ClassVar[Gain] = Gain.exact(1.0, "projection to a convex set in a Euclidean norm", "points inside the ball")
    at_zero: ClassVar[float] = 0.0
    limit: ClassVar[float] = 1.0  # pyright: ignore[reportIncompatibleMethodOverride]

    def codomain_of(self, domain: Space) -> Space:
        if domain.max_norm or isinstance(domain, Tuple):
            raise SpaceMismatch(
                f"{self!r} projects in the RMS norm and does not act on {domain}, which has another norm"
            )
        return domain

    def domain_of(self, codomain: Space) -> Space | None:
        return codomain

    def forward(self, x: Tensor) -> Tensor:
        dim = -1 if self.on is None else self.on.axis
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True) / math.sqrt(x.shape[dim])
        return x / norm.clamp(min=1.0)

    def __repr__(self) -> str:
        return "UnitBall()"


@dataclass(frozen=True)
class Multiply(Bond):
    """Elementwise product of a pair of branches, as in ``Multiply() @ (a, b)``.

    Its bound is not a Lipschitz constant times an input: magnitudes multiply, and so do growths.
    """

    at_zero: ClassVar[float] = 0.0

    @property
    def gain(self) -> Gain:
        if isinstance(self.on, Tuple) and any(part.max_norm for part in self.on.parts):
            return Gain.exact(1.0, "one factor is bounded in the max norm")
        width = 1 if self.on is None else self.on.width // 2
        return Gain.of(
            math.sqrt(width),
            1.0,
            source="RMS(xy) ≤ max|x|·RMS(y) ≤ sqrt(d)·RMS(x)·RMS(y)",
            witness="both factors in one and the same feature",
            mean_field="independent factors",
        )

    def codomain_of(self, domain: Space) -> Space:
        parts = domain.parts if isinstance(domain, Tuple) else ()
        kinds = {type(part) for part in parts}
        # scores may multiply features; an image and a vector of one width would broadcast over the wrong dimensions
        alike = len(kinds) == 1 or kinds in ({Features, Logits}, {Sequence, Logits})
        if len(parts) != 2 or len({part.width for part in parts}) != 1 or not alike:
            raise SpaceMismatch(f"{self!r} multiplies a pair of branches of one kind and width, but was given {domain}")
        return next((part for part in parts if not part.max_norm), parts[0])

    def rule(self, x: Any, gain: float) -> Bound:
        left, right = parts_of(self, x, 2)
        return algebra.product(left, right, gain)

    def forward(self, x: Any) -> Tensor:
        left, right = parts_of(self, x, 2)
        return left * right

    def __repr__(self) -> str:
        return "Multiply()"
