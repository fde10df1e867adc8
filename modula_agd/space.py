"""Typed spaces: what a module takes and gives, and how an activation is measured.

A space is a shape and a norm per sample: the root mean square (RMS) over features, the supremum over positions.

================  ============================  ===========================================
space             tensor                        norm per sample
================  ============================  ===========================================
``Features(d)``   [batch, d]                    RMS over d
``Sequence(d)``   [batch, time, d]              sup over time of RMS over d
``Image(c)``      [batch, c, h, w]              sup over (h, w) of RMS over c
``Volume(c)``     [batch, c, d, h, w]           sup over (d, h, w) of RMS over c
``Logits(n)``     [batch, (time,) n]            max over n (and sup over time)
``Heads(h, d)``   [batch, h, time, d]           sup over heads and time of RMS over d
``Tokens(n)``     integer ids, [batch, (time)]  1 (a one-hot vector); never perturbed
``Mask()``        booleans, [batch, time]       0; never perturbed
``Tuple(…)``      a tuple of activations        the largest of its parts
================  ============================  ===========================================
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Num
from torch import Tensor

from modula_agd.error import InvalidArgument, SpaceMismatch


def positive(what: str, value: int) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InvalidArgument(f"{what} must be an integer of at least 1, but is {value!r}")


def flag(what: str, value: bool) -> None:
    """Raise unless ``value`` is True or False, as any other word would silently count as True."""
    if not isinstance(value, bool):
        raise InvalidArgument(f"{what} must be True or False, but is {value!r}")


def finite(value: object) -> bool:
    """Whether ``value`` is a finite real number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def per_dimension(what: str, value: Any, dims: int, least: int = 1) -> tuple[int, ...]:
    """One integer of at least ``least`` per dimension of positions, where one number stands for all; or raise."""
    values = value if isinstance(value, tuple) else (value,) * dims
    fit = all(isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= least for x in values)
    if not fit or len(values) != dims:
        several = f", or a tuple of {dims} such" if dims > 1 else ""
        raise InvalidArgument(f"{what} must be an integer of at least {least}{several}, but is {value!r}")
    return tuple(int(x) for x in values)


def brief(thing: object, width: int = 120) -> str:
    """Its ``repr`` for an error's text, where a whole network would drown the facts: the ends of it."""
    text = repr(thing)
    return text if len(text) <= width else f"{text[: width * 2 // 3]} … {text[-width // 3 :]}"


class Space(ABC):
    """What an activation may be. Two spaces fit when they are equal."""

    shape: ClassVar[str]
    kind: ClassVar[type] = Tensor
    max_norm: ClassVar[bool] = False
    """Whether features are measured by their maximum rather than their root mean square."""
    axis: ClassVar[int] = -1
    """The dimension that counts features, from the end."""
    sample: ClassVar[int | None] = None
    """Dimensions of one sample, without the batch; None where samples may have several."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Features per position."""

    @abstractmethod
    def fits(self, x: Tensor) -> bool:
        """Whether the tensor's shape (and dtype, where that matters) is one of this space."""

    @abstractmethod
    def norm(self, x: Num[Tensor, "batch *shape"]) -> Num[Tensor, " batch"]:
        """‖x‖ of each sample."""

    @abstractmethod
    def dual(self, gradient: Num[Tensor, "batch *shape"]) -> Num[Tensor, " batch"]:
        """The dual norm of each sample's gradient: max of ⟨gradient, x⟩ over ‖x‖ ≤ 1."""

    def check(self, x: Tensor, taker: object) -> None:
        """See that ``x`` belongs here.

        Args:
            x: a batch.
            taker: what an error names as that which takes it.

        Raises:
            SpaceMismatch: it does not.
        """
        if not isinstance(x, self.kind) or not self.fits(x):
            raise SpaceMismatch(
                f"{brief(taker)} takes {self} = {self.shape}, but got {_described(x)}. "
                "Reshape the batch, or build the network for the shape that the data has."
            )


