"""Pooling: averages and maxima over windows of positions, each channel by itself.

==================================  =================================  ==============================================
bond                                spaces                             Lipschitz constant
==================================  =================================  ==============================================
``AvgPool1d/2d/3d(k)``              Sequence, Image, Volume            1
``MaxPool1d/2d/3d(k)``              Sequence, Image, Volume            sqrt(min(window, channels)), typically 1
``AdaptiveAvgPool2d(h, w)``         Image                              1
``AdaptiveMaxPool2d(h, w)``         Image                              sqrt(channels), typically 1
==================================  =================================  ==============================================

In the supremum over positions of the RMS over channels a maximum is not 1-Lipschitz: the channels of one output may
come from different positions, each of RMS 1 through that one channel. The average over all positions is ``Mean``.
"""

import math
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from modula_agd.bound import Gain
from modula_agd.error import InvalidArgument, SpaceMismatch, UnknownBound
from modula_agd.layer import Bond, LinearBond
from modula_agd.space import POSITIONED, Space, channels_first, per_dimension, positive

Numbers = int | tuple[int, ...]
"""One number for every dimension of positions, or one for each."""

_AVERAGE: dict[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}
_MAXIMUM: dict[int, Callable[..., Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVERAGING = Gain.exact(1.0, "an average never exceeds the supremum over positions", "constant input")


def _maximising(sources: int, source: str) -> Gain:
    if sources == 1:
        return Gain.exact(1.0, "one position or one channel: nothing is combined", "constant input")
    return Gain.of(
        math.sqrt(sources),
        1.0,
        source=source,
        witness="each position of the window nonzero in channels of its own",
        mean_field="one position dominates",
    )


@dataclass(frozen=True, repr=False)
class _Pool(Bond, ABC):
    """Shared by all pooling: it keeps the channels and their kind of space."""

    dims: ClassVar[int]
    at_zero: ClassVar[float] = 0.0

    def codomain_of(self, domain: Space) -> Space:
        if not isinstance(domain, POSITIONED[self.dims]):
            kind = POSITIONED[self.dims].__name__
            raise SpaceMismatch(f"{self!r} pools the positions of {kind}(c), but the module before it gives {domain}")
        return domain

    def domain_of(self, codomain: Space) -> Space | None:
        return codomain


@dataclass(frozen=True, repr=False)
class _Windows(_Pool, ABC):
    """Shared by the pooling over windows of a given size."""

    kernel: Numbers
    stride: Numbers | None = None
    padding: Numbers = 0

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.stride is not None:
            per_dimension(f"the stride of {kind}", self.stride, self.dims)
        padding = per_dimension(f"the padding of {kind}", self.padding, self.dims, least=0)
        if any(2 * zeros > side for zeros, side in zip(padding, self.sides, strict=True)):
            raise InvalidArgument(
                f"{kind} was given padding={self.padding}; it lies between 0 and half the kernel, {self.kernel}"
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """The window's side along each dimension of positions."""
        return per_dimension(f"the kernel of {type(self).__name__}", self.kernel, self.dims)

    def _pooled(self, pool: Callable[..., Tensor], x: Tensor) -> Tensor:
        return channels_first(lambda x: pool(x, self.kernel, self.stride, self.padding), x, self.dims)

    def __repr__(self) -> str:
        stride = f", stride={self.stride}" if self.stride is not None else ""
        padding = f", padding={self.padding}" if self.padding else ""
        return f"{type(self).__name__}({self.kernel}{stride}{padding})"


@dataclass(frozen=True, repr=False)
class _Average(_Windows, LinearBond, ABC):
    """Shared by the averages over windows."""

    gain: ClassVar[Gain] = _AVERAGING

    def forward(self, x: Tensor) -> Tensor:
        return self._pooled(_AVERAGE[self.dims], x)


@dataclass(frozen=True, repr=False)
class AvgPool1d(_Average):
    """Average over windows of a Sequence.

    Args:
        kernel, stride, padding: as for ``AvgPool2d``, in steps of time.
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True, repr=False)
class AvgPool2d(_Average):
    """Average over windows of an Image.

    Args:
        kernel: side of the window in pixels, or (height, width), ≥ 1.
        stride: pixels between windows, ≥ 1; the window's side by default.
        padding: zeros at each side, counted in the average; at most half the window.

    Raises:
        InvalidArgument: a number out of its range.
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True, repr=False)
class AvgPool3d(_Average):
    """Average over windows of a Volume.

    Args:
        kernel, stride, padding: as for ``AvgPool2d``, in voxels.
    """

    dims: ClassVar[int] = 3


@dataclass(frozen=True, repr=False)
class _Maximum(_Windows, ABC):
    """Shared by the maxima over windows."""

    @property
    def gain(self) -> Gain:
        window = math.prod(self.sides)
        sources = window if self.on is None else min(window, self.on.width)
        return _maximising(sources, "min(window, channels) positions may each give a channel")

    def forward(self, x: Tensor) -> Tensor:
        return self._pooled(_MAXIMUM[self.dims], x)


@dataclass(frozen=True, repr=False)
class MaxPool1d(_Maximum):
    """Maximum over windows of a Sequence.

    Args:
        kernel, stride, padding: as for ``MaxPool2d``, in steps of time.
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True, repr=False)
class MaxPool2d(_Maximum):
    """Maximum over windows of an Image, each channel by itself.

    Args:
        kernel: side of the window in pixels, or (height, width), ≥ 1.
        stride: pixels between windows, ≥ 1; the window's side by default.
        padding: minus infinity at each side; at most half the window.

    Raises:
        InvalidArgument: a number out of its range.
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True, repr=False)
class MaxPool3d(_Maximum):
    """Maximum over windows of a Volume.

    Args:
        kernel, stride, padding: as for ``MaxPool2d``, in voxels.
    """

    dims: ClassVar[int] = 3


@dataclass(frozen=True, repr=False)
class _Adaptive(_Pool, ABC):
    """Shared by the pooling into a given number of windows, whatever the image's size."""

    height: int
    width: int
    dims: ClassVar[int] = 2

    def __post_init__(self) -> None:
        positive(f"the height of {type(self).__name__}", self.height)
        positive(f"the width of {type(self).__name__}", self.width)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.height}, {self.width})"


@dataclass(frozen=True, repr=False)
class AdaptiveAvgPool2d(_Adaptive, LinearBond):
    """Average over height × width windows that cover an Image of any size.

    Args:
        height: windows along the height, ≥ 1.
        width: windows along the width, ≥ 1.

    Raises:
        InvalidArgument: a number below 1.
    """

    gain: ClassVar[Gain] = _AVERAGING

    def forward(self, x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(x, (self.height, self.width))


@dataclass(frozen=True, repr=False)
class AdaptiveMaxPool2d(_Adaptive):
    """Maximum over height × width windows that cover an Image of any size; their size is not known beforehand.

    Args:
        height: windows along the height, ≥ 1.
        width: windows along the width, ≥ 1.

    Raises:
        InvalidArgument: a number below 1.
    """

    @property
    def gain(self) -> Gain:
        if self.on is None:
            raise UnknownBound(
                f"the Lipschitz constant of {self!r} is the root of its channels, but it has no domain yet. "
                "Compose it with a layer that gives an Image, or bind it to one."
            )
        return _maximising(self.on.width, "every channel may come from a position of its own")

    def forward(self, x: Tensor) -> Tensor:
        return functional.adaptive_max_pool2d(x, (self.height, self.width))
