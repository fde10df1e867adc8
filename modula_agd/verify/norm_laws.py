"""Laws of a weight norm: it is a norm, its dual direction is unit and steepest, its certified bound is one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modula_agd.kernel_norm import KernelNorm
from modula_agd.norm import Norm, Spectral
from modula_agd.polar import SMALLEST
from modula_agd.verify.draw import NormDraw, generators, matrix
from modula_agd.verify.law import Device, Law, Measurement
from modula_agd.verify.tolerance import rounding


@dataclass(frozen=True)
class Shaped:
    """A norm together with the shape of the weights it is tried on."""

    norm: Norm
    shape: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Shaped({self.norm!r}, {self.shape})"


class NormLaw(Law, ABC):
    """Shared: two tensors of one shape, the first scaled by a power of ten."""

    def applies(self, subject: Any) -> bool:
        return isinstance(subject, Shaped)

    def tensors(self, subject: Shaped, draw: NormDraw) -> dict[str, Tensor]:
        stream = generators(draw.seed)
        return {
            "g": matrix(draw.kind, subject.shape, next(stream)) * 10.0**draw.exponent,
            "w": matrix(draw.other, subject.shape, next(stream)),
        }

    def measure(self, subject: Shaped, draw: NormDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        g, w = (tensors[name].to(where.device, where.dtype) for name in ("g", "w"))
        lhs, rhs = self.sides(subject.norm, g, w)
        size = sum(subject.shape) + g.numel()
        return Measurement(lhs, rhs, rhs * rounding(where.dtype, size))

    @abstractmethod
    def sides(self, norm: Norm, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """lhs and rhs, for two tensors of the norm's shape."""


class UnitDirection(NormLaw):
    """A dual direction never leaves the unit ball, whatever the gradient."""

    name = "unit direction"
    statement = "‖u(g)‖ ≤ 1"

    def sides(self, norm: Norm, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        size = norm.size(norm.direction(g).dense())
        return size, torch.ones_like(size)


class DualPairing(NormLaw):
    """The direction reaches what the dual norm promises: exactly, but for the polar iteration on small singular values."""

    name = "dual pairing"
    statement = "‖g‖_dual ≤ ⟨g, u⟩/(1 − shortfall)"

    def sides(self, norm: Norm, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        reached, dual = norm.direction(g).pair(g), norm.dual(g)
        if not _has_spectrum(norm):
            return dual, reached
        # singular values below SMALLEST of the largest may fall short by all they have: at most rank·SMALLEST of the sum
        rank = max(min(x.shape[-2:]) for x in norm.cut(g)) if isinstance(norm, KernelNorm) else min(g.shape[-2:])
        return dual * (1 - 0.003), reached + rank * SMALLEST * dual


class PairingWithinDual(NormLaw):
    """No direction can do better than the dual norm."""

    name = "pairing within dual"
    statement = "⟨g, u⟩ ≤ ‖g‖_dual"

    def sides(self, norm: Norm, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return norm.direction(g).pair(g), norm.dual(g)


class Hoelder(NormLaw):
    """The dual norm is one: no weight of norm ‖w‖ pairs better with g."""

    name = "Hölder"
    statement = "|⟨g, w⟩| ≤ ‖g‖_dual·‖w‖"

    def sides(self, norm: Norm, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return (g.double() * w.double()).sum().abs(), norm.dual(g) * norm.size(w)


class Triangle(NormLaw):
    """The triangle inequality."""

    name = "triangle"
    statement = "‖v + w‖ ≤ ‖v‖ + ‖w‖"

    def sides(self, norm: Norm, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return norm.size(g + w), norm.size(g) + norm.size(w)


class CertifiedSize(NormLaw):
    """The bound used for tracked sizes is an upper one."""

    name = "certified size"
    statement = "‖w‖ ≤ bound(w)"

    def sides(self, norm: Norm, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return norm.size(g), norm.bound(g)


class EuclideanAbove(NormLaw):
    """The cheaper norm is never smaller, so that its unit steps are at most unit steps."""

    name = "euclidean above"
    statement = "‖w‖ ≤ ‖w‖_euclidean"

    def sides(self, norm: Norm, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return norm.size(g), norm.euclidean.size(g)


def _has_spectrum(norm: Norm) -> bool:
    inner = getattr(norm, "inner", norm)
    return isinstance(inner, Spectral)


NORM_LAWS: tuple[NormLaw, ...] = (
    UnitDirection(),
    DualPairing(),
    PairingWithinDual(),
    Hoelder(),
    Triangle(),
    CertifiedSize(),
    EuclideanAbove(),
)
