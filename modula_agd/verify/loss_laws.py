"""Laws of a loss: its Bregman divergence, its gradient's dual norm, and the shape of its bound."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modula_agd.loss import BinaryCrossEntropy, CrossEntropy, Loss
from modula_agd.space import Features, Logits
from modula_agd.verify.draw import LossDraw, generators
from modula_agd.verify.law import Device, Law, Measurement, side
from modula_agd.verify.tolerance import rounding


class LossCase(NamedTuple):
    """Outputs, their change (of norm δ in the loss's own norm), targets."""

    outputs: Tensor
    change: Tensor
    targets: Tensor
    delta: float


def targets_for(loss: Loss, outputs: Tensor, soft: bool, generator: torch.Generator) -> Tensor:
    """Random targets of the kind that the loss takes, for outputs [batch, n]."""
    noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    if isinstance(loss, CrossEntropy):
        return noise.softmax(-1) if soft else noise.argmax(-1)
    if isinstance(loss, BinaryCrossEntropy):
        return noise.sigmoid() if soft else (noise > 0).to(noise)
    return noise if soft else torch.zeros_like(noise)


class LossLaw(Law, ABC):
    """Shared: cases are drawn alike."""

    def applies(self, subject: Any) -> bool:
        return isinstance(subject, Loss)

    def tensors(self, subject: Loss, draw: LossDraw) -> dict[str, Tensor]:
        stream = generators(draw.seed)
        shape = (draw.batch, draw.width)
        outputs = torch.randn(shape, generator=next(stream), dtype=torch.float64) * draw.scale
        targets = targets_for(subject, outputs, draw.soft, next(stream))
        change = torch.randn(shape, generator=next(stream), dtype=torch.float64)
        if draw.change == "sign":
            change = (
                torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(draw.width)[: draw.width].expand(shape).clone()
            )
        elif draw.change == "spike":
            change = torch.zeros(shape, dtype=torch.float64)
            change[:, 0] = 1.0
        elif draw.change == "residual" and targets.shape == outputs.shape:
            change = targets.double() - outputs
        return {"outputs": outputs, "change": change, "targets": targets}

    def case(self, subject: Loss, draw: LossDraw, tensors: dict[str, Tensor], where: Device) -> LossCase:
        """The tensors, with the change normalised."""
        change = tensors["change"]
        norm = (Logits if subject.max_norm else Features)(draw.width).norm(change)[:, None]
        change = change * (draw.delta / norm.masked_fill(norm == 0, 1.0))
        outputs, change, targets = (
            x.to(where.device, where.dtype if x.is_floating_point() else x.dtype)
            for x in (tensors["outputs"], change, tensors["targets"])
        )
        return LossCase(outputs, change, targets, draw.delta)

    def measure(self, subject: Loss, draw: LossDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        case = self.case(subject, draw, tensors, where)
        lhs, rhs, units = self.sides(subject, case)
        return Measurement(lhs, rhs, float(units.detach()) * rounding(where.dtype, 4 * draw.width))

    @abstractmethod
    def sides(self, loss: Loss, case: LossCase) -> tuple[Tensor, Tensor, Tensor]:
        """lhs, rhs, and the size of what was subtracted on the way (the unit of rounding errors)."""


def _units(loss: Loss, case: LossCase) -> Tensor:
    moved = case.outputs + case.change
    values = (
        loss.per_sample(moved, case.targets).abs().amax() + loss.per_sample(case.outputs, case.targets).abs().amax()
    )
    linear = (loss.gradient(case.outputs, case.targets) * case.change).abs().sum(-1).amax()
    return values + linear + moved.abs().amax()


class BregmanBound(LossLaw):
    """What the majorisation asks of a loss."""

    name = "Bregman bound"
    statement = "ℓ(f + Δ) − ℓ(f) − ⟨∂ℓ, Δ⟩ ≤ B(‖Δ‖)"

    def sides(self, loss: Loss, case: LossCase) -> tuple[Tensor, Tensor, Tensor]:
        lhs = loss.divergence(case.outputs, case.outputs + case.change, case.targets).amax()
        return lhs, side(loss.bound(case.delta), lhs), _units(loss, case)


class QuadraticBound(LossLaw):
    """B lies below the parabola of the declared curvature, which the closed form uses."""

    name = "quadratic bound"
    statement = "B(δ) ≤ h·δ²/2"

    def sides(self, loss: Loss, case: LossCase) -> tuple[Tensor, Tensor, Tensor]:
        lhs = side(loss.bound(case.delta), case.change)
        rhs = side(loss.curvature.value * case.delta**2 / 2, case.change)
        return lhs, rhs, rhs


class ConvexBound(LossLaw):
    """B is convex, so that the majorant is, too; tried at the midpoint of 0 and 2δ."""

    name = "convex bound"
    statement = "2·B(δ) ≤ B(2δ)"

    def sides(self, loss: Loss, case: LossCase) -> tuple[Tensor, Tensor, Tensor]:
        lhs = side(2 * loss.bound(case.delta), case.change)
        rhs = side(loss.bound(2 * case.delta), case.change)
        return lhs, rhs, rhs


class ConvexLoss(LossLaw):
    """The tangent lies below the loss: the divergence is not negative, and the linear part never overstates the loss."""

    name = "convex loss"
    statement = "ℓ(f) + ⟨∂ℓ, Δ⟩ ≤ ℓ(f + Δ)"

    def sides(self, loss: Loss, case: LossCase) -> tuple[Tensor, Tensor, Tensor]:
        tangent = (loss.gradient(case.outputs, case.targets) * case.change).sum(-1) + loss.per_sample(
            case.outputs, case.targets
        )
        moved = loss.per_sample(case.outputs + case.change, case.targets)
        sample = (tangent - moved).argmax()
        return tangent[sample].clamp(min=0.0), moved[sample], _units(loss, case)


class ResidualDual(LossLaw):
    """R is a dual norm: the first-order change of the mean loss is at most R·‖Δ‖ with Δ in the codomain's norm."""

    name = "residual"
    statement = "|mean ⟨∂ℓ, Δ⟩| ≤ R·max ‖Δ‖"

    def sides(self, loss: Loss, case: LossCase) -> tuple[Tensor, Tensor, Tensor]:
        width = case.outputs.shape[-1]
        codomain = Logits(width) if loss.max_norm else Features(width)
        pairing = (loss.gradient(case.outputs, case.targets) * case.change).sum(-1).mean().abs()
        rhs = loss.residual(case.outputs, case.targets, codomain) * codomain.norm(case.change).amax()
        return pairing, rhs, rhs


LOSS_LAWS: tuple[LossLaw, ...] = (BregmanBound(), QuadraticBound(), ConvexBound(), ConvexLoss(), ResidualDual())
