"""Laws of a network with its loss: the expansion behind the majorisation, the majorisation in each mode, and descent.

Published statements that need more than they say are here with what they need; ``tests/verify/test_published.py`` exhibits
the cases in which they fail as published.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modula_agd.agd import agd
from modula_agd.loss import Loss, SquareLoss
from modula_agd.majorisation import Certified, ClosedForm, ExactGrowth
from modula_agd.method import Method
from modula_agd.module import Module
from modula_agd.space import Space
from modula_agd.state import State
from modula_agd.verify.draw import ModuleDraw
from modula_agd.verify.law import Device, Law, Measurement, side
from modula_agd.verify.loss_laws import targets_for
from modula_agd.verify.module_laws import Case, Growth, SecondOrder, linearised, settled


@dataclass(frozen=True)
class Objective:
    """A network and the loss of its outputs, class indices or random targets."""

    network: Module
    loss: Loss


class Expansion(NamedTuple):
    """L(w + Δw) − L(w) taken apart (AGD paper, Proposition 1).

    Args:
        change: L(w + Δw) − L(w).
        linear: ⟨∇L, Δw⟩.
        model: mean ⟨∂ℓ, Δf − ∂f·Δw⟩, the model's own curvature.
        divergence: mean Bregman divergence of the loss.
        delta: largest ‖Δf‖ over the batch, in the codomain's norm.
        residual: R.
        units: size of the numbers involved, the unit of rounding.
    """

    change: Tensor
    linear: Tensor
    model: Tensor
    divergence: Tensor
    delta: Tensor
    residual: Tensor
    units: Tensor


class DescentLaw(Law, ABC):
    """Shared: a module case with targets; the outputs are one vector per sample."""

    def applies(self, subject: Any) -> bool:
        return isinstance(subject, Objective)

    def tensors(self, subject: Objective, draw: ModuleDraw) -> dict[str, Tensor]:
        _, codomain = settled(subject.network)
        outputs = torch.zeros((draw.batch, codomain.width), dtype=torch.float64)
        generator = torch.Generator().manual_seed(draw.seed)
        targets = targets_for(subject.loss, outputs, draw.seed % 2 == 0, generator)
        return {**Growth().tensors(subject.network, draw), "targets": targets}

    def case(
        self, subject: Objective, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device
    ) -> tuple[Case, Tensor]:
        """The module's case, and the targets."""
        targets = tensors["targets"]
        dtype = where.dtype if targets.is_floating_point() else targets.dtype
        return Case(subject.network, draw, tensors, where), targets.to(where.device, dtype)


