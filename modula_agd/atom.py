"""Atoms: the layers that have a weight. Fans are written ``Linear(fan_out, fan_in)``, so that widths meet across ``@``.

===========================  =====================================  =================================================
atom                         spaces                                 norm of the weight
===========================  =====================================  =================================================
``Linear(o, i)``             Features(i) → Features(o)              sqrt(i/o)·σ_max(W)
``Linear(Logits(o), i)``     Features(i) → Logits(o)                max over rows of sqrt(i)·‖W_row‖₂
``Conv2d(o, i, k)``          Image(i) → Image(o)                    k·max over taps of sqrt(i/o)·σ_max(W_tap)
``Embedding(d, n)``          Tokens(n) → Sequence(d)                max over rows of RMS(W_row)
``Bias(d)``                  any, onto itself                       RMS(b); max |b| on Logits
``Scale(d)``                 any, onto itself                       max |s|
===========================  =====================================  =================================================
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from modula_agd import bound as algebra
from modula_agd.bound import Bound, Gain, Number
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.layer import Atom
from modula_agd.norm import RMS, Norm, PerTap, RowNorm, Sign, Spectral
from modula_agd.space import Features, Image, Logits, Sequence, Space, Tokens, positive


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
    """

    fan_out: int | Space
    fan_in: int | Space

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.domain, Features | Sequence):
            raise SpaceMismatch(
                f"{self!r}: a Linear takes Features or Sequence, not {self.domain}. Flatten images first."
            )
        if not isinstance(self.codomain, Logits) and type(self.codomain) is not type(self.domain):
            raise SpaceMismatch(
                f"{self!r}: a Linear from {self.domain} gives {type(self.domain).__name__} or Logits, not {self.codomain}"
            )

    @property
    def domain(self) -> Space:
        return _features(self.fan_in)

    @property
    def codomain(self) -> Space:
        return type(self.domain)(_features(self.fan_out).width) if not isinstance(self.fan_out, Space) else self.fan_out  # pyright: ignore

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codomain.width, self.domain.width

    @property
    def norm(self) -> Norm:
        return RowNorm.into_logits(self.domain.width) if isinstance(self.codomain, Logits) else Spectral()

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        return functional.linear(x, weight)

    def __repr__(self) -> str:
        return f"Linear({self.fan_out}, {self.fan_in})"


@dataclass(frozen=True)
class Conv2d(Atom):
    """Cross-correlation with a kernel [o, i/groups, k_h, k_w], as ``torch.nn.Conv2d`` without bias, zero padding.

    The weight's norm counts sqrt(k_h·k_w) for the sum over taps, as incoherent taps and the AGD paper's code have it; in
    the worst case the taps add up to k_h·k_w (triangle inequality; attained where all taps are equal orthogonal matrices).

    Args:
        fan_out: number of channels out.
        fan_in: number of channels in.
        kernel: side, or (height, width).
        stride: pixels between outputs.
        padding: zeros added at each side.
        dilation: pixels between taps.
        groups: channel groups, each convolved on its own; divides both fans.
    """

    fan_out: int
    fan_in: int
    kernel: int | tuple[int, int] = 3
    stride: int = field(default=1, kw_only=True)
    padding: int = field(default=0, kw_only=True)
    dilation: int = field(default=1, kw_only=True)
    groups: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for what in ("fan_out", "fan_in", "stride", "dilation", "groups"):
            positive(f"{what} of a Conv2d", getattr(self, what))
        for side in self.sides:
            positive("a kernel side of a Conv2d", side)
        if not isinstance(self.padding, int) or self.padding < 0:
            raise InvalidArgument(f"{self!r}: padding must be an integer ≥ 0, but is {self.padding!r}")
        if self.fan_out % self.groups or self.fan_in % self.groups:
            raise InvalidArgument(
                f"{self!r}: {self.groups} groups must divide both {self.fan_out} and {self.fan_in} channels"
            )

    @property
    def sides(self) -> tuple[int, int]:
        """Kernel height and width."""
        if isinstance(self.kernel, tuple) and len(self.kernel) == 2:
            return self.kernel
        positive("the kernel of a Conv2d, where it is not a pair (height, width),", self.kernel)  # pyright: ignore
        return self.kernel, self.kernel  # pyright: ignore

    @property
    def domain(self) -> Space:
        return Image(self.fan_in)

    @property
    def codomain(self) -> Space:
        return Image(self.fan_out)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.fan_out, self.fan_in // self.groups, *self.sides

    @property
    def norm(self) -> Norm:
        return PerTap(Spectral(), gain=math.sqrt(math.prod(self.sides)), groups=self.groups)

    @property
    def gain(self) -> Gain:  # pyright: ignore[reportIncompatibleVariableOverride]
        taps = math.prod(self.sides)
        if taps == 1:
            return Gain.exact(1.0, "one tap: the operator norm itself")
        return Gain.of(
            math.sqrt(taps),
            1.0,
            source="triangle inequality over taps: k_h·k_w of them, sqrt(k_h·k_w) already in the norm",
            witness="all taps one orthogonal matrix, all pixels its leading input",
            mean_field="incoherent taps add in square, as in the AGD code (arXiv:2304.05187)",
        )

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        return functional.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def __repr__(self) -> str:
        given = {
            "stride": (self.stride, 1),
            "padding": (self.padding, 0),
            "dilation": (self.dilation, 1),
            "groups": (self.groups, 1),
        }
        extra = "".join(f", {name}={value}" for name, (value, default) in given.items() if value != default)
        return f"Conv2d({self.fan_out}, {self.fan_in}, {self.kernel}{extra})"


@dataclass(frozen=True)
class Embedding(Atom):
    """Token ids ↦ rows of a table [n, d].

    Args:
        width: d, features of each row.
        tokens: n, number of distinct tokens.
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
class _Diagonal(Atom):
    """Shared by the atoms that act on each feature, over whatever positions there are."""

    space: int | Space

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.domain, Features | Sequence | Image | Logits):
            raise SpaceMismatch(f"{self!r} acts on Features, Sequence, Image or Logits, not on {self.domain}")

    @property
    def domain(self) -> Space:
        return _features(self.space)

    @property
    def codomain(self) -> Space:
        return _features(self.space)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.domain.width,)

    def _aligned(self, weight: Tensor) -> Tensor:
        return weight[:, None, None] if isinstance(self.domain, Image) else weight

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.space})"


@dataclass(frozen=True, repr=False)
class Bias(_Diagonal):
    """x ↦ x + b, the same b at every position; starts at zero, steps as if of norm ``size``.

    The declared size is a choice of scale: a step moves b by t·size. At 1 a bias would count as much as the activations
    and double the declared magnitude of each layer; the default is a tenth.

    Args:
        space: the space it acts on, or a number of features.
    """

    size: float = field(default=0.1, kw_only=True)
    parameter: ClassVar[str] = "bias"

    @property
    def norm(self) -> Norm:
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
