"""The majorant of the loss as a function of the step, and its minimisers.

Let every atom move by ΔW_k = −t·m_k·ω_k·u_k along its unit dual direction u_k (times its portion p_k where balance is measured, and
so in S). With S = Σ_k m_k·ω_k·⟨g_k, u_k⟩,

    L(w + Δw) ≤ L(w) − t·S + R·a·κ(t) + B(a·(γ(t) − 1))

where a, γ, κ are the network's bound (``bound.py``), B the loss's (``loss.py``) and R the mean dual norm of the loss's
gradient in the outputs. A *search* picks t; there are three:

``ClosedForm``   drops the R term (assuming that the model's own curvature is orthogonal to the loss gradient: Assumption
                 1 of Bernstein et al. 2023, arXiv:2304.05187) and replaces γ by exp(η), η = D̄·t. With G = S/D̄:
                 η = log((1 + sqrt(1 + 4G/a²))/2), the AGD paper's Theorem 2.
``ExactGrowth``  drops the R term, keeps γ. Its guaranteed decrease is never smaller, and for residual networks it is
                 larger by orders of magnitude.
``Certified``    keeps everything. On a full batch every step descends: a theorem, not a habit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from modula_agd.bound import Bound, Number
from modula_agd.device import precise
from modula_agd.error import InvalidArgument, UnknownBound
from modula_agd.space import finite

Scalar = Float[Tensor, ""]


class Evidence(NamedTuple):
    """What a certified step must know of the batch besides the gradient.

    Args:
        residual: R, mean over samples of ‖∂ℓ/∂f‖_dual in the codomain, ≥ 0.
        magnitude: a₀, the largest ‖input‖ of the batch.
    """

    residual: Scalar
    magnitude: Scalar


@dataclass(frozen=True)
class Majorant:
    """The right-hand side above, minus L(w).

    Args:
        t: the relative steps at which the bound was evaluated, [points]; t[0] = 0.
        bound: the network's bound at those steps.
        divergence: B(a·(γ − 1)) at those steps, as ``divergence_bound`` has it, [points].
        curvature: h with B(δ) ≤ h·δ²/2, in the codomain's norm.
        descent: S ≥ 0, 0-d.
        residual: R ≥ 0, 0-d; None drops the term.
    """

    t: Float[Tensor, " points"]
    bound: Bound
    divergence: Float[Tensor, " points"]
    curvature: Number
    descent: Scalar
    residual: Scalar | None = None

    def taken(self) -> Float[Tensor, " points"]:
        """R·a·κ(t) + B(a·(γ(t) − 1)) at each t, what is taken back of the descent; infinite where it overflows."""
        a, error = self.bound.magnitude, self.bound.error
        if self.residual is None:
            return self.divergence
        if error is None:
            raise UnknownBound(
                "a majorant with a residual needs the network's second-order error, which is not bounded"
            )
        return _infinite(self.residual * a * error + self.divergence)

    def values(self) -> Float[Tensor, " points"]:
        """The majorant at each t; infinite where the growth overflows."""
        return _infinite(self.taken() - self.t * self.descent)

    def at(self, t: Scalar) -> Scalar:
        """The majorant at any t ≥ 0, by the chord between its neighbours among the points: of a convex function never too little.

        Before the first point above 0 what it takes back rises like t²; beyond the last point the last chord goes on, which lies below.
        """
        if self.t.numel() < 2:
            raise InvalidArgument("a majorant was asked for its value between points, but was evaluated at one alone")
        taken = self.taken()
        left = ((self.t <= t).sum() - 1).clamp(0, self.t.numel() - 2)
        (start, low), (stop, high) = ([x.gather(0, at[None])[0] for x in (self.t, taken)] for at in (left, left + 1))
        share = (t - start) / (stop - start)
        share = torch.where(left == 0, share * share, share)
        # 0 times an overflow is NaN, as is the difference of two
        between = torch.where((low.isinf() | high.isinf()) & (share > 0), torch.inf, low + share * (high - low))
        return torch.where(share > 0, between, low) - t * self.descent

    def curved(self, factor: Scalar) -> "Majorant":
        """The same with a loss bound ``factor`` times as curved."""
        return replace(self, divergence=factor * self.divergence, curvature=factor * self.curvature)


def divergence_bound(bound: Bound, loss_bound: Callable[[Number], Number]) -> Float[Tensor, " points"]:
    """B(a·(γ(t) − 1)): what the divergence of a loss comes to at most where outputs change by as much as the growth allows.

    Args:
        bound: the network's, at many steps.
        loss_bound: B as a function of δ in the codomain's norm.
    """
    return _infinite(torch.as_tensor(loss_bound(bound.magnitude * (bound.growth - 1))))


def _infinite(x: Tensor) -> Tensor:
    """x, infinite where it overflows; one operation, where ``isfinite`` alone is four."""
    return torch.nan_to_num(x, nan=torch.inf, posinf=torch.inf, neginf=torch.inf)


class Minimum(NamedTuple):
    """A chosen step.

    Args:
        t: relative step of an atom of mass 1, 0-d, ≥ 0.
        change: the majorant at t, or at the grid's nearest point to it, ≤ 0: what the loss is predicted to change by, at most.
    """

    t: Scalar
    change: Scalar


def closed_form(gradient: Scalar, magnitude: Number, curvature: Number = 1.0, residual: Number = 0.0) -> Scalar:
    """The η ≥ 0 that minimises −G·η + R·a·(e^η − 1 − η) + (h/2)·a²·(e^η − 1)².

    η = log((1 − ρ + sqrt((1 + ρ)² + 4G/(h·a²)))/2) with ρ = R/(h·a); at R = 0, h = 1 the AGD paper's Theorem 2.

    Args:
        gradient: G = S/D̄ ≥ 0, in units of the loss.
        magnitude: a, the output magnitude.
        curvature: h of the loss.
        residual: R ≥ 0.
    """
    rho = residual / (curvature * magnitude)
    share = gradient / (curvature * magnitude * magnitude)
    root = ((1 + rho) ** 2 + 4 * share).sqrt()
    # (1 − ρ + root)/2 − 1, without the cancellation that would lose a small η
    return (2 * share / (root + 1 + rho)).log1p()


class Search(ABC):
    """Chooses t, given the majorant.

    One that reckons with another depth than the bound's, so that η is t times that, has a ``reckoned`` of its own; one that evaluates the
    bound at a single point has a ``change`` of its own.
    """

    needs_evidence: ClassVar[bool] = False
    """Whether R, tracked sizes and proved constants are required."""

    @abstractmethod
    def points(self, start: Bound, device: torch.device) -> Float[Tensor, " points"]:
        """The steps t at which the growth must be known, given the bound at t = 0; the first is 0."""

    @abstractmethod
    def minimum(self, majorant: Majorant) -> Minimum:
        """The minimiser, without waiting for the device."""

    def change(self, majorant: Majorant, t: Scalar) -> Scalar:
        """The majorant at a step t ≥ 0 that need not be the minimiser: above 0 where that goes too far for it."""
        return majorant.at(t)

    def reckoned(self, bound: Bound) -> tuple[Number, Number]:
        """The output magnitude a and the depth that the search reckons with; η is t times that depth."""
        return bound.magnitude, bound.depth

    def stiffness(self, majorant: Majorant) -> Number:
        """h·(a·D)², the curvature of the loss bound along the step at t = 0: what a short step uses up of the slope, per unit t."""
        magnitude, depth = self.reckoned(majorant.bound)
        slope = magnitude * depth
        # a power of numbers raises where it overflows, a product is infinite
        return majorant.curvature * (slope * slope)

    def check(self, start: Bound) -> None:
        """Raise ``UnknownBound`` where a network with this bound does not allow the search."""
        if self.needs_evidence and start.error is None:
            raise UnknownBound(
                "a certified step was asked for, but the network has a bond without a second-order bound (ReLU, max pooling "
                "and other kinks have none). Use smooth or linear bonds, or search=ExactGrowth()."
            )


@dataclass(frozen=True)
class ClosedForm(Search):
    """AGD's formula, from the ceiling depth D̄ and the output magnitude a.

    Args:
        depth: replaces D̄ where declared; the AGD code counts parameter tensors.
        magnitude: replaces a where declared; the AGD paper has 1.

    Raises:
        InvalidArgument: either is given and not a finite number above 0.
    """

    depth: float | None = None
    magnitude: float | None = None

    def __post_init__(self) -> None:
        for what in ("depth", "magnitude"):
            value = getattr(self, what)
            if value is not None and not (finite(value) and value > 0):
                raise InvalidArgument(f"ClosedForm was given {what}={value!r}, which must be a finite number > 0")

    def points(self, start: Bound, device: torch.device) -> Float[Tensor, " points"]:
        return torch.zeros(1, device=device, dtype=precise(device))

    def reckoned(self, bound: Bound) -> tuple[Number, Number]:
        return self.magnitude or bound.magnitude, self.depth or bound.ceiling

    def minimum(self, majorant: Majorant) -> Minimum:
        magnitude, depth = self.reckoned(majorant.bound)
        gradient = majorant.descent / depth
        t = closed_form(gradient, magnitude, majorant.curvature) / depth
        return Minimum(t, self.change(majorant, t))

    def change(self, majorant: Majorant, t: Scalar) -> Scalar:
        magnitude, depth = self.reckoned(majorant.bound)
        return -majorant.descent * t + majorant.curvature / 2 * (magnitude * torch.expm1(t * depth)) ** 2


@dataclass(frozen=True)
class _Grid(Search, ABC):
    """Evaluates the majorant on a geometric grid of t and takes the least: a few vector operations, no iteration.

    The majorant is convex and its minimum flat, so a grid point within 0.4% of the minimiser gives up less than 0.005% of
    the decrease; a step on the grid has the majorant's value as evaluated, with nothing left to converge.

    Args:
        count: number of steps on the grid besides 0, evenly spaced in log t over 12 decades.
    """

    count: int = 4096

    def __post_init__(self) -> None:
        if self.count < 3:
            raise InvalidArgument(f"{type(self).__name__} was given count={self.count}; a grid takes at least 3 points")

    @property
    def ratio(self) -> float:
        """Natural logarithm of the ratio of neighbouring steps."""
        return 12 * 2.302585092994046 / (self.count - 1)

    def points(self, start: Bound, device: torch.device) -> Float[Tensor, " points"]:
        scalars = precise(device)
        steps = torch.logspace(-8, 4, self.count, device=device, dtype=scalars)
        return torch.cat([torch.zeros(1, device=device, dtype=scalars), steps / start.depth])

    def minimum(self, majorant: Majorant) -> Minimum:
        values = majorant.values()
        index = values.argmin()
        t, change = majorant.t.gather(0, index[None])[0], values.gather(0, index[None])[0]
        return Minimum(t, change)


@dataclass(frozen=True)
class ExactGrowth(_Grid):
    """Minimises −t·S + B(a·(γ(t) − 1)) with the true γ, refined between grid points by a parabola in log t.

    Where the closed form promises more, which is for steps so short that they lie below the grid, its step is taken.
    """

    def minimum(self, majorant: Majorant) -> Minimum:
        values = majorant.values()
        index = values.argmin()
        inner = index.clamp(2, values.numel() - 2)
        left, middle, right = (values.gather(0, (inner + shift)[None])[0] for shift in (-1, 0, 1))
        vertex = (left - right) / (2 * (left - 2 * middle + right))
        # at the ends of the grid, or beside an overflow, the parabola says nothing
        usable = (vertex.abs() <= 1) & (inner == index)
        shift = torch.where(usable, vertex, 0.0)
        t = majorant.t.gather(0, index[None])[0] * (shift * self.ratio).exp()
        change = values.gather(0, index[None])[0]
        closed = ClosedForm().minimum(majorant)
        better = closed.change < change
        t, change = torch.where(better, closed.t, t), torch.where(better, closed.change, change)
        return Minimum(t, change)


@dataclass(frozen=True)
class Certified(_Grid):
    """Minimises the whole majorant, R term included; needs proved constants, tracked sizes and a smooth network."""

    needs_evidence: ClassVar[bool] = True
