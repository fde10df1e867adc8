"""Positions: learned ones (an atom) and rotary ones (a bond)."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from einops import rearrange
from torch import Tensor

from modula_agd import bound as algebra
from modula_agd.bound import Bound, Gain, Number, source
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.layer import Atom, LinearBond
from modula_agd.module import mismatch
from modula_agd.norm import Norm, RowNorm
from modula_agd.space import Heads, Sequence, Space, Tokens, finite, positive


@dataclass(frozen=True)
class Positions(Atom):
    """Learned positions: whatever the input is, row t of a table [length, d] at time t.

    Add them to what they are the positions of: ``0.5 * Embedding(d, n) + 0.5 * Positions(d, length)`` on tokens,
    ``0.5 * Identity() + 0.5 * Positions(d, length)`` on a Sequence.

    Args:
        width: d, features of each row.
        length: the longest sequence.
        on: the domain, ``Tokens`` or ``Sequence``, once it is known.

    Raises:
        InvalidArgument: a number is below 1.
    """

    width: int
    length: int
    on: Space | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("the width of Positions", self.width)
        positive("the length of Positions", self.length)

    @property
    def domain(self) -> Space | None:
        return self.on

    @property
    def codomain(self) -> Space:
        return Sequence(self.width)

    def bind(self, domain: Space) -> Self:
        if self.on not in (None, domain) or not isinstance(domain, Tokens | Sequence):
            raise SpaceMismatch(mismatch(self, self.on or "Tokens or a Sequence", domain))
        return replace(self, on=domain)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.length, self.width

    @property
    def norm(self) -> Norm:
        return RowNorm.of_embedding(self.width)

    def rule(self, x: Bound, size: Number, step: Number, gain: float) -> Bound:
        # what comes in is not looked at
        return algebra.atom(source(), size, step, self.mass)

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        tokens = not x.is_floating_point()
        if x.ndim < (1 if tokens else 2):
            raise SpaceMismatch(f"{self!r} was given a tensor of shape {tuple(x.shape)}, which has no positions")
        time = x.shape[-1] if tokens else x.shape[-2]
        if time > self.length:
            raise InvalidArgument(
                f"{self!r} was given a sequence of {time}, but has {self.length} positions. Cut it, or build the network for "
                "longer ones."
            )
        return weight[:time].expand(*(x.shape if tokens else x.shape[:-1]), self.width)

    def __repr__(self) -> str:
        return f"Positions({self.width}, {self.length})"


@dataclass(frozen=True)
class Rotary(LinearBond):
    """Rotary positions on Heads (Su et al. 2021, arXiv:2104.09864): feature pairs (j, j + d/2) at time t turn by t·base^(−2j/d).

    A rotation at each position: no norm changes, and it is linear.

    Args:
        base: of the geometric sequence of angular speeds, > 1.

    Raises:
        InvalidArgument: it is not a finite number above 1.
    """

    base: float = 10000.0
    gain: ClassVar[Gain] = Gain.exact(1.0, "a rotation at each position", "any")

    def __post_init__(self) -> None:
        if not (finite(self.base) and self.base > 1):
            raise InvalidArgument(f"Rotary was given base={self.base!r}, which must be a finite number above 1")

    def codomain_of(self, domain: Space) -> Space:
        if not isinstance(domain, Heads) or domain.width % 2:
            raise SpaceMismatch(
                f"{self!r} turns pairs of features of Heads, so their number must be even, but the module before it gives {domain}"
            )
        return domain

    def domain_of(self, codomain: Space) -> Space | None:
        return codomain if isinstance(codomain, Heads) else None

    def forward(self, x: Any) -> Any:
        half = x.shape[-1] // 2
        # angles grow with time: in half precision distant positions would coincide
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        speeds = self.base ** -(torch.arange(half, device=x.device, dtype=wide) / half)
        angles = torch.arange(x.shape[-2], device=x.device, dtype=wide)[:, None] * speeds
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        left, right = rearrange(x, "... (pair d) -> pair ... d", pair=2)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    def __repr__(self) -> str:
        return "Rotary()" if self.base == 10000.0 else f"Rotary({self.base:g})"
