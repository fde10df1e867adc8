"""Typed modules and their algebra.

A module maps a domain to a codomain and says how a bound passes through it. It holds no weights and no state: parameters
are a flat ``dict[str, Tensor]`` with the names of a ``state_dict``, so a network is a pure function of them.

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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modula_agd import bound as algebra
from modula_agd.bound import Bound, Number
from modula_agd.error import InvalidArgument, SpaceMismatch, UnknownBound
from modula_agd.norm import Norm
from modula_agd.run import EVALUATION, Constants, Parameters, Run, Step, Weighted
from modula_agd.space import Mask, Sequence, Space, Tokens, Tuple, brief, positive
from modula_agd.summary import Row, summary
from modula_agd.torch_module import TorchModule


def join(path: str, name: str) -> str:
    """The dotted name of a part below ``path``; either may be empty."""
    return f"{path}.{name}" if path and name else path or name


class Module(ABC):
    """A typed, bound-aware map. Abstract or final: a class that can be instantiated cannot be subclassed."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in cls.__mro__[1:]:
            if issubclass(base, Module) and not inspect.isabstract(base) and ABC not in base.__bases__:
                raise TypeError(
                    f"{cls.__name__} subclasses {base.__name__}, which is final. Subclass Atom or Bond, or compose modules."
                )

    # -- what a module declares ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def domain(self) -> Space | None:
        """The space of inputs; None while a module that takes several kinds has not met a typed neighbour."""

    @property
    @abstractmethod
    def codomain(self) -> Space | None:
        """The space of outputs; None likewise."""

    @abstractmethod
    def bind(self, domain: Space) -> "Module":
        """This module with its domain settled, or ``SpaceMismatch``."""

    @abstractmethod
    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        """The map itself, on a batch; ``path`` is the prefix of this module's parameter names."""

    @abstractmethod
    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        """The bound of the output, from the bound of the input (tuples of bounds where there are branches)."""

    def preimage(self, codomain: Space) -> Space | None:
        """The domain that leads to this codomain, where it is settled by it."""
        return self.domain

    @property
    def children(self) -> tuple[tuple[str, "Module"], ...]:
        """Submodules with the names they add to the path."""
        return ()

    def rebuilt(self, children: tuple["Module", ...]) -> "Module":
        """The same module with other children."""
        return self

    # -- what follows ----------------------------------------------------------------------------------------------------

    def __call__(self, params: Parameters, x: Any, buffers: Parameters | None = None) -> Any:
        """Apply the network to a batch, as in evaluation: running statistics, no dropout.

        Args:
            params: every parameter by name, as ``init`` returns them.
            x: a batch in the domain.
            buffers: running statistics by name, which only a network with batch norm has.

        Raises:
            SpaceMismatch: the batch is not in the domain.
            InvalidArgument: a parameter or a running statistic is missing.
        """
        self._check(params, x, buffers)
        return self.apply(params, x, "", Run(buffers=buffers or {}))

    def run(
        self,
        params: Parameters,
        x: Any,
        buffers: Parameters | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Apply the network as in training: statistics of the batch itself, dropout on. Pure.

        Args:
            params: every parameter by name.
            x: a batch in the domain.
            buffers: running statistics so far; those that the network starts with by default.
            generator: source of dropout's masks, on the batch's device; needed by a network with dropout alone.

        Returns:
            The outputs, and the running statistics with this batch counted in; ``{}`` for most networks.

        Raises:
            SpaceMismatch: the batch is not in the domain, or is one sequence without a batch dimension.
            InvalidArgument: a parameter is missing, or dropout has no generator.
        """
        self._check(params, x, buffers)
        if isinstance(self.domain, Sequence) and x.ndim == self.domain.sample:
            # [batch, features] fits too, and attention would mix the samples
            raise SpaceMismatch(
                f"{brief(self)} was trained on a tensor of shape {tuple(x.shape)}, but takes {self.domain} = {self.domain.shape}. Pass "
                f"{x.shape[0]} samples of one position as x[:, None], one sample of {x.shape[0]} positions as x[None]."
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise InvalidArgument(
                f"{brief(self)} was run with generator={generator!r}. Pass a torch.Generator, such as "
                "torch.Generator().manual_seed(0)."
            )
        run = Run(True, generator, buffers or {})
        return self.apply(params, x, "", run), {**run.buffers, **run.renewed}

    def _check(self, params: object, x: Any, buffers: object) -> None:
        if not isinstance(params, Mapping):
            raise InvalidArgument(
                f"{brief(self)} was given {type(params).__name__} in the place of its parameters. Pass the dictionary that "
                "network.init() returns, or dict(model.named_parameters()), and then the inputs."
            )
        if self.domain is not None:
            self.domain.check(x, self)
        if buffers is not None and not isinstance(buffers, Mapping):
            raise InvalidArgument(
                f"{brief(self)} was given {type(buffers).__name__} in the place of its running statistics. Pass the dictionary "
                "that network.run returned, a generator by name, and several inputs, such as a mask, as one tuple."
            )

    def buffers(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, path: str = ""
    ) -> dict[str, Tensor]:
        """The running statistics that training starts with, by name; ``{}`` unless there is a batch norm."""
        own = [child.buffers(device, dtype, join(path, name)) for name, child in self.children]
        return {name: value for part in own for name, value in part.items()}

    def atoms(self, path: str = "") -> Iterator[tuple[str, Weighted]]:
        """Each use of an atom with the name of its parameter, in order of application."""
        for name, child in self.children:
            yield from child.atoms(join(path, name))

    def weights(self) -> dict[str, Weighted]:
        """Each parameter with the atom that declares its shape, norm, size and mass; a shared one once.

        Raises:
            InvalidArgument: two uses of a shared weight declare it differently.
        """
        found: dict[str, Weighted] = {}
        for name, atom in self.atoms():
            first = found.setdefault(name, atom)
            if _declared(first) != _declared(atom):
                raise InvalidArgument(
                    f"{first!r} and {atom!r} share the weight {name!r}, but declare {_declared(first)} and {_declared(atom)}. "
                    "Uses of one weight agree in shape, norm, size and mass."
                )
        return found

    def init(
        self, generator: torch.Generator | int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Draw initial weights, each of its declared size (biases zero).

        Args:
            generator: the source of randomness, or a seed for one on the CPU; equal seeds give equal weights.
            device: where the weights shall live.
            dtype: their dtype; drawn in float64 and rounded once.
        """
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        place = torch.device(device)
        return {name: atom.draw(generator, place, dtype) for name, atom in self.weights().items()}

    def bound(
        self,
        t: Number = 0.0,
        *,
        magnitude: Number = 1.0,
        constants: Constants = "typical",
        sizes: Mapping[str, Number] | None = None,
    ) -> Bound:
        """The bound of the network's output under a relative step t of every atom.

        Args:
            t: dimensionless, ≥ 0; a number or a tensor of step sizes to evaluate at.
            magnitude: a₀ with ‖input‖ ≤ a₀ for every sample.
            constants: "typical" (mean-field) or "proved" (worst case).
            sizes: tracked weight norms by parameter name; declared sizes where absent.
        """
        if constants not in ("typical", "proved"):
            raise InvalidArgument(f"a bound was asked for with constants={constants!r}; choose 'typical' or 'proved'")
        end = self.propagate(_source(self.domain, magnitude), Step(t, constants, sizes or {}))
        if not isinstance(end, Bound):
            raise UnknownBound(
                f"{brief(self)} gives a tuple, which has no single bound. Compose it with Multiply() or the like."
            )
        return end

    def with_mass(self, mass: float) -> "Module":
        """The same module with every atom's mass multiplied: its share of each step. 0 freezes it.

        Args:
            mass: dimensionless, ≥ 0.
        """
        return self.rebuilt(tuple(child.with_mass(mass) for _, child in self.children))

    def to_torch(self, generator: torch.Generator | int = 0, **options: Any) -> TorchModule:
        """A ``torch.nn.Module`` with freshly drawn parameters of the same names; options as for ``init``."""
        return TorchModule(self, self.init(generator, **options), self.buffers(**options))

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

    def __str__(self) -> str:
        rows = [Row(name, repr(atom), atom.shape, str(atom.norm), atom.mass) for name, atom in self.weights().items()]
        try:
            return summary(rows, self.bound(), self._proved())
        except UnknownBound as error:
            return f"{self!r}\n(no table: {error})" if rows else repr(self)

    def _proved(self) -> Bound | None:
        """The bound by proved constants, None where a layer has none."""
        try:
            return self.bound(constants="proved")
        except UnknownBound:
            return None


def _declared(atom: Weighted) -> tuple[tuple[int, ...], Norm, float, float]:
    return atom.shape, atom.norm, atom.size, atom.mass


def _source(domain: Space | None, magnitude: Number) -> Any:
    """The bound of an input: ids and masks have norm 1, each part of a tuple has a bound of its own."""
    if isinstance(domain, Tuple):
        return tuple(_source(part, magnitude) for part in domain.parts)
    return algebra.source(1.0 if isinstance(domain, Tokens | Mask) else magnitude)


# -- the algebra ---------------------------------------------------------------------------------------------------------


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

    def rebuilt(self, children: tuple[Module, ...]) -> Module:
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

    def bind(self, domain: Space) -> Module:
        return Compose(_settled([self.parts[0].bind(domain), *self.parts[1:]]))

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

    def bind(self, domain: Space) -> Module:
        return Sum(tuple(part.bind(domain) for part in self.parts))

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

    def bind(self, domain: Space) -> Module:
        return Branches(tuple(part.bind(domain) for part in self.parts))

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        return tuple(self._each(lambda part, name: part.apply(params, x, name, run), path))

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        return tuple(self._each(lambda part, name: part.propagate(x, step, name), path))

    def __repr__(self) -> str:
        return f"({', '.join(map(repr, self.parts))})"


@dataclass(frozen=True)
class Scaled(Module):
    """A module whose output is multiplied by a number."""

    factor: float
    inner: Module

    @property
    def domain(self) -> Space | None:
        return self.inner.domain

    @property
    def codomain(self) -> Space | None:
        return self.inner.codomain

    @property
    def children(self) -> tuple[tuple[str, Module], ...]:
        return (("", self.inner),)

    def rebuilt(self, children: tuple[Module, ...]) -> Module:
        return Scaled(self.factor, *children)

    def bind(self, domain: Space) -> Module:
        return Scaled(self.factor, self.inner.bind(domain))

    def preimage(self, codomain: Space) -> Space | None:
        return self.inner.preimage(codomain)

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        return self.factor * self.inner.apply(params, x, path, run)

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        return algebra.scaled(self.inner.propagate(x, step, path), self.factor)

    def __repr__(self) -> str:
        inner = repr(self.inner)
        return f"{self.factor:g} * {inner}" if not isinstance(self.inner, Composite) else f"{self.factor:g} * ({inner})"
