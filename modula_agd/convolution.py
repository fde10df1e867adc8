"""Convolutions, ordinary and transposed, over one, two or three dimensions, each with a choice of weight norm.

=================================  ==========================  ======================================================
atom                               spaces                      norm of the weight, with n taps to an output position
=================================  ==========================  ======================================================
``Conv1d(o, i, k)``                Sequence(i) → Sequence(o)   taps: sqrt(n)·max over taps of sqrt(i/o)·σ_max(W_tap)
``Conv2d(o, i, k)``                Image(i) → Image(o)         patch: sqrt(i·n/o)·σ_max([W_tap₁ … W_tapₙ])
``Conv3d(o, i, k)``                Volume(i) → Volume(o)
``ConvTranspose1d/2d/3d(o, i, k)`` the same                    the same, for the taps that meet in one output position
=================================  ==========================  ======================================================

What each norm says of the gain, in the supremum over positions of the RMS over channels:

* ``geometry="taps"``, the AGD code's: the gain is at most sqrt(n) times the norm (triangle inequality; attained by
  equal orthogonal taps) and typically 1 times (incoherent taps add in square).
* ``geometry="patch"``: the gain is at most the norm. An output is the unfolded matrix times a patch, whose RMS is at
  most the supremum over its positions; where all taps are equal that is attained. It never exceeds the worst case of the
  other one, sqrt(n)·sqrt(n)·max over taps, since σ_max of n blocks side by side is at most sqrt(n) times their largest.
  White noise gains less: an initial kernel takes it to sqrt(o/(i·n)) of its size, where o ≤ i·n.

In the Euclidean norm over all channels and positions the patch's constant is another one: see ``euclidean_gain``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import product
from typing import ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from modula_agd.bound import Gain
from modula_agd.error import InvalidArgument
from modula_agd.kernel_norm import PerTap, Unfolded
from modula_agd.layer import Atom
from modula_agd.norm import Norm, Scalar, Spectral, wide
from modula_agd.polar import working_dtype
from modula_agd.space import POSITIONED, Space, channels_first, per_dimension, positive

Numbers = int | tuple[int, ...]
"""One number for every dimension of positions, or one for each."""

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


@dataclass(frozen=True, repr=False)
class _Convolution(Atom, ABC):
    """Shared by all convolutions: what they declare, and which of their taps meet."""

    fan_out: int
    fan_in: int
    kernel: Numbers = 3
    stride: Numbers = field(default=1, kw_only=True)
    padding: Numbers = field(default=0, kw_only=True)
    dilation: Numbers = field(default=1, kw_only=True)
    groups: int = field(default=1, kw_only=True)
    geometry: Literal["taps", "patch"] = field(default="taps", kw_only=True)
    dims: ClassVar[int]
    transposed: ClassVar[bool]

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = type(self).__name__
        for what in ("fan_out", "fan_in", "groups"):
            positive(f"{what} of a {kind}", getattr(self, what))
        for what, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            self._each(what, least)
        if self.fan_out % self.groups or self.fan_in % self.groups:
            raise InvalidArgument(
                f"{self!r}: {self.groups} groups must divide both {self.fan_out} and {self.fan_in} channels"
            )
        if self.geometry not in ("taps", "patch"):
            raise InvalidArgument(
                f"{self!r} was given geometry={self.geometry!r}. Take 'taps' (each tap a matrix of its own) or 'patch' "
                "(all taps that meet in one output side by side)."
            )

    def _each(self, what: str, least: int) -> tuple[int, ...]:
        return per_dimension(f"{what} of a {type(self).__name__}", getattr(self, what), self.dims, least)

    @property
    def sides(self) -> tuple[int, ...]:
        """The kernel's side along each dimension of positions."""
        return self._each("kernel", 1)

    @property
    def meeting(self) -> tuple[tuple[int, ...], ...]:
        """Taps, counted through the kernel row by row, by the positions of the finer grid that they share.

        Tap j joins q and p where q = stride·p + dilation·j − padding: with q (inputs of a convolution, outputs of a
        transposed one) the class of dilation·j modulo the stride is given.
        """
        classes = []
        for side, stride, dilation in zip(self.sides, self._each("stride", 1), self._each("dilation", 1), strict=True):
            found: dict[int, list[int]] = {}
            for tap in range(side):
                found.setdefault(dilation * tap % stride, []).append(tap)
            classes.append(found.values())
        strides = [math.prod(self.sides[dim + 1 :]) for dim in range(self.dims)]
        return tuple(
            tuple(sum(map(math.prod, zip(tap, strides, strict=True))) for tap in product(*choice))
            for choice in product(*classes)
        )

    @property
    @abstractmethod
    def patches(self) -> tuple[tuple[int, ...], ...]:
        """The taps that reach one output position, for each kind of position; empty where all taps reach every one."""

    @property
    def reach(self) -> int:
        """n, the largest number of taps that reach one output position."""
        return max(map(len, self.patches), default=math.prod(self.sides))

    @property
    def domain(self) -> Space:
        return POSITIONED[self.dims](self.fan_in)  # pyright: ignore[reportCallIssue]

    @property
    def codomain(self) -> Space:
        return POSITIONED[self.dims](self.fan_out)  # pyright: ignore[reportCallIssue]

    @property
    def shape(self) -> tuple[int, ...]:
        first, second = (self.fan_in, self.fan_out) if self.transposed else (self.fan_out, self.fan_in)
        return first, second // self.groups, *self.sides

    @property
    def norm(self) -> Norm:
        if self.geometry == "patch":
            return Unfolded(Spectral(), self.groups, self.transposed, self.patches)
        return PerTap(Spectral(), math.sqrt(self.reach), self.groups, self.transposed)

    @property
    def gain(self) -> Gain:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.reach == 1:
            return Gain.exact(1.0, "one tap: the operator norm itself", "any weight")
        if self.geometry == "patch":
            return Gain.exact(
                1.0,
                "the RMS of a patch is at most the supremum over its positions",
                "all taps equal, all pixels their leading input",
            )
        return Gain.of(
            math.sqrt(self.reach),
            1.0,
            source=f"triangle inequality over taps: n = {self.reach} of them, sqrt(n) already in the norm",
            witness="all taps one orthogonal matrix, all pixels its leading input",
            mean_field="incoherent taps add in square, as in the AGD code (arXiv:2304.05187)",
        )

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.kw_only and f.name not in ("mass", "size")}
        defaults = {f.name: f.default for f in fields(self)}
        extra = "".join(f", {name}={value!r}" for name, value in given.items() if value != defaults[name])
        return f"{type(self).__name__}({self.fan_out}, {self.fan_in}, {self.kernel}{extra})"


