"""Wiring: how tuples of activations and shared weights pass through a network.

====================  =================================================================================================
``each(a, b)``        the first module on the first part of a tuple, the second on the second
``Take(i)``           the i-th part of a tuple
``Shared(name, a)``   ``a`` with weights that every use of the name shares
====================  =================================================================================================
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from modula_agd.bound import Bound, Gain
from modula_agd.error import InvalidArgument, SpaceMismatch, UnknownBound
from modula_agd.layer import Bond
from modula_agd.module import Composite, Module, Wrapper, parts_of, tuple_of
from modula_agd.run import EVALUATION, Parameters, Run, Step, Weighted
from modula_agd.space import Space, Tuple


@dataclass(frozen=True)
class Parallel(Composite):
    """Several modules side by side, each on its own part of a tuple; written as ``each(a, b)``."""

    @property
    def domain(self) -> Space | None:
        return tuple_of([part.domain for part in self.parts])

    @property
    def codomain(self) -> Space | None:
        return tuple_of([part.codomain for part in self.parts])

    def bind(self, domain: Space) -> Self:
        spaces = domain.parts if isinstance(domain, Tuple) else ()
        if len(spaces) != len(self.parts):
            raise SpaceMismatch(
                f"{self!r} takes a tuple of {len(self.parts)}, but the module before it gives {domain}. "
                "Put as many branches before it, written as a tuple."
            )
        return replace(self, parts=tuple(part.bind(space) for part, space in zip(self.parts, spaces, strict=True)))

    def preimage(self, codomain: Space) -> Space | None:
        spaces = codomain.parts if isinstance(codomain, Tuple) else ()
        if len(spaces) != len(self.parts):
            return self.domain
        return tuple_of([part.preimage(space) for part, space in zip(self.parts, spaces, strict=True)])

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        values = iter(parts_of(self, x, len(self.parts)))
        return tuple(self._each(lambda part, name: part.apply(params, next(values), name, run), path))

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        bounds = iter(parts_of(self, x, len(self.parts)))
        return tuple(self._each(lambda part, name: part.propagate(next(bounds), step, name), path))

    def __repr__(self) -> str:
        return f"each({', '.join(map(repr, self.parts))})"


def each(*parts: Module) -> Module:
    """Modules side by side: the first on the first part of a tuple, the second on the second, and so on.

    Args:
        parts: one for each part of the tuple; ``Identity()`` passes one on.

    Raises:
        SpaceMismatch: there is none, or one is no module.
    """
    for part in parts:
        if not isinstance(part, Module):
            raise SpaceMismatch(f"each was given {part!r}, which is not a module. Wrap a function as a Bond.")
    if not parts:
        raise SpaceMismatch("each was given no module; give one for each part of the tuple that comes before it")
    return Parallel(parts)


@dataclass(frozen=True)
class Shared(Wrapper):
    """A module whose weights are named once and for all, so that every use of the name has the same ones.

    A weight counts once per use in the bound, and is one parameter, drawn once and moved once. Uses may be different
    modules over weights of one declaration, such as an ``Embedding`` and the ``Unembedding`` tied to it.

    Args:
        name: the root of the parameters' names, an identifier.
        inner: the module.

    Raises:
        InvalidArgument: the name is no identifier, or the other no module.
    """

    name: str
    inner: Module

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.isidentifier() and isinstance(self.inner, Module)):
            raise InvalidArgument(
                f"Shared takes a name such as 'embedding' and a module, but got {self.name!r} and {self.inner!r}"
            )

    @property
    def children(self) -> tuple[tuple[str, Module], ...]:
        return ((self.name, self.inner),)

    def atoms(self, path: str = "") -> Iterator[tuple[str, Weighted]]:
        return self.inner.atoms(self.name)

    def massed(self, masses: Mapping[str, float], path: str = "") -> Self:
        return self.rebuilt((self.inner.massed(masses, self.name),))

    def buffers(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, path: str = ""
    ) -> dict[str, Tensor]:
        return self.inner.buffers(device, dtype, self.name)

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        return self.inner.apply(params, x, self.name, run)

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        return self.inner.propagate(x, step, self.name)

    def __repr__(self) -> str:
        return f"Shared({self.name!r}, {self.inner!r})"


@dataclass(frozen=True)
class Take(Bond):
    """One part of a tuple.

    Args:
        index: which, from 0.

    Raises:
        InvalidArgument: it is no integer of at least 0.
    """

    index: int
    gain: ClassVar[Gain] = Gain.exact(1.0, "nothing happens to the part", "any")
    at_zero: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 0:
            raise InvalidArgument(f"Take was given the index {self.index!r}, which must be an integer of at least 0")

    def codomain_of(self, domain: Space) -> Space:
        parts = domain.parts if isinstance(domain, Tuple) else ()
        if not 0 <= self.index < len(parts):
            raise SpaceMismatch(f"{self!r} takes a part of a tuple, but the module before it gives {domain}")
        return parts[self.index]

    def domain_of(self, codomain: Space) -> Space | None:
        return None

    def rule(self, x: Any, gain: float) -> Any:
        if isinstance(x, Bound):
            raise UnknownBound(f"the bound of {self!r} was asked for by itself, but it takes a part of a tuple")
        return self._taken(x)

    def forward(self, x: Any) -> Any:
        return self._taken(x)

    def _taken(self, x: Any) -> Any:
        # a tensor would give one of its samples
        if not isinstance(x, tuple) or self.index >= len(x):
            given = f"a tuple of {len(x)}" if isinstance(x, tuple) else f"one {type(x).__name__}"
            raise SpaceMismatch(f"{self!r} takes a part of a tuple, but was given {given}")
        return x[self.index]

    def __repr__(self) -> str:
        return f"Take({self.index})"