def _described(x: object) -> object:
    """What an error says of an activation: shape and dtype of a tensor, of each part of a tuple."""
    if isinstance(x, tuple):
        return f"({', '.join(str(_described(part)) for part in x)})"
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _rms(x: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(x, dim=dim) / math.sqrt(x.shape[dim])


@dataclass(frozen=True)
class _Wide(Space, ABC):
    """Shared by the spaces that are a number of features."""

    size: int

    def __post_init__(self) -> None:
        positive(f"the number of features of {type(self).__name__}", self.size)

    @property
    def width(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size})"


@dataclass(frozen=True, repr=False)
class Features(_Wide):
    """A vector of features; norm: RMS over features."""

    shape: ClassVar[str] = "[batch, features]"
    sample: ClassVar[int | None] = 1

    def fits(self, x: Tensor) -> bool:
        return x.is_floating_point() and x.ndim in (1, 2) and x.shape[-1] == self.size

    def norm(self, x: Num[Tensor, "batch d"]) -> Num[Tensor, " batch"]:
        return _rms(x, -1)

    def dual(self, gradient: Num[Tensor, "batch d"]) -> Num[Tensor, " batch"]:
        return _rms(gradient, -1) * gradient.shape[-1]


@dataclass(frozen=True, repr=False)
class Sequence(_Wide):
    """Features at each time; norm: supremum over time of RMS over features."""

    shape: ClassVar[str] = "[batch, time, features]"
    sample: ClassVar[int | None] = 2

    def fits(self, x: Tensor) -> bool:
        return x.is_floating_point() and x.ndim in (2, 3) and x.shape[-1] == self.size

    def norm(self, x: Num[Tensor, "batch time d"]) -> Num[Tensor, " batch"]:
        return _rms(x, -1).amax(-1)

    def dual(self, gradient: Num[Tensor, "batch time d"]) -> Num[Tensor, " batch"]:
        return _rms(gradient, -1).sum(-1) * gradient.shape[-1]


@dataclass(frozen=True, repr=False)
class _ChannelsFirst(_Wide, ABC):
    """Shared by the spaces with channels before the dimensions of positions, which ``axis`` counts."""

    def fits(self, x: Tensor) -> bool:
        dims = -self.axis
        return x.is_floating_point() and x.ndim in (dims, dims + 1) and x.shape[self.axis] == self.size

    def norm(self, x: Num[Tensor, "batch c *positions"]) -> Num[Tensor, " batch"]:
        return _rms(x, self.axis).amax(tuple(range(self.axis + 1, 0)))

    def dual(self, gradient: Num[Tensor, "batch c *positions"]) -> Num[Tensor, " batch"]:
        return _rms(gradient, self.axis).sum(tuple(range(self.axis + 1, 0))) * self.size


@dataclass(frozen=True, repr=False)
class Image(_ChannelsFirst):
    """Channels at each pixel; norm: supremum over pixels of RMS over channels."""

    shape: ClassVar[str] = "[batch, channels, height, width]"
    sample: ClassVar[int | None] = 3
    axis: ClassVar[int] = -3


@dataclass(frozen=True, repr=False)
class Volume(_ChannelsFirst):
    """Channels at each voxel; norm: supremum over voxels of RMS over channels."""

    shape: ClassVar[str] = "[batch, channels, depth, height, width]"
    sample: ClassVar[int | None] = 4
    axis: ClassVar[int] = -4


@dataclass(frozen=True, repr=False)
class Logits(_Wide):
    """Scores of n classes, possibly at each time; norm: maximum over classes (and time)."""

    shape: ClassVar[str] = "[batch, (time,) classes]"
    max_norm: ClassVar[bool] = True

    def fits(self, x: Tensor) -> bool:
        return x.is_floating_point() and x.ndim in (1, 2, 3) and x.shape[-1] == self.size

    def norm(self, x: Num[Tensor, "batch *time n"]) -> Num[Tensor, " batch"]:
        return x.abs().flatten(1).amax(-1)

    def dual(self, gradient: Num[Tensor, "batch *time n"]) -> Num[Tensor, " batch"]:
        return gradient.abs().flatten(1).sum(-1)