@dataclass(frozen=True, repr=False)
class _Ordinary(_Convolution, ABC):
    """Shared by the convolutions whose outputs are patches of the input times one matrix."""

    transposed: ClassVar[bool] = False

    @property
    def patches(self) -> tuple[tuple[int, ...], ...]:
        return ()

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        options = (self.stride, self.padding, self.dilation, self.groups)
        return channels_first(lambda x: _CONVOLVE[self.dims](x, weight, None, *options), x, self.dims)


@dataclass(frozen=True, repr=False)
class Conv1d(_Ordinary):
    """Cross-correlation over time, [batch, time, i] → [batch, time', o], with a kernel [o, i/groups, k].

    Args:
        fan_out, fan_in, kernel, stride, padding, dilation, groups, geometry: as for ``Conv2d``, in steps of time.
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True, repr=False)
class Conv2d(_Ordinary):
    """Cross-correlation with a kernel [o, i/groups, k_h, k_w], as ``torch.nn.Conv2d`` without bias, zero padding.

    y[p] = Σ_j W_j·x[stride·p + dilation·j − padding]; depthwise where ``groups == fan_in``.

    Args:
        fan_out: number of channels out.
        fan_in: number of channels in.
        kernel: side in pixels, or (height, width), ≥ 1.
        stride: pixels between outputs, ≥ 1; a number or one for each dimension, as the next two.
        padding: zeros added at each side, ≥ 0.
        dilation: pixels between taps, ≥ 1.
        groups: channel groups, each convolved on its own; divides both fans.
        geometry: what its weight norm measures: "taps" each tap by itself, "patch" all taps side by side. The first is
            the AGD code's, and typical of random images; the second is proved without any factor.

    Raises:
        InvalidArgument: a number out of its range, or groups that do not divide the channels.
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True, repr=False)
class Conv3d(_Ordinary):
    """Cross-correlation over volumes, with a kernel [o, i/groups, k_d, k_h, k_w].

    Args:
        fan_out, fan_in, kernel, stride, padding, dilation, groups, geometry: as for ``Conv2d``, in voxels.
    """

    dims: ClassVar[int] = 3


