"""The engine: two pure functions, ``init`` and ``update``, built from a network and a loss.

It knows no layer and no loss by name. One update:

1. each atom's norm turns its gradient g_k into a unit dual direction u_k, and ⟨g_k, u_k⟩ is its share of the descent;
2. the search minimises the majorant (``majorisation.py``), which gives one number t;
3. each weight moves by −t·m_k·ω_k·u_k.

On minibatches the direction and its descent are told apart (``held_out.py``).

All scalars stay on the device, so that a step waits for nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from modula_agd.bound import Bound, Number
from modula_agd.device import precise
from modula_agd.error import InvalidArgument, NonFiniteGradient, UnknownBound
from modula_agd.held_out import measured, renewed
from modula_agd.loss import Loss
from modula_agd.majorisation import Evidence, Majorant, Search
from modula_agd.module import Module
from modula_agd.norm import Direction, wide
from modula_agd.run import Constants, Weighted
from modula_agd.space import Space, brief
from modula_agd.state import Scalar, State, odd_momentum


class Plan(NamedTuple):
    """What never changes between steps on one device: kept there, so that no step uploads anything.

    Args:
        points: the search's steps at declared sizes.
        bound: the network's bound at those steps.
        sizes: declared ω_k.
        masses: m_k.
    """

    points: Float[Tensor, " points"]
    bound: Bound
    sizes: Float[Tensor, " parameters"]
    masses: Float[Tensor, " parameters"]


@dataclass(frozen=True)
class Method:
    """An optimisation method for one network and one loss; made by ``agd``, whose arguments its fields are."""

    network: Module
    loss: Loss
    direction: Literal["spectral", "frobenius"]
    search: Search
    sizes: Literal["prescribed", "tracked"]
    constants: Constants
    magnitude: float
    nonfinite: Literal["raise", "skip"]
    momentum: float | None = None
    _plans: dict[torch.device, Plan] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def atoms(self) -> dict[str, Weighted]:
        """Each atom by the name of its parameter."""
        return self.network.weights()

    @property
    def needs_evidence(self) -> bool:
        """Whether ``update`` must be given ``evidence``."""
        return self.search.needs_evidence

    def objective(
        self,
        params: Mapping[str, Tensor],
        inputs: Any,
        targets: Tensor,
        generator: torch.Generator | None = None,
    ) -> Scalar:
        """The mean loss of a batch as in training, to be differentiated in ``params``.

        Args:
            params: every parameter by name.
            inputs: a batch in the network's domain.
            targets: as the loss takes them.
            generator: source of dropout's masks; needed by a network with dropout alone.
        """
        return self.loss(self.network.run(params, inputs, generator=generator)[0], targets)

    def evidence(
        self,
        params: Mapping[str, Tensor],
        inputs: Any,
        targets: Tensor,
        generator: torch.Generator | None = None,
    ) -> Evidence:
        """R and a₀ of a batch, by one forward pass; of dropout, with a generator in the state that the gradient's had."""
        with torch.no_grad():
            domain, codomain = self._spaces()
            outputs, _ = self.network.run(params, inputs, generator=generator)
            residual = self.loss.residual(outputs, targets, codomain)
            return Evidence(residual, domain.norm(inputs).amax())

    def init(self, params: Mapping[str, Tensor]) -> State:
        """The state before the first update; holds no weight-sized tensor.

        Raises:
            InvalidArgument: the parameters are not the network's.
        """
        atoms = self.atoms
        if set(params) != set(atoms):
            raise InvalidArgument(
                f"the method was built for a network with parameters {sorted(atoms)}, but was given {sorted(params)}. "
                "Pass what network.init() returns."
            )
        for name, atom in atoms.items():
            if tuple(params[name].shape) != atom.shape:
                raise InvalidArgument(
                    f"parameter {name!r} has shape {tuple(params[name].shape)}, but its module declares {atom.shape}"
                )
        device = next(iter(params.values())).device
        plan = self._plan(device)
        zero = torch.zeros((), device=device, dtype=precise(device))
        many = zero.expand(len(atoms)).clone()
        count = torch.zeros((), device=device, dtype=torch.int64)
        return State(
            eta=zero,
            t=zero,
            descent=zero,
            change=zero,
            magnitude=zero + plan.bound.magnitude,
            depth=zero + plan.bound.depth,
            descents=many,
            sizes=plan.sizes,
            steps=count,
            skipped=count,
            smoothed=zero,
            scale=zero,
            weight=zero,
            momentum={},
        )

    def update(
        self,
        grads: Mapping[str, Tensor | None],
        state: State,
        params: Mapping[str, Tensor],
        evidence: Evidence | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        """One step: what to add to the parameters, and the new state. Pure.

        Args:
            grads: gradient of the mean loss by parameter name; a parameter without one (None or absent) is left alone.
            state: as ``init`` or the last ``update`` returned it.
            params: the parameters at which the gradient was taken.
            evidence: R and a₀ of the same batch, for a certified search.

        Returns:
            Updates by name, in each parameter's dtype (none for a parameter of mass 0 or without a gradient), and the state that
            describes this step.

        Raises:
            NonFiniteGradient: on a CPU and not compiled, unless ``nonfinite="skip"``; elsewhere the step is zero and counted in
                ``state.skipped`` (asking the device would be a wait), and ``check`` raises when called.
            InvalidArgument: a gradient fits no parameter, or evidence is missing.
        """
        atoms = self.atoms
        self._check_arguments(grads, state, params, evidence)
        device = next(iter(params.values())).device

        zero = torch.zeros((), device=device, dtype=precise(device))
        directions: dict[str, Direction] = {}
        descents = []
        for name, atom in atoms.items():
            gradient = grads.get(name)
            if gradient is None or atom.mass == 0:
                descents.append(zero)
                continue
            norm = atom.norm if self.direction == "spectral" else atom.norm.euclidean
            gradient = gradient.detach()
            if self.momentum is not None and name in state.momentum:
                directions[name] = norm.direction(state.momentum[name]).where(gradient)
            else:
                directions[name] = norm.direction(gradient)
            descents.append(directions[name].pair(gradient))
        pairs = torch.stack(descents)

        sizes = self._sizes(params, device)
        reach = sizes * self._plan(device).masses
        descent = (reach * pairs).sum()
        finite = descent.isfinite()
        # what cannot be looked at without a wait (or, compiled, without leaving the graph) is masked instead
        masked = self.nonfinite == "skip" or device.type != "cpu" or torch.compiler.is_compiling()
        if not masked:
            self._raise_nonfinite(pairs * sizes)

        usable, smoothed, scale, weight = measured(torch.where(finite, descent, 0.0), state, self.momentum)
        if self.momentum is not None:
            # a zero gradient means a zero step of its weight, whatever the past says
            reach = reach * (pairs != 0)
        majorant = self._majorant(usable.clamp(min=0.0), sizes, device, evidence)
        best = self.search.minimum(majorant)
        # sizes or magnitudes near the ends of the number range can overflow on the way to a step
        finite = finite & best.t.isfinite()
        if not masked:
            self._raise_unusable(best.t, evidence)

        updates = {}
        for name, amount in zip(atoms, (-best.t * reach).unbind(), strict=True):
            if name in directions:
                direction = directions.pop(name)
                factor = (direction.factor * amount).to(direction.base.dtype)
                update = (direction.base * factor).to(params[name].dtype)
                updates[name] = torch.where(finite, update, 0.0) if masked else update
        after = State(
            eta=best.eta,
            t=best.t,
            descent=descent,
            change=best.change,
            magnitude=zero + majorant.bound.magnitude,
            depth=zero + majorant.bound.depth,
            descents=pairs,
            sizes=sizes,
            steps=state.steps + 1,
            skipped=state.skipped + (~finite).to(state.skipped.dtype),
            smoothed=smoothed,
            scale=scale,
            weight=weight,
            momentum=self._momentum(state, grads, finite if masked else None),
        )
        return updates, after

    def check(self, state: State) -> None:
        """Raise ``NonFiniteGradient`` if the update behind ``state`` met one. Waits for the device."""
        self._raise_nonfinite(state.descents * state.sizes)

    # -- parts of an update ----------------------------------------------------------------------------------------------

    def _momentum(self, state: State, grads: Mapping[str, Tensor | None], finite: Tensor | None) -> dict[str, Tensor]:
        if self.momentum is None:
            return {}
        moving = {
            name: gradient.detach()
            for name, gradient in grads.items()
            if gradient is not None and self.atoms[name].mass > 0
        }
        return renewed(state.momentum, moving, self.momentum, finite)

    def _check_arguments(
        self,
        grads: Mapping[str, Tensor | None],
        state: State,
        params: Mapping[str, Tensor],
        evidence: Evidence | None,
    ) -> None:
        if not isinstance(grads, Mapping) or not isinstance(state, State):
            raise InvalidArgument(
                f"update takes gradients by name and a state, but got {type(grads).__name__} and {type(state).__name__}. "
                "Call method.update(grads, state, params) with the state that method.init(params) returned."
            )
        missing = self.atoms.keys() - params.keys()
        if missing:
            raise InvalidArgument(f"update was given parameters without {sorted(missing)}. Pass all of the network's.")
        for name, atom in self.atoms.items():
            if tuple(params[name].shape) != atom.shape:
                raise InvalidArgument(
                    f"parameter {name!r} has shape {tuple(params[name].shape)}, but its module declares {atom.shape}"
                )
        if evidence is not None and not (
            isinstance(evidence, Evidence) and all(isinstance(x, Tensor) for x in evidence)
        ):
            raise InvalidArgument(
                f"update was given evidence {evidence!r}. Pass evidence=method.evidence(params, inputs, targets) of the same batch."
            )
        odd = odd_momentum(state.momentum, {name: atom.shape for name, atom in self.atoms.items()})
        if odd is not None:
            raise InvalidArgument(
                f"update was given the state of another method: {odd}. Pass the state that init or the last update returned."
            )
        for name, gradient in grads.items():
            if name not in self.atoms:
                raise InvalidArgument(
                    f"a gradient was given for {name!r}, which is not among the parameters {sorted(self.atoms)}"
                )
            if gradient is None:
                continue
            if not isinstance(gradient, Tensor):
                raise InvalidArgument(f"the gradient of {name!r} is {type(gradient).__name__}, where a tensor belongs")
            if gradient.layout != torch.strided or not gradient.is_floating_point():
                raise InvalidArgument(
                    f"the gradient of {name!r} is {gradient.layout} of {gradient.dtype}; a step takes dense floating-point ones"
                )
            if gradient.shape != params[name].shape:
                raise InvalidArgument(
                    f"the gradient of {name!r} has shape {tuple(gradient.shape)}, the parameter {tuple(params[name].shape)}"
                )
        if self.needs_evidence and evidence is None:
            raise InvalidArgument(
                "a certified update was asked for without evidence of R and the input magnitude. "
                "Pass evidence=method.evidence(params, inputs, targets) of the same batch."
            )

    def _raise_nonfinite(self, descents: Tensor) -> None:
        if not bool(descents.isfinite().all()):
            names = [
                name for name, value in zip(self.atoms, descents.tolist(), strict=True) if not abs(value) < float("inf")
            ]
            raise NonFiniteGradient(
                f"the gradient of {', '.join(map(repr, names))} holds NaN or infinity, or overflows in its dtype (or its weight "
                "does, where sizes are tracked); no weight was changed. Look for overflow in the loss or corrupt inputs, or pass "
                "nonfinite='skip' to leave such batches out and count them."
            )

    def _raise_unusable(self, t: Scalar, evidence: Evidence | None) -> None:
        told = torch.stack([wide(x.detach()) for x in evidence]) if evidence is not None else None
        if evidence is not None and told is not None and not bool((told.isfinite() & (told >= 0)).all()):
            raise InvalidArgument(
                f"update was given R = {float(evidence.residual)} and an input magnitude of {float(evidence.magnitude)}, which must "
                "be finite and ≥ 0. Pass evidence=method.evidence(params, inputs, targets) of the same batch."
            )
        if not bool(t.isfinite()):
            raise InvalidArgument(
                f"the step came out as {float(t)}; no weight was changed. Look for a size, a magnitude or a factor in the network "
                "that is so small or so large that its square leaves the range of numbers."
            )

    def _spaces(self) -> tuple[Space, Space]:
        domain, codomain = self.network.domain, self.network.codomain
        if domain is None or codomain is None:
            raise UnknownBound(
                f"{brief(self.network)} has no settled spaces. Compose it with a typed module such as Linear, or name its domain: "
                "network.bind(Features(3))."
            )
        return domain, codomain

    def _sizes(self, params: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """ω_k: declared, or a certified bound of the current norm, never below the floor."""
        if self.sizes == "prescribed":
            return self._plan(device).sizes
        bounds = [atom.norm.bound(params[name].detach()).clamp(min=atom.floor) for name, atom in self.atoms.items()]
        return torch.stack(bounds).to(precise(device))

    def _plan(self, device: torch.device) -> Plan:
        if device not in self._plans:
            scalars = precise(device)
            sizes = torch.tensor([atom.size for atom in self.atoms.values()], device=device, dtype=scalars)
            masses = torch.tensor([atom.mass for atom in self.atoms.values()], device=device, dtype=scalars)
            self._plans[device] = Plan(*self._evaluate({}, self.magnitude, device), sizes, masses)
        return self._plans[device]

    def _evaluate(self, sizes: Mapping[str, Number], magnitude: Number, device: torch.device) -> tuple[Tensor, Bound]:
        options = {"magnitude": magnitude, "constants": self.constants, "sizes": sizes}
        points = self.search.points(self.network.bound(0.0, **options), device)
        return points, self.network.bound(points, **options)

    def _majorant(self, descent: Scalar, sizes: Tensor, device: torch.device, evidence: Evidence | None) -> Majorant:
        if self.sizes == "prescribed":
            points, bound, _, _ = self._plan(device)
        else:
            # an all-zero batch has magnitude 0, of which relative quantities cannot be taken
            magnitude = self.magnitude if evidence is None else evidence.magnitude.to(sizes).clamp(min=1e-30)
            points, bound = self._evaluate(dict(zip(self.atoms, sizes.unbind(), strict=True)), magnitude, device)
        factor = self._conversion()
        return Majorant(
            points,
            bound,
            lambda delta: self.loss.bound(factor * delta),
            self.loss.curvature.value * factor**2,
            descent,
            evidence.residual.to(descent) if self.needs_evidence and evidence is not None else None,
        )

    def _conversion(self) -> float:
        _, codomain = self._spaces()
        proved, typical = self.loss.conversion(codomain)
        return proved.value if self.constants == "proved" else typical.value

    def certificate(self) -> Bound:
        """The network's bound at t = 0 with the loss's own constants counted in: the grade of the whole, and what it assumes."""
        _, codomain = self._spaces()
        proved, typical = self.loss.conversion(codomain)
        bound = self.network.bound(0.0, magnitude=self.magnitude, constants=self.constants)
        bound = bound.graded(self.loss.curvature, f"curvature of {type(self.loss).__name__}")
        bound = bound.graded(proved if self.constants == "proved" else typical, "output norm")
        if not self.search.needs_evidence:
            bound = bound.assuming(
                "orthogonality: the model's curvature is not correlated with the loss gradient (AGD paper, Assumption 1)"
            )
        if self.sizes == "prescribed":
            bound = bound.assuming("prescribed sizes: weight norms stay at most at their declared values")
        return bound
