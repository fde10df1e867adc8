"""Layers: what an atom (one weight) and a bond (no weight) declare. A new layer type is a final subclass of one of them.

An atom names its two spaces, the shape and the norm of its weight, and the map. A bond names its Lipschitz constant, the
norm of its value at zero, and the map. All else, the type check, the initial draw, the bound of every network that the
layer is part of, the step, follows.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from modula_agd import bound as algebra
from modula_agd.bound import Bound, Constant, Gain, Number
from modula_agd.error import InvalidArgument, SpaceMismatch, UnknownBound
from modula_agd.module import Module, mismatch
from modula_agd.network import join
from modula_agd.norm import Norm, drawing_dtype
from modula_agd.run import EVALUATION, Parameters, Role, Run, Step, Weighted
from modula_agd.space import Logits, Space, Tuple, finite


def applied(module: Module, apply: Callable[[], Any], *tensors: Any) -> Any:
    """The result of ``apply``; what torch says of shapes and dtypes comes back with the layer that it is about."""
    try:
        return apply()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        parts = [y for x in tensors for y in (x if isinstance(x, tuple) else (x,))]
        what = " and ".join(f"{tuple(x.shape)} {x.dtype}" for x in parts if isinstance(x, Tensor))
        raise SpaceMismatch(f"{module!r} could not be applied to tensors of {what}: {error}") from error


def _graded(bound: Any, constant: Constant, what: str) -> Any:
    """A bound, or each of a tuple, resting on one more constant."""
    if isinstance(bound, tuple):
        return tuple(_graded(part, constant, what) for part in bound)
    return bound.graded(constant, what)


@dataclass(frozen=True)
class Atom(Module, ABC):
    """A map that is linear in its one weight.

    Args:
        mass: share of a step: the relative step is mass·t. Dimensionless, ≥ 0; 0 freezes the atom.
        size: ω, the norm at which the weight is drawn and, unless sizes are tracked, held to be. > 0.

    Raises:
        InvalidArgument: either is out of range.
    """

    mass: float = field(default=1.0, kw_only=True)
    size: float = field(default=1.0, kw_only=True)
    parameter: ClassVar[str] = "weight"
    gain: ClassVar[Gain] = Gain.exact(1.0, "definition of the operator norm")

    def __post_init__(self) -> None:
        kind = type(self).__name__
        # a tensor of masses asks for several depths at once (``Method.sensitivities``)
        alone = not isinstance(self.mass, Tensor)
        if alone and not (finite(self.mass) and self.mass >= 0):
            raise InvalidArgument(f"{kind} was given mass {self.mass!r}; a mass is a finite number ≥ 0")
        if not (finite(self.size) and self.size > 0):
            raise InvalidArgument(f"{kind} was given size {self.size!r}; a size is a finite number > 0")

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""

    @property
    @abstractmethod
    def norm(self) -> Norm:
        """The norm of the weight, in which its gain on activations is at most ``gain``·‖weight‖."""

    @property
    def role(self) -> Role:
        """What the weight is to rules that tell kinds apart; by the codomain, unless a subclass knows better."""
        return "logits" if isinstance(self.codomain, Logits) else "matrix"

    @abstractmethod
    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        """The map, given the weight."""

    @property
    def floor(self) -> float:
        """The least size that a tracked weight is held to have, so that a weight near zero can still move."""
        return 0.01 * self.size

    def rule(self, x: Bound, size: Number, step: Number, gain: float) -> Any:
        """How the bound passes; linear in weight and input unless overridden. A tuple of bounds into a tuple."""
        return algebra.atom(x, size, step, self.mass, gain)

    def draw(self, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        """An initial weight of norm ``size``."""
        unit = self.norm.draw(self.shape, generator, generator.device, drawing_dtype(generator))
        return (unit * self.size).to(device, dtype)

    def bind(self, domain: Space) -> Self:
        if domain != self.domain:
            raise SpaceMismatch(mismatch(self, self.domain, domain))
        return self

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        name = join(path, self.parameter)
        if name not in params:
            raise InvalidArgument(
                f"{self!r} looked for its parameter {name!r}, but the parameters given are {sorted(params)}. "
                "Pass all that network.init() returns."
            )
        weight = params[name]
        if tuple(weight.shape) != self.shape:
            raise InvalidArgument(
                f"{self!r} has a weight of shape {self.shape}, but {name!r} has shape {tuple(weight.shape)}"
            )
        return applied(self, lambda: self.forward(weight, x), x, weight)

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        constant = step.constant(self.gain)
        size = step.sizes.get(join(path, self.parameter), self.size)
        return _graded(self.rule(x, size, self.mass * step.t, constant.value), constant, f"gain of {self!r}")

    def atoms(self, path: str = "") -> Iterator[tuple[str, Weighted]]:
        yield join(path, self.parameter), self

    def with_mass(self, mass: float) -> Self:
        if not isinstance(mass, int | float):
            raise InvalidArgument(f"with_mass was given {mass!r}; a mass is a finite number ≥ 0")
        return replace(self, mass=self.mass * mass)

    def massed(self, masses: Mapping[str, float], path: str = "") -> Self:
        return replace(self, mass=masses.get(join(path, self.parameter), self.mass))


@dataclass(frozen=True)
class Bond(Module, ABC):
    """A map without weights, known by its Lipschitz constant.

    A final subclass declares ``gain`` and ``at_zero`` (class attribute, field or property; there is no default for the
    unknown) and defines ``forward``; the rest has safe defaults. One that changes the space overrides ``codomain_of``.

    Args:
        on: the domain, once it is known.
    """

    on: Space | None = field(default=None, kw_only=True, repr=False)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if ABC not in cls.__bases__:
            for name in ("gain", "at_zero"):
                if not hasattr(cls, name) and not any(
                    name in inspect.get_annotations(base) for base in cls.__mro__[:-1]
                ):
                    raise UnknownBound(
                        f"the bond {cls.__name__} does not declare `{name}`. Declare its Lipschitz constant as "
                        "`gain = Gain.exact(value, source)` and ‖φ(0)‖ as `at_zero = value`."
                    )
            if isinstance(getattr(cls, "gain", None), int | float):
                raise UnknownBound(
                    f"the bond {cls.__name__} declares `gain` as the bare number {getattr(cls, 'gain')}. Say whence it comes: "  # noqa: B009
                    "`gain = Gain.exact(value, source)`, or `Gain.of(...)` where the worst case and the typical one differ."
                )

    @property
    def limit(self) -> float:
        """sup ‖φ(h)‖ over all inputs, in the codomain's norm."""
        return math.inf

    @property
    def curvature(self) -> float | None:
        """C with ‖φ(h + Δ) − φ(h) − φ′(h)Δ‖ ≤ C·‖Δ‖²: 0 for a linear map, None where unknown or infinite."""
        return None

    @abstractmethod
    def forward(self, x: Any) -> Any:
        """The map, on a batch."""

    def codomain_of(self, domain: Space) -> Space:
        """The space of outputs for inputs from ``domain``.

        Raises:
            SpaceMismatch: the bond does not take it.
        """
        if isinstance(domain, Tuple):
            raise SpaceMismatch(
                f"{self!r} acts on one tensor, but the module before it gives {domain}. Join the branches by Multiply() first."
            )
        return domain

    def domain_of(self, codomain: Space) -> Space | None:
        """The domain that leads to ``codomain``, or None where that does not settle it."""
        return codomain if type(self).codomain_of is Bond.codomain_of else None

    def rule(self, x: Any, gain: float) -> Any:
        """How the bound passes, with the Lipschitz constant to use; of a tuple, a tuple of bounds is passed in.

        Raises:
            UnknownBound: of a tuple, unless overridden.
        """
        if isinstance(x, tuple):
            raise UnknownBound(
                f"{self!r} takes a tuple, of which one Lipschitz constant says nothing. Override rule(self, x, gain), where x holds "
                "one bound for each part, by a rule of modula_agd.bound, such as total, product or attention."
            )
        limit = getattr(self, "at_zero") + gain * x.magnitude  # noqa: B009 (declared by every final subclass)
        if math.isfinite(self.limit):
            limit = algebra.smaller(limit, self.limit)
        return algebra.bond(x, gain, limit, self.curvature)

    @property
    def domain(self) -> Space | None:
        return self.on

    @property
    def codomain(self) -> Space | None:
        return None if self.on is None else self.codomain_of(self.on)

    def bind(self, domain: Space) -> Self:
        if self.on is not None and self.on != domain:
            raise SpaceMismatch(mismatch(self, self.on, domain))
        self.codomain_of(domain)
        return replace(self, on=domain)

    def preimage(self, codomain: Space) -> Space | None:
        return self.on or self.domain_of(codomain)

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        return applied(self, lambda: self.forward(x), x)

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        constant = step.constant(getattr(self, "gain"))  # noqa: B009
        return _graded(self.rule(x, constant.value), constant, f"Lipschitz constant of {self!r}")


@dataclass(frozen=True)
class LinearBond(Bond, ABC):
    """A linear map without weights: 0 at 0, and without a second order. A final subclass still declares its ``gain``."""

    at_zero: ClassVar[float] = 0.0

    @property
    def curvature(self) -> float | None:
        return 0.0