@dataclass(frozen=True, repr=False)
class Tokens(_Wide):
    """Integer ids below n, one-hot vectors in effect; norm 1, and no step ever perturbs them."""

    shape: ClassVar[str] = "integer ids [batch, (time)]"

    def fits(self, x: Tensor) -> bool:
        return x.ndim <= 2 and not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool

    def norm(self, x: Num[Tensor, "batch *time"]) -> Num[Tensor, " batch"]:
        return torch.ones(x.shape[0], device=x.device)

    def dual(self, gradient: Num[Tensor, "batch *time"]) -> Num[Tensor, " batch"]:
        raise SpaceMismatch("a gradient with respect to Tokens was asked for, but integer ids have none")


@dataclass(frozen=True)
class Heads(Space):
    """Features of each attention head at each time; norm: supremum over heads and time of RMS over a head's features.

    Args:
        heads: number of heads.
        size: features of each head.

    Raises:
        InvalidArgument: a number is below 1.
    """

    heads: int
    size: int
    shape: ClassVar[str] = "[batch, heads, time, features of a head]"
    sample: ClassVar[int | None] = 3

    def __post_init__(self) -> None:
        positive("the number of heads", self.heads)
        positive("the number of features of a head", self.size)

    @property
    def width(self) -> int:
        return self.size

    def fits(self, x: Tensor) -> bool:
        return x.is_floating_point() and x.ndim in (3, 4) and x.shape[-3] == self.heads and x.shape[-1] == self.size

    def norm(self, x: Num[Tensor, "batch heads time d"]) -> Num[Tensor, " batch"]:
        return _rms(x, -1).amax((-2, -1))

    def dual(self, gradient: Num[Tensor, "batch heads time d"]) -> Num[Tensor, " batch"]:
        return _rms(gradient, -1).sum((-2, -1)) * gradient.shape[-1]

    def __repr__(self) -> str:
        return f"Heads({self.heads}, {self.size})"


@dataclass(frozen=True)
class Mask(Space):
    """Which positions of a sequence are there (True) and which are padding; no step ever perturbs it."""

    shape: ClassVar[str] = "[batch, time] of booleans"

    @property
    def width(self) -> int:
        return 1

    def fits(self, x: Tensor) -> bool:
        return x.ndim in (1, 2) and x.dtype == torch.bool

    def norm(self, x: Num[Tensor, "batch time"]) -> Num[Tensor, " batch"]:
        return torch.zeros(x.shape[0], device=x.device)

    def dual(self, gradient: Num[Tensor, "batch time"]) -> Num[Tensor, " batch"]:
        raise SpaceMismatch("a gradient with respect to a Mask was asked for, but booleans have none")


@dataclass(frozen=True, repr=False)
class Tuple(Space):
    """Several activations side by side, each measured on its own; the norm is the largest."""

    parts: tuple[Space, ...]
    kind: ClassVar[type] = tuple

    @property
    def shape(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"a tuple of {', '.join(part.shape for part in self.parts)}"

    @property
    def width(self) -> int:
        return sum(part.width for part in self.parts)

    def fits(self, x: Tensor) -> bool:
        return (
            isinstance(x, tuple)
            and len(x) == len(self.parts)
            and all(isinstance(y, part.kind) and part.fits(y) for part, y in zip(self.parts, x, strict=True))
        )

    def norm(self, x: Num[Tensor, "batch *shape"]) -> Num[Tensor, " batch"]:
        return torch.stack([part.norm(y) for part, y in zip(self.parts, x, strict=True)]).amax(0)

    def dual(self, gradient: Num[Tensor, "batch *shape"]) -> Num[Tensor, " batch"]:
        return torch.stack([part.dual(g) for part, g in zip(self.parts, gradient, strict=True)]).sum(0)

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.parts))})"

    def __repr__(self) -> str:
        # code that builds it, which Python's own tuple is not
        return f"Tuple({self.parts!r})"


POSITIONED: dict[int, type[Space]] = {1: Sequence, 2: Image, 3: Volume}
"""The space of channels over so many dimensions of positions, for convolutions and pooling."""


def channels_first(function: Callable[[Tensor], Tensor], x: Tensor, dims: int) -> Tensor:
    """Apply a function that wants channels before positions; a sequence, alone, has them after."""
    if dims > 1:
        return function(x)
    return rearrange(function(rearrange(x, "... t c -> ... c t")), "... c t -> ... t c")
