"""Typed modules and their algebra.

A module maps a domain to a codomain and says how a bound passes through it (``network.py``). Modules compose:

====================  =================================================================================================
``outer @ inner``     composition; the right one acts first, spaces must meet
``a + b``             both applied to the same input, outputs added
``c * a``             output multiplied by a number (write ``(c * a) @ b``: ``*`` and ``@`` have one precedence)
``f @ (a, b)``        both applied to the same input, outputs side by side
``a ** n``            n copies in a chain, each with weights of its own
====================  =================================================================================================

*Atoms* have one weight each, *bonds* have none (``layer.py``); every network is an expression over them. Final classes
are frozen dataclasses, and a final class is never subclassed. The vocabulary is that of Large et al. 2024
(arXiv:2405.14813).
"""

import inspect
import math
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from modula_agd import bound as algebra
from modula_agd.bound import Bound
from modula_agd.error import InvalidArgument, SpaceMismatch, UnknownBound
from modula_agd.network import Network, join
from modula_agd.run import EVALUATION, Parameters, Run, Step
from modula_agd.space import Space, Tuple, brief, positive


class Module(Network, ABC):
    """A network that composes by operators. Abstract or final: a class that can be instantiated cannot be subclassed."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in cls.__mro__[1:]:
            if issubclass(base, Module) and not inspect.isabstract(base) and ABC not in base.__bases__:
                raise TypeError(
                    f"{cls.__name__} subclasses {base.__name__}, which is final. Subclass Atom or Bond, or compose modules."
                )

    def __matmul__(self, inner: "Module | tuple[Module, ...]") -> "Module":
        return compose(self, inner)

    def __rmatmul__(self, outer: "tuple[Module, ...]") -> "Module":
        return compose(outer, self)

    def __add__(self, other: "Module") -> "Module":
        if not isinstance(other, Module):
            return NotImplemented
        left = self.parts if isinstance(self, Sum) else (self,)
        right = other.parts if isinstance(other, Sum) else (other,)
        return Sum(_agreeing((*left, *right), "+"))

    def __rmul__(self, factor: float) -> "Module":
        if isinstance(factor, Module):
            return NotImplemented
        if not isinstance(factor, int | float) or not math.isfinite(factor) or factor == 0:
            raise InvalidArgument(
                f"{factor!r} * {self!r}: the factor must be a finite number other than 0; drop the branch instead"
            )
        return Scaled(float(factor), self)

    def __mul__(self, factor: float) -> "Module":
        if isinstance(factor, Module):
            raise InvalidArgument(f"{self!r} * {factor!r}: modules compose with @ and multiply as Multiply() @ (a, b)")
        raise InvalidArgument(f"{self!r} * {factor!r}: write the number at the left, ({factor!r} * module)")

    def __pow__(self, copies: int) -> "Module":
        positive("the exponent of a module", copies)
        parts = list(self.parts if isinstance(self, Compose) else (self,))
        return Compose(_settled(parts * copies)) if copies > 1 else self


def mismatch(module: Module, takes: object, given: object) -> str:
    """The text of a ``SpaceMismatch`` where two modules meet."""
    several = isinstance(given, Tuple) and not isinstance(takes, Tuple)
    remedy = (
        "Add the branches with +, or put a module between them that takes a tuple (Multiply, Attention, Take)."
        if several
        else f"Change one of the two, build this one for {given}, or put a module between them that maps {given} to {takes} "
        "(Flatten, Mean, a Linear)."
    )
    return f"{brief(module)} takes {takes}, but the module before it gives {given}. {remedy}"


def _agreeing(parts: tuple[Module, ...], sign: str) -> tuple[Module, ...]:
    """Branches on one input, bound to the domain that any of them settles."""
    domains = dict.fromkeys(part.domain for part in parts if part.domain is not None)
    if len(domains) > 1:
        raise SpaceMismatch(
            f"{f' {sign} '.join(map(brief, parts))}: the branches take {' and '.join(map(str, domains))}, not one space"
        )
    return tuple(part.bind(domain) for part in parts for domain in domains) if domains else parts


def compose(outer: "Module | tuple[Module, ...]", inner: "Module | tuple[Module, ...]") -> Module:
    """outer ∘ inner, flattened into one chain whose spaces have been checked; tuples become ``Branches``."""
    sides = [Branches(_agreeing(side, ",")) if isinstance(side, tuple) else side for side in (inner, outer)]
    for side in sides:
        if not isinstance(side, Module):
            raise SpaceMismatch(
                f"composition with @ was attempted with {side!r}, which is not a module. Wrap a function as a Bond."
            )
    chain = [part for side in sides for part in (side.parts if isinstance(side, Compose) else (side,))]
    return Compose(_settled(chain))


def _settled(chain: list[Module]) -> tuple[Module, ...]:
    """Check each meeting of two spaces, letting typed modules settle the domains of their untyped neighbours."""
    first = next((index for index, part in enumerate(chain) if part.domain is not None), len(chain))
    while 0 < first < len(chain):
        domain = chain[first].domain
        before = chain[first - 1].preimage(domain) if domain is not None else None
        if before is None:
            break
        first -= 1
        chain[first] = chain[first].bind(before)
    space = chain[first].domain if first < len(chain) else None
    for index in range(first, len(chain)):
        if space is None:
            break
        chain[index] = chain[index].bind(space)
        space = chain[index].codomain
    return tuple(chain)


def parts_of(module: Module, x: Any, count: int) -> tuple[Any, ...]:
    """The parts of what a module that takes several was given: activations, or bounds."""
    if isinstance(x, Bound):
        raise UnknownBound(
            f"the bound of {module!r} was asked for by itself, but it takes a tuple of {count}. Put as many branches before it."
        )
    if not isinstance(x, tuple) or len(x) != count:
        given = f"a tuple of {len(x)}" if isinstance(x, tuple) else f"one {type(x).__name__}"
        raise SpaceMismatch(
            f"{module!r} takes a tuple of {count}, but was given {given}. Put as many branches before it, written as a tuple."
        )
    return x


def tuple_of(spaces: list[Space | None]) -> Space | None:
    """The tuple of spaces once each is known."""
    known = tuple(space for space in spaces if space is not None)
    return Tuple(known) if len(known) == len(spaces) else None


@dataclass(frozen=True)
class Composite(Module, ABC):
    """Shared by the modules that are made of others."""

    parts: tuple[Module, ...]

    @property
    def children(self) -> tuple[tuple[str, Module], ...]:
        return tuple((str(index), part) for index, part in enumerate(self.parts))

    def rebuilt(self, children: tuple[Any, ...]) -> Self:
        return replace(self, parts=children)

    @property
    def domain(self) -> Space | None:
        return self.parts[0].domain

    def _each(self, visit: Callable[[Module, str], Any], path: str) -> list[Any]:
        return [visit(part, join(path, str(index))) for index, part in enumerate(self.parts)]


@dataclass(frozen=True)
class Compose(Composite):
    """A chain, in order of application; parameters are named by position, as in ``torch.nn.Sequential``."""

    @property
    def codomain(self) -> Space | None:
        return self.parts[-1].codomain

    def bind(self, domain: Space) -> Self:
        return replace(self, parts=_settled([self.parts[0].bind(domain), *self.parts[1:]]))

    def preimage(self, codomain: Space) -> Space | None:
        space: Space | None = codomain
        for part in reversed(self.parts):
            space = part.preimage(space) if space is not None else part.domain
        return space

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        for index, part in enumerate(self.parts):
            x = part.apply(params, x, join(path, str(index)), run)
        return x

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        for index, part in enumerate(self.parts):
            x = part.propagate(x, step, join(path, str(index)))
        return x

    def __repr__(self) -> str:
        return " @ ".join(
            f"({part!r})" if isinstance(part, Scaled | Sum) else repr(part) for part in reversed(self.parts)
        )


@dataclass(frozen=True)
class Sum(Composite):
    """Branches on one input, added."""

    def __post_init__(self) -> None:
        codomains = dict.fromkeys(part.codomain for part in self.parts if part.codomain is not None)
        if len(codomains) > 1:
            raise SpaceMismatch(
                f"{brief(self)}: the branches give {' and '.join(map(str, codomains))}, which cannot be added. "
                "Let every branch end in the same space."
            )

    @property
    def codomain(self) -> Space | None:
        return self.parts[0].codomain

    def bind(self, domain: Space) -> Self:
        return replace(self, parts=tuple(part.bind(domain) for part in self.parts))

    def preimage(self, codomain: Space) -> Space | None:
        return self.domain or self.parts[0].preimage(codomain)

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        first, *rest = self._each(lambda part, name: part.apply(params, x, name, run), path)
        for value in rest:
            try:
                first = first + value
            except RuntimeError as error:
                raise SpaceMismatch(
                    f"the branches of {brief(self)} gave {tuple(first.shape)} and {tuple(value.shape)}, which cannot be added. Let "
                    "every branch keep as many positions: pad a convolution, or give inputs that its strides divide."
                ) from error
        return first

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        return algebra.total(self._each(lambda part, name: part.propagate(x, step, name), path))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


@dataclass(frozen=True)
class Branches(Composite):
    """Several modules on one input, outputs side by side; written as a tuple."""

    @property
    def codomain(self) -> Space | None:
        return tuple_of([part.codomain for part in self.parts])

    def bind(self, domain: Space) -> Self:
        return replace(self, parts=tuple(part.bind(domain) for part in self.parts))

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        return tuple(self._each(lambda part, name: part.apply(params, x, name, run), path))

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        return tuple(self._each(lambda part, name: part.propagate(x, step, name), path))

    def __repr__(self) -> str:
        return f"({', '.join(map(repr, self.parts))})"


class Wrapper(Module, ABC):
    """Shared by the modules that have the spaces of the one inside."""

    inner: Module  # a field of every final subclass, after its own

    @property
    def domain(self) -> Space | None:
        return self.inner.domain

    @property
    def codomain(self) -> Space | None:
        return self.inner.codomain

    def rebuilt(self, children: tuple[Any, ...]) -> Self:
        return replace(self, inner=children[0])  # pyright: ignore[reportArgumentType] (finals are dataclasses)

    def bind(self, domain: Space) -> Self:
        return replace(self, inner=self.inner.bind(domain))  # pyright: ignore[reportArgumentType]

    def preimage(self, codomain: Space) -> Space | None:
        return self.inner.preimage(codomain)


@dataclass(frozen=True)
class Scaled(Wrapper):
    """A module whose output is multiplied by a number."""

    factor: float
    inner: Module

    @property
    def children(self) -> tuple[tuple[str, Module], ...]:
        return (("", self.inner),)

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        return self.factor * self.inner.apply(params, x, path, run)

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        return algebra.scaled(self.inner.propagate(x, step, path), self.factor)

    def __repr__(self) -> str:
        inner = repr(self.inner)
        return f"{self.factor:g} * {inner}" if not isinstance(self.inner, Composite) else f"{self.factor:g} * ({inner})"
