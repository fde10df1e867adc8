"""Atoms: the layers that have a weight. Fans are written ``Linear(fan_out, fan_in)``, so that widths meet across ``@``.

===========================  =====================================  =================================================
atom                         spaces                                 norm of the weight
===========================  =====================================  =================================================
``Linear(o, i)``             Features(i) → Features(o)              sqrt(i/o)·σ_max(W)
``Linear(Logits(o), i)``     Features(i) → Logits(o)                max over rows of sqrt(i)·‖W_row‖₂
``Linear(Heads(h, d), …)``   Sequence(i) → Heads(h, d)              max over heads of sqrt(i/d)·σ_max(W_head)
``Embedding(d, n)``          Tokens(n) → Sequence(d)                max over rows of RMS(W_row)
``Unembedding(n, d)``        Sequence(d) → Logits(n)                max over rows of RMS(W_row)
``Bias(d)``                  any, onto itself                       RMS(b); max |b| on Logits; largest head on Heads
``Scale(d)``                 any, onto itself                       max |s|
===========================  =====================================  =================================================
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from modula_agd import bound as algebra
from modula_agd.bound import Bound, Number
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.layer import Atom
from modula_agd.norm import RMS, Norm, RowBlocks, RowNorm, Sign, Spectral
from modula_agd.run import Role
from modula_agd.space import Features, Heads, Image, Logits, Sequence, Space, Tokens, Volume, positive


def _features(space: int | Space) -> Space:
    if isinstance(space, Space):
        return space
    positive("a fan, where it is not a space,", space)
    return Features(int(space))


@dataclass(frozen=True)
class Linear(Atom):
    """x ↦ W x, without a bias (compose with ``Bias``).

    Args:
        fan_out: the codomain, or a number of features for one of the domain's kind.
        fan_in: the domain (``Features`` or ``Sequence``), or a number of features.

    Raises:
        SpaceMismatch: the domain is neither, or the codomain is of another kind and no ``Logits``, nor ``Heads`` of a ``Sequence``.
        InvalidArgument: a number is below 1.
    """

    fan_out: int | Space
    fan_in: int | Space

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.domain, Features | Sequence):
            raise SpaceMismatch(
                f"{self!r}: a Linear takes Features or Sequence, not {self.domain}. Flatten images first."
            )
        into_heads = isinstance(self.domain, Sequence) and isinstance(self.codomain, Heads)
        if not isinstance(self.codomain, Logits) and type(self.codomain) is not type(self.domain) and not into_heads:
            allowed = "a Sequence, Heads" if isinstance(self.domain, Sequence) else "Features"
            raise SpaceMismatch(f"{self!r}: a Linear from {self.domain} gives {allowed} or Logits, not {self.codomain}")

    @property
    def domain(self) -> Space:
        return _features(self.fan_in)

    @property
    def codomain(self) -> Space:
        return type(self.domain)(_features(self.fan_out).width) if not isinstance(self.fan_out, Space) else self.fan_out  # pyright: ignore

    @property
    def _heads(self) -> int:
        return self.codomain.heads if isinstance(self.codomain, Heads) else 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self._heads * self.codomain.width, self.domain.width

    @property
    def norm(self) -> Norm:
        if isinstance(self.codomain, Logits):
            return RowNorm.into_logits(self.domain.width)
        return RowBlocks(Spectral(), self._heads) if isinstance(self.codomain, Heads) else Spectral()

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        y = functional.linear(x, weight)
        return rearrange(y, "... t (h d) -> ... h t d", h=self._heads) if isinstance(self.codomain, Heads) else y

    def __repr__(self) -> str:
        return f"Linear({self.fan_out}, {self.fan_in})"


@dataclass(frozen=True)
class Embedding(Atom):
    """Token ids ↦ rows of a table [n, d].

    Args:
        width: d, features of each row.
        tokens: n, number of distinct tokens.

    Raises:
        InvalidArgument: a number is below 1.
    """

    width: int
    tokens: int

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("the width of an Embedding", self.width)
        positive("the number of tokens of an Embedding", self.tokens)

    @property
    def domain(self) -> Space:
        return Tokens(self.tokens)

    @property
    def codomain(self) -> Space:
        return Sequence(self.width)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tokens, self.width

    @property
    def norm(self) -> Norm:
        return RowNorm.of_embedding(self.width)

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        try:
            return functional.embedding(x.long(), weight)
        except IndexError as error:
            raise InvalidArgument(
                f"{self!r} was given a token id outside 0..{self.tokens - 1}. Check the vocabulary size."
            ) from error

    def __repr__(self) -> str:
        return f"Embedding({self.width}, {self.tokens})"


@dataclass(frozen=True)
class Unembedding(Atom):
    """Scores of tokens, ⟨row of the table, x⟩/d at each position: a head that can share an ``Embedding``'s table.

    Its weight is measured as the embedding's is, by the largest RMS of a row; dividing by d makes that the operator norm
    into the maximum over tokens. Tie the two by ``Shared("embedding", …)`` around each.

    Args:
        tokens: n, number of distinct tokens.
        width: d, features of the Sequence that it takes.

    Raises:
        InvalidArgument: a number is below 1.
    """

    tokens: int
    width: int

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("the number of tokens of an Unembedding", self.tokens)
        positive("the width of an Unembedding", self.width)

    @property
    def domain(self) -> Space:
        return Sequence(self.width)

    @property
    def codomain(self) -> Space:
        return Logits(self.tokens)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tokens, self.width

    @property
    def norm(self) -> Norm:
        return RowNorm.of_embedding(self.width)

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        return functional.linear(x, weight) / self.width

    def __repr__(self) -> str:
        return f"Unembedding({self.tokens}, {self.width})"


@dataclass(frozen=True)
class _Diagonal(Atom):
    """Shared by the atoms that act on each feature, over whatever positions there are."""

    space: int | Space

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.domain, Features | Sequence | Image | Volume | Heads | Logits):
            raise SpaceMismatch(
                f"{self!r} acts on Features, Sequence, Image, Volume, Heads or Logits, not on {self.domain}"
            )

    @property
    def domain(self) -> Space:
        return _features(self.space)

    @property
    def codomain(self) -> Space:
        return _features(self.space)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.domain.heads, self.domain.width) if isinstance(self.domain, Heads) else (self.domain.width,)

    @property
    def role(self) -> Role:
        return "vector"

    def _aligned(self, weight: Tensor) -> Tensor:
        if isinstance(self.domain, Heads):
            return rearrange(weight, "h d -> h 1 d")
        return weight.reshape(-1, *[1] * (-1 - self.domain.axis))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.space})"


@dataclass(frozen=True, repr=False)
class Bias(_Diagonal):
    """x ↦ x + b, the same b at every position; starts at zero, steps as if of norm ``size``.

    The declared size is a choice of scale: a step moves b by t·size. At 1 a bias would count as much as the activations
    and double the declared magnitude of each layer; the default is a tenth.

    Args:
        space: the space it acts on, or a number of features.

    Raises:
        SpaceMismatch: the space is of none of the kinds that have features.
    """

    size: float = field(default=0.1, kw_only=True)
    parameter: ClassVar[str] = "bias"

    @property
    def norm(self) -> Norm:
        if isinstance(self.domain, Heads):
            return RowNorm.of_embedding(self.domain.width)
        return Sign() if isinstance(self.domain, Logits) else RMS()

    @property
    def floor(self) -> float:
        return self.size

    def rule(self, x: Bound, size: Number, step: Number, gain: float) -> Bound:
        return algebra.bias(x, size, step, self.mass)

    def draw(self, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Zeros."""
        return torch.zeros(self.shape, device=device, dtype=dtype)

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        return x + self._aligned(weight)


@dataclass(frozen=True, repr=False)
class Scale(_Diagonal):
    """x ↦ s⊙x, the same s at every position; starts at ``size`` everywhere.

    Args:
        space: the space it acts on, or a number of features.

    Raises:
        SpaceMismatch: the space is of none of the kinds that have features.
    """

    parameter: ClassVar[str] = "scale"

    @property
    def norm(self) -> Norm:
        return Sign()

    def draw(self, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        """``size`` in every entry."""
        return torch.full(self.shape, self.size, device=device, dtype=dtype)

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        return x * self._aligned(weight)
