"""What follows from a network and a loss before any gradient: sizes, masses and norms of the weights, the bound at the steps that a
search tries, the majorant, and the certificate that says what all of it rests on.

Nothing here changes between steps but, where sizes are tracked, the bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from modula_agd.bound import Bound, Number, larger
from modula_agd.curvature import OUTPUTS, slack
from modula_agd.decay import Decay, Relative
from modula_agd.device import precise
from modula_agd.directions import period
from modula_agd.error import UnknownBound
from modula_agd.exchange import Exchange
from modula_agd.loss import Loss
from modula_agd.majorisation import Evidence, Majorant, Search, divergence_bound
from modula_agd.network import Network
from modula_agd.norm import Norm, RowNorm
from modula_agd.run import Constants, Role, Weighted
from modula_agd.sensitivity import depths
from modula_agd.space import Space, brief
from modula_agd.state import Scalar, State
from modula_agd.stretch import farthest


class Plan(NamedTuple):
    """What never changes between steps on one device: kept there, so that no step uploads anything.

    Args:
        points: the search's steps at declared sizes.
        bound: the network's bound at those steps.
        divergence: B(a·(γ − 1)) at those steps.
        sizes: declared ω_k.
        masses: m_k.
        periods: steps that a direction of each parameter serves.
        depths: m_k·d_k, each parameter's part of the depth at declared sizes; empty where nobody asks.
        strides: unit steps that each parameter's typical input bears.
        fades: the part of what a decay takes that each parameter loses.
        least: what the least measured curvature is multiplied with, below 1 where the bound is known to be cautious.
        reaches: the most that each parameter is stretched; empty where none is.
    """

    points: Float[Tensor, " points"]
    bound: Bound
    divergence: Float[Tensor, " points"]
    sizes: Float[Tensor, " parameters"]
    masses: Float[Tensor, " parameters"]
    periods: dict[str, int]
    depths: Float[Tensor, " parameters"]
    strides: Float[Tensor, " parameters"]
    fades: Float[Tensor, " parameters"]
    least: float
    reaches: Float[Tensor, " parameters"]


@dataclass(frozen=True)
class Derivation:
    """A network, a loss and the options of a method; ``agd`` documents each. Its "auto" is None here."""

    network: Network
    loss: Loss
    direction: Literal["spectral", "frobenius"]
    search: Search
    sizes: Literal["prescribed", "tracked"]
    constants: Constants
    magnitude: float
    nonfinite: Literal["raise", "skip"]
    momentum: float | None = None
    smoothing: float | None = None
    refresh: int | None = None
    decay: Decay | None = None
    relaxation: float | None = 1.0
    precision: Literal["auto", "full", "half"] = "auto"
    curvature: Literal["measured", "declared"] = "declared"
    balance: Literal["measured", "declared"] = "declared"
    step_average: float | None = None
    rows: Literal["measured", "declared"] = "declared"
    stretch: Literal["measured", "declared"] = "declared"
    _plans: dict[torch.device, Plan] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def atoms(self) -> dict[str, Weighted]:
        """Each atom by the name of its parameter."""
        return self.network.weights()

    @cached_property
    def masses(self) -> dict[str, float]:
        """m_k of each parameter."""
        return {name: atom.mass for name, atom in self.atoms.items()}

    @cached_property
    def norms(self) -> dict[str, Norm]:
        """The norm in which each parameter's direction is taken."""
        return {
            name: atom.norm if self.direction == "spectral" else atom.norm.euclidean
            for name, atom in self.atoms.items()
        }

    @cached_property
    def strides(self) -> dict[str, float]:
        """How many times as far as a unit step each parameter goes: 1, but of rows that go by their signal, at typical constants."""
        typical = self.constants == "typical" and self.sizes == "prescribed"
        return {name: norm.stride if typical and name in self.row_places else 1.0 for name, norm in self.norms.items()}

    @cached_property
    def row_places(self) -> dict[str, slice]:
        """Where in the state's ``powers`` the rows of each weight lie whose rows go by their signal."""
        places, start = {}, 0
        for name, atom in self.atoms.items():
            if (
                self.rows == "measured"
                and isinstance(self.norms[name], RowNorm)
                and atom.mass > 0
                and len(atom.shape) == 2
            ):
                places[name] = slice(start, start + atom.shape[0])
                start += atom.shape[0]
        return places

    @property
    def row_count(self) -> int:
        """The rows that go by their signal."""
        return sum(place.stop - place.start for place in self.row_places.values())

    @property
    def skips(self) -> bool:
        """Whether a step with a gradient that is not finite is left out."""
        return self.nonfinite == "skip"

    @property
    def measures(self) -> bool:
        """Whether the next gradient is measured along the directions of the steps taken."""
        return "measured" in (self.curvature, self.balance)

    @property
    def noise(self) -> float:
        """What the steadiness of measured descents is, in expectation, of noise alone."""
        past = self.smoothing or 0.0
        return (1 - past) / (1 + past)

    @property
    def _lifts(self) -> bool:
        """Whether scores of classes count as ``OUTPUTS`` at least: where curvature is measured, and the bound is a declared one.

        Of tracked sizes it follows what scores come to, a captured model sees to its own, and of other outputs nothing is known.
        """
        declared = self.sizes == "prescribed" and not self.network.captured
        return self.curvature == "measured" and declared and self.loss.max_norm

    @property
    def needs_evidence(self) -> bool:
        """Whether ``update`` must be given ``evidence``."""
        return self.search.needs_evidence

    def periods(self, device: torch.device) -> dict[str, int]:
        """Steps that one direction of each parameter serves, not compiled."""
        lasting = self._plan(device).periods
        return lasting if self.momentum is not None else dict.fromkeys(lasting, 1)

    def keeps(self, device: torch.device) -> set[str]:
        """The parameters whose direction is kept after a step: it serves again, or the next gradient is measured along it."""
        return {name for name, period in self.periods(device).items() if self.measures or period > 1}

    def sensitivities(self, state: State) -> dict[str, float]:
        """m_k·d_k of each parameter: its part of the depth D = Σ_k m_k·d_k, which is linear in the masses. Waits for the device."""
        return self._depths(dict(zip(self.atoms, state.sizes.tolist(), strict=True)) if self.sizes == "tracked" else {})

    def certificate(self) -> Bound:
        """The network's bound at t = 0 with the loss's own constants counted in: the grade of the whole, and what it assumes."""
        proved, typical = self.loss.conversion(self._codomain())
        bound = self.network.bound(0.0, magnitude=self.magnitude, constants=self.constants)
        bound = bound.graded(self.loss.curvature, f"curvature of {type(self.loss).__name__}")
        bound = bound.graded(proved if self.constants == "proved" else typical, "output norm")
        if not self.search.needs_evidence:
            bound = bound.assuming(
                "orthogonality: the model's curvature is not correlated with the loss gradient (AGD paper, Assumption 1)"
            )
        if self.sizes == "prescribed":
            rate = self.decay.rate if type(self.decay) is Relative else 0.0
            sees = rate >= max(self.strides.values(), default=1.0)
            how = f"which decay sees to while steps are below {1 / rate:g} of a weight" if sees else ""
            what = "prescribed sizes: weight norms stay at most at their declared values"
            bound = bound.assuming(", ".join(filter(None, (what, how))))
        if self.decay is not None:
            bound = bound.assuming("decay: the loss bears what weights lose beside a step, which no descent counts")
        if self.curvature == "measured":
            bound = bound.assuming("measured curvature: the loss stays as curved along steps as the last ones found it")
        if self.balance == "measured":
            bound = bound.assuming(
                "measured balance: the growth is that of equal steps to first order, and taken to be so beyond"
            )
        if any(stride != 1 for stride in self.strides.values()):
            bound = bound.assuming(
                "incoherent rows: features are as little aligned with the rows of logits as in the mean"
            )
        if self.stretch == "measured":
            bound = bound.assuming(
                "stretched weights: the loss bears longer steps of weights whose way from their averages still leads downhill"
            )
        if self.step_average is not None:
            bound = bound.assuming("averaged steps: the loss bears the mean of the steps that past majorants asked for")
        if self.relaxation != 1:
            times = "up to 2" if self.relaxation is None else f"{self.relaxation:g}"
            bound = bound.assuming(f"relaxation: the loss bears steps of {times} times the majorant's minimiser")
        return bound

    def _depths(self, sizes: Mapping[str, Number]) -> dict[str, float]:
        return depths(self.network, self.masses, magnitude=self.magnitude, constants=self.constants, sizes=sizes)

    def spared(self, name: str) -> Role | None:
        """The kind of a parameter that the decay leaves alone; None of one that decays, and without decay."""
        role = self.atoms[name].role
        if role == "logits" and not self.loss.max_norm:
            # to other losses outputs are features
            role = "matrix"
        return role if self.decay is not None and role in self.decay.spares else None

    def _fades(self, name: str) -> float:
        """The part of what a decay takes that a parameter loses."""
        if self.decay is None or self.spared(name) is not None:
            return 0.0
        return min(self.atoms[name].size, 1.0) if self.decay.by_size else 1.0

    def _plan(self, device: torch.device) -> Plan:
        if device not in self._plans:
            scalars = precise(device)
            sizes = torch.tensor([atom.size for atom in self.atoms.values()], device=device, dtype=scalars)
            masses = torch.tensor(list(self.masses.values()), device=device, dtype=scalars)
            # on an accelerator polar factors are cheap
            refresh = self.refresh if self.refresh is not None or device.type == "cpu" else 1
            periods = {name: period(self.norms[name], atom.shape, refresh) for name, atom in self.atoms.items()}
            depths = masses.new_tensor(list(self._depths({}).values()) if self.balance == "measured" else [])
            strides = masses.new_tensor(list(self.strides.values()))
            fades = masses.new_tensor([self._fades(name) for name in self.atoms])
            options = {"magnitude": self.magnitude, "constants": self.constants}
            reaches = masses.new_tensor(farthest(self.network, **options) if self.stretch == "measured" else [])
            points, bound = self._evaluate({}, self.magnitude, device)
            least = self.network.curvature_slack
            if self._lifts:
                least = slack(float(bound.magnitude))
                bound = replace(bound, magnitude=larger(bound.magnitude, OUTPUTS))
            divergence = self._divergence(bound)
            self._plans[device] = Plan(
                points, bound, divergence, sizes, masses, periods, depths, strides, fades, least, reaches
            )
        return self._plans[device]

    def _evaluate(self, sizes: Mapping[str, Number], magnitude: Number, device: torch.device) -> tuple[Tensor, Bound]:
        options = {"magnitude": magnitude, "constants": self.constants, "sizes": sizes}
        points = self.search.points(self.network.bound(0.0, **options), device)
        return points, self.network.bound(points, **options)

    def _majorant(self, descent: Scalar, sizes: Tensor, device: torch.device, evidence: Evidence | None) -> Majorant:
        if self.sizes == "prescribed":
            plan = self._plan(device)
            points, bound, divergence = plan.points, plan.bound, plan.divergence
        else:
            # an all-zero batch has magnitude 0, of which relative quantities cannot be taken
            magnitude = self.magnitude if evidence is None else evidence.magnitude.to(sizes).clamp(min=1e-30)
            points, bound = self._evaluate(dict(zip(self.atoms, sizes.unbind(), strict=True)), magnitude, device)
            divergence = self._divergence(bound)
        residual = evidence.residual.to(descent) if self.needs_evidence and evidence is not None else None
        return Majorant(
            points, bound, divergence, self.loss.curvature.value * self._conversion() ** 2, descent, residual
        )

    def _divergence(self, bound: Bound) -> Tensor:
        factor = self._conversion()
        return divergence_bound(bound, lambda delta: self.loss.bound(factor * delta))

    def _conversion(self) -> float:
        proved, typical = self.loss.conversion(self._codomain())
        return proved.value if self.constants == "proved" else typical.value

    def _codomain(self) -> Space:
        if not self.network.captured:
            settled(self.network, self.network.domain)
        return settled(self.network, self.network.codomain)

    def _sizes(self, params: Mapping[str, Tensor], device: torch.device, exchange: Exchange) -> Tensor:
        """ω_k: declared, or a certified bound of the current norm, never below the floor."""
        if self.sizes == "prescribed":
            return self._plan(device).sizes
        norms = {name: atom.norm for name, atom in self.atoms.items()}
        bounds = exchange.numbers(
            lambda norm, weight: norm.bound(weight), norms, {name: params[name] for name in norms}
        )
        floored = [bounds[name].clamp(min=atom.floor) for name, atom in self.atoms.items()]
        return torch.stack(floored).to(precise(device))


def settled(network: Network, space: Space | None) -> Space:
    """The space, or ``UnknownBound`` where the network does not know it."""
    if space is None:
        raise UnknownBound(
            f"{brief(network)} has no settled spaces. Compose it with a typed module such as Linear, or name its domain: "
            "network.bind(Features(3))."
        )
    return space
