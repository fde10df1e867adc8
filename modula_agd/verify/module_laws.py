"""Laws of a module: what it declares of magnitudes, growth and second order, against what it does."""

from abc import ABC
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from modula_agd.bound import Bound, Grade, source
from modula_agd.module import Module
from modula_agd.normalisation import Normalisation
from modula_agd.run import Step
from modula_agd.space import Mask, Space, Tokens, Tuple
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
    # the fused kernels of attention have no forward-mode derivative
    with sdpa_kernel(SDPBackend.MATH):
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
        self.params, self.moved, self.change = {}, {}, {}
        for name, atom in module.weights().items():
            weight, step = tensors[f"weight {name}"], tensors[f"step {name}"]
            weight = _normalised(weight, atom.norm.size(weight), atom.size)
            if draw.steps in ("along", "against"):
                step = weight if draw.steps == "along" else -weight
            step = _normalised(step, atom.norm.size(step), atom.size * atom.mass * draw.t)
            self.params[name], self.change[name] = self._cast(weight), self._cast(step)
            self.moved[name] = self.params[name] + self.change[name]
        self.x = self._of_size(tensors, "input", self.domain, draw.magnitude)
        self.x_change = self._of_size(tensors, "input step", self.domain, draw.magnitude * draw.input_step)
        self.moved_x = _moved(self.x, self.x_change)

    def _of_size(self, tensors: dict[str, Tensor], what: str, space: Space, size: float) -> Any:
        """The drawn activation (of a tuple, each part) scaled to the given norm; ids and masks as they are."""
        if isinstance(space, Tuple):
            return tuple(
                self._of_size(tensors, f"{what} {index}", part, size) for index, part in enumerate(space.parts)
            )
        x = tensors[what]
        if not x.is_floating_point():
            return x.to(self.where.device)
        return self._cast(_normalised(x, _per_sample(space.norm(x), x), size))

    def outputs(self, params: dict[str, Tensor], x: Any) -> Any:
        """The module's outputs as in training, under one and the same mask of dropout."""
        generator = torch.Generator(self.where.device).manual_seed(self.draw.seed)
        return self.module.run(params, x, generator=generator)[0]

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.where.device, self.where.dtype)

    def bound(self, t: float) -> Bound:
        """The declared bound, worst-case constants, input moved too."""
        return self.module.propagate(self._start(self.domain), Step(t, "proved"))

    def _start(self, space: Space) -> Any:
        if isinstance(space, Tuple):
            return tuple(self._start(part) for part in space.parts)
        if isinstance(space, Tokens | Mask):
            return source()
        return Bound(self.draw.magnitude, 1 + self.draw.input_step, error=0.0, depth=0.0, ceiling=0.0)

    def units(self, bound: Bound) -> float:
        """The size of what is rounded: outputs, and γ − 1 of the input, whose error the input's magnitude multiplies."""
        return float(bound.magnitude * bound.growth) + self.draw.magnitude * (1 + self.draw.input_step)

    @property
    def slack(self) -> float:
        """Relative rounding of one evaluation of the module."""
        uses = [atom for _, atom in self.module.atoms()]
        fans = sum(sum(atom.shape) for atom in uses) + 4 * len(uses)
        return rounding(self.where.dtype, fans + 4 * self.draw.side**2 + self.domain.width)


def _moved(x: Any, change: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_moved(part, by) for part, by in zip(x, change, strict=True))
    return x + change if x.is_floating_point() else x


def _kind(kinds: str, name: str) -> str:
    """The kind for a part of a tuple, ``"input 2"``, where kinds are listed with bars between; else the one for all."""
    listed, digits = kinds.split("|"), [int(word) for word in name.split() if word.isdigit()]
    return listed[digits[-1]] if len(listed) > 1 and digits else listed[0]


def _activations(
    name: str, kinds: str, space: Space, draw: ModuleDraw, generator: torch.Generator
) -> dict[str, Tensor]:
    """A drawn activation by name; of a tuple, each part with its index in the name."""
    if isinstance(space, Tuple):
        found: dict[str, Tensor] = {}
        for index, part in enumerate(space.parts):
            found |= _activations(f"{name} {index}", kinds, part, draw, generator)
        return found
    return {name: activation(_kind(kinds, name), space, draw, generator)}


class ModuleLaw(Law, ABC):
    """Shared: cases are drawn alike. A bound that rests on an assumption claims nothing of an arbitrary case."""

    def applies(self, subject: Any) -> bool:
        if not isinstance(subject, Module) or isinstance(subject.codomain, Tuple):
            return False
        return subject.bound(constants="proved").grade == Grade.PROVED

    def tensors(self, subject: Module, draw: ModuleDraw) -> dict[str, Tensor]:
        stream = generators(draw.seed)
        domain, _ = settled(subject)
        tensors = _activations("input", draw.inputs, domain, draw, next(stream))
        changes = _activations("input step", draw.input_steps, domain, draw, next(stream))
        for name, change in changes.items():
            start = tensors[name.replace("input step", "input")]
            kind = _kind(draw.input_steps, name)
            if kind in ("along", "against") and start.is_floating_point():
                change = start if kind == "along" else -start
            tensors[name] = change
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
        lhs = case.codomain.norm(case.outputs(case.params, case.x)).amax()
        rhs = side(case.bound(0.0).magnitude, lhs)
        return Measurement(lhs, rhs, float(rhs) * case.slack)


