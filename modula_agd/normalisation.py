"""Normalisation: layers that divide by a norm of their input.

``x / sqrt(‖x‖² + ε)`` has slope 1/sqrt(ε) at zero, where a small change of x turns it around. Away from zero its slope is
1/‖x‖. Each layer here says on which of three grounds its bound stands:

===================  ==============  =====================================================  ======================
ground               constant        growth for inputs of magnitude a                       grade
===================  ==============  =====================================================  ======================
neither of both      1/sqrt(ε)       1 + (a/sqrt(ε))·(γ − 1), with constants="proved"       proved, and very loose
``floor=f``          1/f             1 + (a/f)·(γ − 1), if ‖x‖ ≥ f before and after a step  assumed, and named
neither of both      1/a             γ: inputs are as large as declared                     typical, and named
===================  ==============  =====================================================  ======================

A certified alternative is ``UnitBall``, x/max(1, ‖x‖), which is 1-Lipschitz without any assumption.

=====================  ==========================================  ==================================================
layer                  norm that it divides by                     largest output, per position
=====================  ==========================================  ==================================================
``RMSNorm()``          RMS over features                           1
``LayerNorm()``        the same, after subtracting the mean        1
``GroupNorm(g)``       deviation over positions and each group     typically 1; sqrt(positions)
``BatchNorm()``        deviation over batch and positions          typically 1; sqrt(samples·positions − 1)
=====================  ==========================================  ==================================================

Affine parameters are modules of their own: ``Bias(d) @ Scale(d) @ LayerNorm()``.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from modula_agd import bound as algebra
from modula_agd.bound import Constant, Grade
from modula_agd.error import InvalidArgument, SpaceMismatch, UnknownBound
from modula_agd.layer import Bond, applied
from modula_agd.network import join
from modula_agd.run import EVALUATION, Parameters, Run, Step
from modula_agd.space import Features, Heads, Image, Sequence, Space, Volume, finite, positive

CURVED = 0.8587
"""sup over x and unit h of ε·‖D²φ(x)[h, h]‖ for φ(x) = x/sqrt(‖x‖² + ε), along x at ‖x‖² = ε/4; recomputed by the tests."""


@dataclass(frozen=True)
class Normalisation(Bond, ABC):
    """Shared: the three grounds of the bound.

    Args:
        floor: f > 0, the least norm that an input is assumed to have before and after every step.
        eps: ε > 0, added to the square of the norm.
    """

    floor: float | None = field(default=None, kw_only=True)
    eps: float = field(default=1e-6, kw_only=True)
    at_zero: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        for what in ("floor", "eps"):
            value = getattr(self, what)
            if not (finite(value) and value > 0) and not (value is None and what == "floor"):
                raise InvalidArgument(
                    f"{type(self).__name__} was given {what}={value!r}, which must be a finite number > 0"
                )

    @property
    @abstractmethod
    def spread(self) -> float:
        """The largest output in the worst case, and so how much a change may be concentrated."""

    @abstractmethod
    def divisors(self, x: Tensor) -> Tensor:
        """The norms that parts of a batch are divided by, ε left out: what a floor is a floor of. Any shape."""

    @property
    def gain(self) -> Constant:
        """The constant where inputs are not merely typical."""
        if self.floor is not None:
            return Constant(1 / self.floor, Grade.ASSUMED, f"every input has norm ≥ {self.floor:g} before and after")
        return Constant(1 / math.sqrt(self.eps), Grade.PROVED, "slope at zero, 1/sqrt(ε)", "a small input")

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        proved = step.constants == "proved"
        spread = self.spread if proved else 1.0
        what = f"inputs of {self!r}"
        if not proved and self.floor is None:
            bound = algebra.bond(x, 1 / x.magnitude, 1.0)
            return bound.assuming(f"{what}: typical, of the norm that is declared for them", Grade.TYPICAL)
        constant = self.gain
        limit = spread * algebra.smaller(1.0, constant.value * x.magnitude)
        return algebra.bond(x, spread * constant.value, limit, self.curvature).graded(constant, what)

    def codomain_of(self, domain: Space) -> Space:
        if not isinstance(domain, Features | Sequence | Image | Volume | Heads):
            raise SpaceMismatch(
                f"{self!r} normalises Features, a Sequence, an Image, a Volume or Heads, but the module before it gives {domain}"
            )
        return domain

    def domain_of(self, codomain: Space) -> Space | None:
        return codomain

    @property
    def _axis(self) -> int:
        return self.on.axis if self.on is not None else -1

    def _single(self, x: Tensor) -> bool:
        """Whether x is one sample without a batch dimension."""
        return self.on is not None and x.ndim == self.on.sample

    def _features_last(self, x: Tensor, function: Any) -> Tensor:
        axis = self._axis
        return function(x) if axis == -1 else function(x.movedim(axis, -1)).movedim(-1, axis)

    def __repr__(self) -> str:
        named = [part for part in fields(self) if part.name in ("momentum", "floor", "eps")]
        given = [f"{part.name}={value:g}" for part in named if (value := getattr(self, part.name)) != part.default]
        return f"{type(self).__name__}({', '.join([*self._own(), *given])})"

    def _own(self) -> list[str]:
        return []


@dataclass(frozen=True, repr=False)
class _PerPosition(Normalisation, ABC):
    """Shared by the layers that look at one position at a time: nothing is concentrated, and ε bounds the second order."""

    @property
    def spread(self) -> float:
        return 1.0

    @property
    def curvature(self) -> float | None:
        return CURVED / (2 * self.eps)


@dataclass(frozen=True, repr=False)
class RMSNorm(_PerPosition):
    """x/sqrt(RMS(x)² + ε) at each position (Zhang & Sennrich 2019, arXiv:1910.07467), without a scale.

    Args:
        floor: f > 0, the least norm that an input is assumed to have before and after every step.
        eps: ε > 0.
    """

    def divisors(self, x: Tensor) -> Tensor:
        return self._features_last(x, lambda y: y.square().mean(-1, keepdim=True).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return self._features_last(x, lambda y: functional.rms_norm(y, y.shape[-1:], eps=self.eps))


@dataclass(frozen=True, repr=False)
class LayerNorm(_PerPosition):
    """RMS norm of x − mean(x) at each position (Ba, Kiros & Hinton 2016, arXiv:1607.06450), without scale and bias.

    Subtracting the mean over features is a projection, which enlarges no change; the floor is one after the subtraction.

    Args:
        floor: f > 0, the least deviation over features that an input is assumed to have before and after every step.
        eps: ε > 0.
    """

    def divisors(self, x: Tensor) -> Tensor:
        return self._features_last(x, lambda y: y.std(-1, correction=0, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return self._features_last(x, lambda y: functional.layer_norm(y, y.shape[-1:], eps=self.eps))


@dataclass(frozen=True, repr=False)
class GroupNorm(Normalisation):
    """Each group of channels centred and divided by its deviation over all positions (Wu & He 2018, arXiv:1803.08494).

    One group is what ResNets call layer norm of a sample; as many groups as channels is instance norm.

    Args:
        groups: number of groups, which divides the channels.
        positions: pixels of the image that reaches it, which the proved constants need.
        floor: f > 0, the least deviation of any group that is assumed before and after every step.
        eps: ε > 0.

    Raises:
        InvalidArgument: a number is below 1, or floor or ε not a finite number above 0.
    """

    groups: int = 1
    positions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("the number of groups of a GroupNorm", self.groups)
        if self.positions is not None:
            positive("the number of positions of a GroupNorm", self.positions)

    @property
    def spread(self) -> float:
        return math.sqrt(_declared(self, "positions", self.positions, "pixels of the image that reaches it"))

    def codomain_of(self, domain: Space) -> Space:
        if not isinstance(domain, Image | Volume) or domain.width % self.groups:
            raise SpaceMismatch(
                f"{self!r} normalises {self.groups} equal groups of an Image's channels, but the module before it gives {domain}"
            )
        return domain

    def divisors(self, x: Tensor) -> Tensor:
        return rearrange(x, "b (g c) ... -> b g c ...", g=self.groups).flatten(2).std(-1, correction=0)

    def forward(self, x: Tensor) -> Tensor:
        return self._normalised(x[None])[0] if self._single(x) else self._normalised(x)

    def _normalised(self, x: Tensor) -> Tensor:
        return functional.group_norm(x, self.groups, eps=self.eps)

    def _own(self) -> list[str]:
        return [str(self.groups)] + ([f"positions={self.positions}"] if self.positions is not None else [])


@dataclass(frozen=True, repr=False)
class BatchNorm(Normalisation):
    """Each channel centred and divided by its deviation over batch and positions (Ioffe & Szegedy 2015, arXiv:1502.03167).

    It couples the samples of a batch: in training the objective is the expected loss of a minibatch, and the bound is of that
    map. In evaluation it is the affine map that the running statistics give; they are buffers, passed in and returned by
    ``network.run``.

    Args:
        count: the most samples times positions of a batch, which the proved constants need.
        momentum: share of the new batch in the running statistics, 0 to 1.
        floor: f > 0, the least deviation of any channel that is assumed before and after every step.
        eps: ε > 0.

    Raises:
        InvalidArgument: the count is below 2, the momentum not within 0 and 1, or floor or ε not a finite number above 0.
    """

    count: int | None = None
    momentum: float = field(default=0.1, kw_only=True)
    eps: float = field(default=1e-5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count is not None:
            positive("the count of a BatchNorm", self.count)
            if self.count == 1:
                raise InvalidArgument("BatchNorm was given count=1, but one sample of one position has no deviation")
        if not (finite(self.momentum) and 0 <= self.momentum <= 1):
            raise InvalidArgument(f"BatchNorm was given momentum={self.momentum!r}, which must lie between 0 and 1")

    @property
    def spread(self) -> float:
        # one entry of a centred vector of n numbers is at most sqrt(n − 1) times their RMS
        return math.sqrt(_declared(self, "count", self.count, "samples times positions of a batch") - 1)

    def codomain_of(self, domain: Space) -> Space:
        if not isinstance(domain, Features | Sequence | Image | Volume):
            raise SpaceMismatch(
                f"{self!r} normalises Features, a Sequence, an Image or a Volume, but the module before it gives {domain}"
            )
        return domain

    def buffers(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, path: str = ""
    ) -> dict[str, Tensor]:
        if self.on is None:
            raise UnknownBound(f"{self!r} has no settled space. Compose it with a typed module such as Conv2d.")
        # torch's names, for whoever reads a state_dict
        return {
            join(path, "running_mean"): torch.zeros(self.on.width, device=device, dtype=dtype),
            join(path, "running_var"): torch.ones(self.on.width, device=device, dtype=dtype),
        }

    def divisors(self, x: Tensor) -> Tensor:
        return x.movedim(self._axis, 0).flatten(1).std(-1, correction=0)

    def forward(self, x: Tensor) -> Tensor:
        return self._normalised(x)[0]

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs, and the batch's mean and unbiased variance of each channel."""
        axis = self._axis
        count = x.numel() // x.shape[axis]
        if count < 2:
            raise InvalidArgument(
                f"{self!r} was trained on a batch of {count} samples times positions, but a deviation takes two. Use larger batches."
            )
        outputs, mean, inverse = torch.native_batch_norm(
            x.movedim(axis, 1), None, None, None, None, True, self.momentum, self.eps
        )
        # of a constant channel, rounding leaves a little less than 0
        variance = (inverse.detach() ** -2 - self.eps).clamp(min=0) * (count / (count - 1))
        return outputs.movedim(1, axis), mean.detach(), variance

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        names = [join(path, "running_mean"), join(path, "running_var")]
        # of a shared layer, a second use counts its batch after the first's
        known = {
            name: value
            for name in names
            for value in [run.renewed.get(name, run.buffers.get(name))]
            if value is not None
        }
        for name, value in known.items():
            if len(known) < 2 or value.numel() != x.shape[self._axis]:
                raise InvalidArgument(
                    f"{self!r} keeps a mean and a variance of {x.shape[self._axis]} channels as {names}, but was given {name!r} "
                    f"of shape {tuple(value.shape)}. Pass all that network.buffers() or network.run returned."
                )
        if run.training:
            outputs, *batch = applied(self, lambda: self._normalised(x), x)
            start = known or self.buffers(x.device, batch[0].dtype, path)
            for name, new in zip(names, batch, strict=True):
                run.renewed[name] = start[name].lerp(new.to(start[name].dtype), self.momentum)
            return outputs
        if not known:
            raise InvalidArgument(
                f"{self!r} was evaluated without its running statistics {names}. Pass the buffers that network.run returned: "
                "network(params, inputs, buffers)."
            )
        return applied(self, lambda: self._evaluated(x, *known.values()), x, *known.values())

    def _evaluated(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        single = self._single(x)
        y = (x[None] if single else x).movedim(self._axis, 1)
        y = functional.batch_norm(y, mean, variance, eps=self.eps).movedim(1, self._axis)
        return y[0] if single else y

    def _own(self) -> list[str]:
        return [] if self.count is None else [str(self.count)]


def _declared(layer: Bond, name: str, value: int | None, what: str) -> int:
    if value is None:
        raise UnknownBound(
            f"the proved constants of {layer!r} need the number of {what}. Pass {type(layer).__name__}({name}=...), or use "
            'constants="typical".'
        )
    return value