@dataclass(frozen=True, repr=False)
class _Transposed(_Convolution, ABC):
    """Shared by the transposed convolutions, in which an output position sees the taps of one class alone."""

    output_padding: Numbers = field(default=0, kw_only=True)
    transposed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        extra, strides, dilations = self._each("output_padding", 0), self._each("stride", 1), self._each("dilation", 1)
        if any(x >= max(s, d) for x, s, d in zip(extra, strides, dilations, strict=True)):
            raise InvalidArgument(
                f"{self!r}: output_padding {extra} must be below the stride {strides} or the dilation {dilations}"
            )

    @property
    def patches(self) -> tuple[tuple[int, ...], ...]:
        return self.meeting

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        options = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return channels_first(lambda x: _TRANSPOSE[self.dims](x, weight, None, *options), x, self.dims)


@dataclass(frozen=True, repr=False)
class ConvTranspose1d(_Transposed):
    """Transposed convolution over time, [batch, time, i] → [batch, time', o], with a kernel [i, o/groups, k].

    Args:
        fan_out, fan_in, kernel, stride, padding, output_padding, dilation, groups, geometry: as ``ConvTranspose2d``.
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True, repr=False)
class ConvTranspose2d(_Transposed):
    """The adjoint of a ``Conv2d``, with a kernel [i, o/groups, k_h, k_w], as ``torch.nn.ConvTranspose2d`` without bias.

    y[q] = Σ W_jᵀ·x[p] over the pairs with stride·p + dilation·j − padding = q. Only taps of one class of dilation·j
    modulo the stride meet in q: n is the size of the largest class, ceil(k/stride) per dimension at dilation 1.

    Args:
        fan_out: number of channels out.
        fan_in: number of channels in.
        kernel: side in pixels, or (height, width), ≥ 1.
        stride: output pixels between inputs, ≥ 1; a number or one for each dimension, as the next three.
        padding: pixels cut off each side of the output, ≥ 0.
        output_padding: pixels added to one side of the output, ≥ 0, smaller than the stride or the dilation.
        dilation: output pixels between taps, ≥ 1.
        groups: channel groups, each convolved on its own; divides both fans.
        geometry: what its weight norm measures: "taps" each tap by itself, "patch" the taps of each class side by side.

    Raises:
        InvalidArgument: a number out of its range, or groups that do not divide the channels.
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True, repr=False)
class ConvTranspose3d(_Transposed):
    """Transposed convolution over volumes, with a kernel [i, o/groups, k_d, k_h, k_w].

    Args:
        fan_out, fan_in, kernel, stride, padding, output_padding, dilation, groups, geometry: as ``ConvTranspose2d``.
    """

    dims: ClassVar[int] = 3


def euclidean_gain(conv: _Convolution, weight: Float[Tensor, "a b *kernel"]) -> Scalar:
    """A bound of ‖conv(x)‖₂/‖x‖₂ over all channels and positions together: sqrt(m)·σ_max of the unfolded kernel.

    Each input position lies in at most m patches, so that Σ ‖patch‖₂² ≤ m·‖x‖₂². m is the size of the largest class of
    dilation·j modulo the stride: sqrt(m) = ceil(k/stride) for a square kernel without dilation. Attained where patches
    do not overlap; approached on large images where all taps are equal. The weight norms of this library are for the
    supremum over positions instead, in which no position is counted twice: its factor is sqrt(k_h·k_w·i/o).

    Args:
        conv: any convolution; a transposed one has the gain of the convolution that it is the adjoint of.
        weight: its kernel, any units.

    Returns:
        The bound in the weight's units, by an exact singular value.

    Raises:
        InvalidArgument: a kernel of another shape than the convolution's.

    Source: Singla & Feizi 2021, *Fantastic Four* (arXiv:1911.10258), for stride 1; other strides as above.
    """
    if tuple(weight.shape) != conv.shape:
        raise InvalidArgument(
            f"{conv!r} has a kernel of shape {conv.shape}, but was given one of {tuple(weight.shape)}"
        )
    unfolded = rearrange(weight.flatten(1).to(working_dtype(weight.dtype)), "(g a) b -> g a b", g=conv.groups)
    overlap = max(map(len, conv.meeting))
    return math.sqrt(overlap) * wide(torch.linalg.matrix_norm(unfolded, ord=2)).amax()
