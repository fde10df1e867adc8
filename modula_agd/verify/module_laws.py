"""Laws of a module: what it declares of magnitudes, growth and second order, against what it does."""

from abc import ABC
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modula_agd.bound import Bound, source
from modula_agd.module import Module
from modula_agd.run import Step
from modula_agd.space import Space, Tokens
from modula_agd.verify.draw import ModuleDraw, activation, generators, matrix
from modula_agd.verify.law import Device, Law, Measurement, side
from modula_agd.verify.tolerance import rounding


def settled(module: Module) -> tuple[Space, Space]:
    """Domain and codomain of a module that has both."""
    domain, codomain = module.domain, module.codomain
    if domain is None or codomain is None:
        raise TypeError(f"{module!r} has no settled domain; bind it to a space first")
    return domain, codomain


def linearised(
    function: Callable[..., Tensor], point: tuple[Any, ...], change: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """The value at a point, and the directional derivative there."""
    value, derivative = torch.func.jvp(function, point, change)  # pyright: ignore (without has_aux it is a pair)
    return value, derivative


def _normalised(x: Tensor, norm: Tensor, size: Tensor | float) -> Tensor:
    """x scaled to the given norm; zero stays zero."""
    return x * (size / norm.masked_fill(norm == 0, 1.0))


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Case:
    """A module with weights of declared size, an input of declared magnitude, and changes of declared relative size."""

    def __init__(self, module: Module, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> None:
        self.module, self.draw, self.where = module, draw, where
        self.domain, self.codomain = settled(module)
        self.tokens = isinstance(self.domain, Tokens)
        self.magnitude = 1.0 if self.tokens else draw.magnitude
        self.input_step = 0.0 if self.tokens else draw.input_step
        self.params, self.moved, self.change = {}, {}, {}
        for name, atom in module.weights().items():
            weight, step = tensors[f"weight {name}"], tensors[f"step {name}"]
            weight = _normalised(weight, atom.norm.size(weight), atom.size)
            if draw.steps in ("along", "against"):
                step = weight if draw.steps == "along" else -weight
            step = _normalised(step, atom.norm.size(step), atom.size * atom.mass * draw.t)
            self.params[name], self.change[name] = self._cast(weight), self._cast(step)
            self.moved[name] = self.params[name] + self.change[name]
        x = tensors["input"]
        if self.tokens:
            self.x = self.moved_x = x.to(where.device)
        else:
            x = _normalised(x, _per_sample(self.domain.norm(x), x), draw.magnitude)
            step = tensors["input step"]
            if draw.input_steps in ("along", "against"):
                step = x if draw.input_steps == "along" else -x
            step = _normalised(step, _per_sample(self.domain.norm(step), x), draw.magnitude * draw.input_step)
            self.x, self.x_change = self._cast(x), self._cast(step)
            self.moved_x = self.x + self.x_change

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.where.device, self.where.dtype)

    def bound(self, t: float) -> Bound:
        """The declared bound, worst-case constants, input moved too."""
        start = Bound(self.magnitude, 1 + self.input_step, error=0.0, depth=0.0, ceiling=0.0)
        return self.module.propagate(start, Step(t, "proved"))

    def units(self, bound: Bound) -> float:
        """The size of what is rounded: outputs, and γ − 1 of the input, whose error the input's magnitude multiplies."""
        return float(bound.magnitude * bound.growth) + self.magnitude * (1 + self.input_step)

    @property
    def slack(self) -> float:
        """Relative rounding of one evaluation of the module."""
        fans = sum(sum(atom.shape) for _, atom in self.module.atoms()) + 4 * sum(1 for _ in self.module.atoms())
        return rounding(self.where.dtype, fans + 4 * self.draw.side**2 + self.domain.width)


class ModuleLaw(Law, ABC):
    """Shared: cases are drawn alike."""

    def applies(self, subject: Any) -> bool:
        return isinstance(subject, Module)

    def tensors(self, subject: Module, draw: ModuleDraw) -> dict[str, Tensor]:
        stream = generators(draw.seed)
        domain, _ = settled(subject)
        tensors = {"input": activation(draw.inputs, domain, draw, next(stream))}
        kind = draw.input_steps if draw.input_steps not in ("along", "against") else "gaussian"
        tensors["input step"] = activation(kind, domain, draw, next(stream))
        for name, atom in subject.weights().items():
            tensors[f"weight {name}"] = matrix(draw.weights, atom.shape, next(stream))
            kind = draw.steps if draw.steps not in ("along", "against") else "zero"
            tensors[f"step {name}"] = matrix(kind, atom.shape, next(stream))
        return tensors


class Magnitude(ModuleLaw):
    """The output's norm; for a chain of Linear layers the AGD paper's output bound (Lemma 1)."""

    name = "magnitude"
    statement = "‖h‖ ≤ a"

    def measure(self, subject: Module, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        case = Case(subject, draw, tensors, where)
        lhs = case.codomain.norm(subject(case.params, case.x)).amax()
        rhs = side(case.bound(0.0).magnitude, lhs)
        return Measurement(lhs, rhs, float(rhs) * case.slack)


class Growth(ModuleLaw):
    """How far a step moves the output; for a chain of Linear layers deep relative trust (AGD paper, Lemma 2)."""

    name = "growth"
    statement = "‖Δh‖ ≤ a·(γ(t) − 1)"

    def measure(self, subject: Module, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        case = Case(subject, draw, tensors, where)
        change = subject(case.moved, case.moved_x) - subject(case.params, case.x)
        lhs = case.codomain.norm(change).amax()
        bound = case.bound(draw.t)
        rhs = side(bound.magnitude * (bound.growth - 1), lhs)
        return Measurement(lhs, rhs, case.units(bound) * 2 * case.slack)


class SecondOrder(ModuleLaw):
    """What linearising in weights and input leaves out."""

    name = "second order"
    statement = "‖Δh − ∂h·(Δw, Δx)‖ ≤ a·κ(t)"

    def applies(self, subject: Any) -> bool:
        return isinstance(subject, Module) and subject.propagate(source(), Step(0.1, "proved")).error is not None

    def measure(self, subject: Module, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        case = Case(subject, draw, tensors, where)
        if case.tokens:
            before, linear = linearised(lambda w: subject(w, case.x), (case.params,), (case.change,))
        else:
            before, linear = linearised(subject, (case.params, case.x), (case.change, case.x_change))
        change = subject(case.moved, case.moved_x) - before
        lhs = case.codomain.norm(change - linear).amax()
        bound = case.bound(draw.t)
        rhs = side(bound.magnitude * bound.error, lhs)
        return Measurement(lhs, rhs, case.units(bound) * 4 * case.slack)


class CeilingDepth(ModuleLaw):
    """The AGD paper's exponential, for every architecture: a statement about the declared numbers alone."""

    name = "ceiling depth"
    statement = "log γ(t) ≤ D̄·t"

    def measure(self, subject: Module, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        bound = subject.propagate(source(draw.magnitude), Step(draw.t, "proved"))
        lhs = torch.as_tensor(bound.growth - 1, dtype=torch.float64).log1p()
        rhs = torch.as_tensor(bound.ceiling * draw.t, dtype=torch.float64)
        return Measurement(lhs, rhs, rounding(torch.float64, 64))


class DepthIsSlope(ModuleLaw):
    """D is γ′(0): with convexity, D·t ≤ γ(t) − 1, and nothing larger than D will do."""

    name = "depth"
    statement = "D·t ≤ γ(t) − 1"

    def measure(self, subject: Module, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        bound = subject.propagate(source(draw.magnitude), Step(draw.t, "proved"))
        lhs = torch.as_tensor(bound.depth * draw.t, dtype=torch.float64)
        rhs = torch.as_tensor(bound.growth - 1, dtype=torch.float64)
        return Measurement(lhs, rhs, float(bound.growth) * rounding(torch.float64, 64))


MODULE_LAWS: tuple[ModuleLaw, ...] = (Magnitude(), Growth(), SecondOrder(), CeilingDepth(), DepthIsSlope())
