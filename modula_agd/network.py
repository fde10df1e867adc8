"""What a typed, bound-aware map declares, and what a network can do on the strength of it.

A network holds no weights and no state: parameters are a flat ``dict[str, Tensor]`` with the names of a ``state_dict``, so it is a
pure function of them. It declares its spaces, how it is applied, and how a bound passes through it; initial weights, bounds,
the printed table and the ``torch.nn`` face follow. ``module.py`` has the algebra that networks are composed by.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from modula_agd import bound as algebra
from modula_agd.bound import Bound, Number
from modula_agd.error import InvalidArgument, SpaceMismatch, UnknownBound
from modula_agd.norm import Norm
from modula_agd.run import EVALUATION, Constants, Parameters, Run, Step, Weighted
from modula_agd.space import Mask, Sequence, Space, Tokens, Tuple, brief
from modula_agd.summary import Row, summary
from modula_agd.torch_module import TorchModule


def join(path: str, name: str) -> str:
    """The dotted name of a part below ``path``; either may be empty."""
    return f"{path}.{name}" if path and name else path or name


class Network(ABC):
    """A typed, bound-aware map: what each declares, and what follows for all. ``Module`` adds the operators."""

    captured: ClassVar[bool] = False
    """Whether the bound was measured on an example rather than declared: it is then as tight as it is uncertain."""

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
    def bind(self, domain: Space) -> Self:
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
    def curvature_slack(self) -> float:
        """What the least curvature that may be measured is multiplied with: below 1 where the bound is known to be cautious."""
        return 1.0

    @property
    def children(self) -> tuple[tuple[str, "Network"], ...]:
        """Submodules with the names they add to the path."""
        return ()

    def rebuilt(self, children: tuple[Any, ...]) -> Self:
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

        Raises:
            InvalidArgument: the generator is neither.
        """
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        if not isinstance(generator, torch.Generator):
            raise InvalidArgument(
                f"initial weights of {brief(self)} were asked for with {generator!r} in the place of a generator. Pass a seed such as 0, "
                "or a torch.Generator."
            )
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

    def with_mass(self, mass: float) -> Self:
        """The same module with every atom's mass multiplied: its share of each step. 0 freezes it.

        Args:
            mass: dimensionless, ≥ 0.
        """
        return self.rebuilt(tuple(child.with_mass(mass) for _, child in self.children))

    def with_masses(self, masses: Mapping[str, float]) -> Self:
        """The same module with these masses of some parameters, which replace their own.

        Args:
            masses: dimensionless, ≥ 0, by name as ``init`` has it; 0 freezes a parameter.

        Raises:
            InvalidArgument: there is no parameter of a name, or a mass is none.
        """
        names = self.weights()
        unknown = sorted(map(str, set(masses) - set(names))) if isinstance(masses, Mapping) else [repr(masses)]
        if unknown:
            raise InvalidArgument(
                f"with_masses was given {', '.join(unknown)}, but takes masses by the name of a parameter: {', '.join(names)}"
            )
        return self.massed(masses)

    def massed(self, masses: Mapping[str, float], path: str = "") -> Self:
        """``with_masses`` of a part of a network that lies at ``path``."""
        return self.rebuilt(tuple(child.massed(masses, join(path, name)) for name, child in self.children))

    def to_torch(self, generator: torch.Generator | int = 0, **options: Any) -> TorchModule:
        """A ``torch.nn.Module`` with freshly drawn parameters of the same names; options as for ``init``."""
        return TorchModule(self, self.init(generator, **options), self.buffers(**options))

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
    """The bound of an input: of ids 1, and of masks, which no rule multiplies; each part of a tuple has a bound of its own."""
    if isinstance(domain, Tuple):
        return tuple(_source(part, magnitude) for part in domain.parts)
    return algebra.source(1.0 if isinstance(domain, Tokens | Mask) else magnitude)