class Growth(ModuleLaw):
    """How far a step moves the output; for a chain of Linear layers deep relative trust (AGD paper, Lemma 2)."""

    name = "growth"
    statement = "‖Δh‖ ≤ a·(γ(t) − 1)"

    def measure(self, subject: Module, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        case = Case(subject, draw, tensors, where)
        change = case.outputs(case.moved, case.moved_x) - case.outputs(case.params, case.x)
        lhs = case.codomain.norm(change).amax()
        bound = case.bound(draw.t)
        rhs = side(bound.magnitude * (bound.growth - 1), lhs)
        return Measurement(lhs, rhs, case.units(bound) * 2 * case.slack)


class SecondOrder(ModuleLaw):
    """What linearising in weights and input leaves out."""

    name = "second order"
    statement = "‖Δh − ∂h·(Δw, Δx)‖ ≤ a·κ(t)"

    def applies(self, subject: Any) -> bool:
        return super().applies(subject) and subject.bound(constants="proved").error is not None

    def measure(self, subject: Module, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        case = Case(subject, draw, tensors, where)
        parts, whole = tree_flatten(case.x)
        # ids and masks do not move
        free = [index for index, part in enumerate(parts) if part.is_floating_point()]
        changes = tree_leaves(case.x_change)

        def outputs(params: dict[str, Tensor], *moving: Tensor) -> Tensor:
            now = dict(enumerate(parts)) | dict(zip(free, moving, strict=True))
            return case.outputs(params, tree_unflatten(list(now.values()), whole))

        before, linear = linearised(
            outputs,
            (case.params, *(parts[index] for index in free)),
            (case.change, *(changes[index] for index in free)),
        )
        change = case.outputs(case.moved, case.moved_x) - before
        lhs = case.codomain.norm(change - linear).amax()
        bound = case.bound(draw.t)
        rhs = side(bound.magnitude * bound.error, lhs)
        return Measurement(lhs, rhs, case.units(bound) * 4 * case.slack)


class Floor(ModuleLaw):
    """What a normalisation's ``floor`` assumes is all that its bound needs: here it is true by construction."""

    name = "floor"
    statement = "‖Δh‖ ≤ spread·‖Δx‖/f, for norms ≥ f before and after"

    def applies(self, subject: Any) -> bool:
        return isinstance(subject, Normalisation)

    def measure(self, subject: Module, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        case = Case(subject, draw, tensors, where)
        layer = cast(Normalisation, subject)
        floor = float(torch.minimum(layer.divisors(case.x).amin(), layer.divisors(case.moved_x).amin()).detach())
        change = case.outputs(case.moved, case.moved_x) - case.outputs(case.params, case.x)
        lhs = case.codomain.norm(change).amax()
        if not floor > 0:
            return Measurement(torch.zeros_like(lhs), torch.ones_like(lhs), 0.0)
        moved = case.domain.norm(case.x_change).amax() / draw.magnitude
        start = Bound(draw.magnitude, 1 + moved, error=0.0, depth=0.0, ceiling=0.0)
        bound = replace(layer, floor=floor).propagate(start, Step(draw.t, "proved"))
        rhs = side(bound.magnitude * (bound.growth - 1), lhs)
        # the floor itself is a difference of numbers of the input's size
        return Measurement(lhs, rhs, (1 + rhs) * (1 + draw.magnitude / floor) * 4 * case.slack)


class CeilingDepth(ModuleLaw):
    """The AGD paper's exponential, for every architecture: a statement about the declared numbers alone."""

    name = "ceiling depth"
    statement = "log γ(t) ≤ D̄·t"

    def measure(self, subject: Module, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        bound = subject.bound(draw.t, magnitude=draw.magnitude, constants="proved")
        lhs = torch.as_tensor(bound.growth - 1, dtype=torch.float64).log1p()
        rhs = torch.as_tensor(bound.ceiling * draw.t, dtype=torch.float64)
        return Measurement(lhs, rhs, rounding(torch.float64, 64))


class DepthIsSlope(ModuleLaw):
    """D is γ′(0): with convexity, D·t ≤ γ(t) − 1, and nothing larger than D will do."""

    name = "depth"
    statement = "D·t ≤ γ(t) − 1"

    def measure(self, subject: Module, draw: ModuleDraw, tensors: dict[str, Tensor], where: Device) -> Measurement:
        bound = subject.bound(draw.t, magnitude=draw.magnitude, constants="proved")
        lhs = torch.as_tensor(bound.depth * draw.t, dtype=torch.float64)
        rhs = torch.as_tensor(bound.growth - 1, dtype=torch.float64)
        return Measurement(lhs, rhs, float(bound.growth) * rounding(torch.float64, 64))


MODULE_LAWS: tuple[ModuleLaw, ...] = (Magnitude(), Growth(), SecondOrder(), Floor(), CeilingDepth(), DepthIsSlope())