class ExpansionLaw(DescentLaw, ABC):
    """Shared: a statement about the parts of the expansion."""

    def expand(
        self, subject: Objective, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device
    ) -> tuple[Case, Expansion]:
        """The expansion for a change of the weights alone."""
        case, targets = self.case(subject, draw, tensors, where)
        loss, network = subject.loss, subject.network
        before, linear = linearised(lambda w: network(w, case.x), (case.params,), (case.change,))
        after = network(case.moved, case.x)
        gradient = loss.gradient(before, targets)
        weight_gradient = torch.func.grad(lambda w: loss(network(w, case.x), targets))(case.params)
        pairs = [(weight_gradient[name] * case.change[name]).sum() for name in case.change]
        values = loss(before, targets), loss(after, targets)
        model = (gradient * (after - before - linear)).flatten(1).sum(1).mean()
        units = (
            values[0].abs() + values[1].abs() + (gradient * after).abs().flatten(1).sum(1).mean() + after.abs().amax()
        )
        return case, Expansion(
            change=values[1] - values[0],
            linear=torch.stack(pairs).sum() if pairs else torch.zeros_like(model),
            model=model,
            divergence=loss.divergence(before, after, targets).mean(),
            delta=case.codomain.norm(after - before).amax(),
            residual=loss.residual(before, targets, case.codomain),
            units=units,
        )

    def loss_bound(self, subject: Objective, codomain: Space, delta: Tensor) -> Tensor:
        """B of a change of norm δ in the codomain, by the proved conversion of norms."""
        proved, _ = subject.loss.conversion(codomain)
        return side(subject.loss.bound(proved.value * delta), delta)

    def measure(self, subject: Objective, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        case, expansion = self.expand(subject, draw, tensors, where)
        lhs, rhs = self.sides(subject, draw, case, expansion)
        return Measurement(lhs, rhs.to(lhs), (expansion.units + rhs.abs()) * 8 * case.slack)

    @abstractmethod
    def sides(self, subject: Objective, draw: ModuleDraw, case: Case, x: Expansion) -> tuple[Tensor, Tensor]:
        """lhs and rhs."""


class FunctionalExpansion(ExpansionLaw):
    """The paper's Proposition 1, an identity: nothing is left over."""

    name = "functional expansion"
    statement = "|ΔL − ⟨∇L, Δw⟩ − model term − divergence| ≤ 0"

    def sides(self, subject: Objective, draw: ModuleDraw, case: Case, x: Expansion) -> tuple[Tensor, Tensor]:
        return (x.change - x.linear - x.model - x.divergence).abs(), torch.zeros_like(x.change)


class ExactMajorisation(ExpansionLaw):
    """The majorisation with the model term as it is, growth as declared."""

    name = "majorisation, exact growth"
    statement = "ΔL − ⟨∇L, Δw⟩ − model term ≤ B(a·(γ(t) − 1))"

    def sides(self, subject: Objective, draw: ModuleDraw, case: Case, x: Expansion) -> tuple[Tensor, Tensor]:
        bound = case.module.bound(draw.t, magnitude=draw.magnitude, constants="proved")
        delta = side(bound.magnitude * (bound.growth - 1), x.delta)
        return x.change - x.linear - x.model, self.loss_bound(subject, case.codomain, delta)


class ClosedFormMajorisation(ExpansionLaw):
    """The same with γ ≤ exp(D̄·t), the paper's exponential."""

    name = "majorisation, closed form"
    statement = "ΔL − ⟨∇L, Δw⟩ − model term ≤ B(a·(exp(D̄·t) − 1))"

    def sides(self, subject: Objective, draw: ModuleDraw, case: Case, x: Expansion) -> tuple[Tensor, Tensor]:
        bound = case.module.bound(0.0, magnitude=draw.magnitude, constants="proved")
        delta = bound.magnitude * side(bound.ceiling * draw.t, x.delta).expm1()
        return x.change - x.linear - x.model, self.loss_bound(subject, case.codomain, delta)


class CertifiedMajorisation(ExpansionLaw):
    """The majorisation with nothing assumed: the model term bounded by R·a·κ."""

    name = "majorisation, certified"
    statement = "ΔL − ⟨∇L, Δw⟩ ≤ R·a·κ(t) + B(a·(γ(t) − 1))"

    def applies(self, subject: Any) -> bool:
        return isinstance(subject, Objective) and SecondOrder().applies(subject.network)

    def sides(self, subject: Objective, draw: ModuleDraw, case: Case, x: Expansion) -> tuple[Tensor, Tensor]:
        bound = case.module.bound(draw.t, magnitude=draw.magnitude, constants="proved")
        delta = side(bound.magnitude * (bound.growth - 1), x.delta)
        return x.change - x.linear, x.residual * bound.magnitude * bound.error + self.loss_bound(
            subject, case.codomain, delta
        )


class BoundedGradient(ExpansionLaw):
    """The AGD paper's bounded gradient, for every architecture: the linear term is at most R·a·D·t."""

    name = "bounded gradient"
    statement = "|⟨∇L, Δw⟩| ≤ R·a·D·t"

    def sides(self, subject: Objective, draw: ModuleDraw, case: Case, x: Expansion) -> tuple[Tensor, Tensor]:
        bound = case.module.bound(0.0, magnitude=draw.magnitude, constants="proved")
        return x.linear.abs(), x.residual * bound.magnitude * bound.depth * draw.t


class BoundedObjective(DescentLaw):
    """The square loss for outputs of norm a and targets of RMS b. The paper's Lemma has 1 at a = b = 1; it is 2 (f = −y)."""

    name = "bounded objective"
    statement = "‖f − y‖²_RMS/2 ≤ (a + b)²/2"

    def applies(self, subject: Any) -> bool:
        return isinstance(subject, Objective) and isinstance(subject.loss, SquareLoss)

    def measure(self, subject: Objective, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        case, targets = self.case(subject, draw, tensors, where)
        if draw.inputs == "constant":  # the witness: targets opposite to the outputs
            targets = -subject.network(case.params, case.x)
        lhs = subject.loss.per_sample(subject.network(case.params, case.x), targets).amax()
        a, b = case.bound(0.0).magnitude, (targets.square().flatten(1).mean(1).sqrt()).amax()
        rhs = (a + b) ** 2 / 2
        return Measurement(lhs, rhs, rhs * 2 * case.slack)


class _StepLaw(DescentLaw, ABC):
    """Shared: takes a real step of a method from the drawn weights, on the drawn batch as the full batch."""

    def step(
        self, method: Method, subject: Objective, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device
    ) -> tuple[Case, Tensor, Tensor, State]:
        """Loss before and after one update, and the state that describes it."""
        case, targets = self.case(subject, draw, tensors, where)
        gradients, before = torch.func.grad_and_value(method.objective)(case.params, case.x, targets)
        evidence = method.evidence(case.params, case.x, targets) if method.needs_evidence else None
        updates, state = method.update(gradients, method.init(case.params), case.params, evidence)
        after = method.objective({name: w + updates[name] for name, w in case.params.items()}, case.x, targets)
        return case, before, after, state


class CertifiedDescent(_StepLaw):
    """A certified step does not raise the loss, and lowers it by what it predicted."""

    name = "certified descent"
    statement = "L(w + Δw) ≤ L(w) + predicted change"

    def applies(self, subject: Any) -> bool:
        return CertifiedMajorisation().applies(subject)

    def measure(self, subject: Objective, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        direction = "spectral" if draw.seed % 2 else "frobenius"
        method = agd(subject.network, subject.loss, search=Certified(), direction=direction)
        case, before, after, state = self.step(method, subject, draw, tensors, where)
        # written with two positive sides: the predicted decrease against the realised one
        realised = before - after
        # a loss near 0 is a difference of numbers of the outputs' size, as in the expansion
        units = before.abs() + after.abs() + case.outputs(case.params, case.x).abs().amax()
        return Measurement(-state.change.to(realised), realised, units * 8 * case.slack)


class ExactBeatsClosedForm(_StepLaw):
    """Exact growth guarantees at least the decrease that the closed form does, under the same assumptions."""

    name = "exact growth beats closed form"
    statement = "closed form's guaranteed decrease ≤ exact growth's"

    def measure(self, subject: Objective, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        states = []
        for search in (ClosedForm(), ExactGrowth()):
            method = agd(subject.network, subject.loss, search=search, constants="proved", magnitude=draw.magnitude)
            case, _, _, state = self.step(method, subject, draw, tensors, where)
            states.append(state)
        closed, exact = (-state.change for state in states)
        # the grid's resolution gives up 2e-4 at most
        return Measurement(closed, exact, exact * 2e-4 + closed * case.slack)


DESCENT_LAWS: tuple[DescentLaw, ...] = (
    FunctionalExpansion(),
    ExactMajorisation(),
    ClosedFormMajorisation(),
    CertifiedMajorisation(),
    BoundedGradient(),
    BoundedObjective(),
    CertifiedDescent(),
    ExactBeatsClosedForm(),
)
