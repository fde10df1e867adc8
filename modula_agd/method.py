"""The engine: two pure functions, ``init`` and ``update``, built from a network and a loss.

It knows no layer and no loss by name. One update:

1. each atom's norm turns its gradient g_k into a unit dual direction u_k, and ⟨g_k, u_k⟩ is its share of the descent;
2. the search minimises the majorant (``majorisation.py``), which gives one number t;
3. each weight moves by −t·p_k·m_k·ω_k·u_k.

On minibatches the direction and its descent are told apart (``held_out.py``), the bound is as curved as past steps found the
loss (``curvature.py``), and the portions p_k, otherwise 1, are what they found of each weight (``balance.py``).

All scalars stay on the device, so that a step waits for nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from modula_agd.balance import portions, weighed
from modula_agd.bound import Bound, Number
from modula_agd.curvature import curvature, looked_back
from modula_agd.device import precise
from modula_agd.directions import due, period
from modula_agd.error import InvalidArgument, UnknownBound
from modula_agd.exchange import ALONE, Exchange
from modula_agd.forecast import forecast
from modula_agd.held_out import begun, measured, renewed, steadiness
from modula_agd.inspection import check_finite, check_parameters, check_step, check_update, loss_told
from modula_agd.loss import Loss
from modula_agd.majorisation import Evidence, Majorant, Search
from modula_agd.network import Network
from modula_agd.norm import Direction, Norm, wide
from modula_agd.run import Constants, Weighted
from modula_agd.space import Space, brief
from modula_agd.space import finite as finite_number
from modula_agd.state import WEIGHT_SIZED, Scalar, State


class Plan(NamedTuple):
    """What never changes between steps on one device: kept there, so that no step uploads anything.

    Args:
        points: the search's steps at declared sizes.
        bound: the network's bound at those steps.
        sizes: declared ω_k.
        masses: m_k.
        periods: steps that a direction of each parameter serves.
        depths: m_k·d_k, each parameter's part of the depth at declared sizes; empty where nobody asks.
    """

    points: Float[Tensor, " points"]
    bound: Bound
    sizes: Float[Tensor, " parameters"]
    masses: Float[Tensor, " parameters"]
    periods: dict[str, int]
    depths: Float[Tensor, " parameters"]


class Move(NamedTuple):
    """A step before it is made.

    Args:
        directions: u_k of each parameter that moves.
        gradients: its gradient.
        amounts: −t·p_k·m_k·ω_k of each parameter, 0-d.
        shrink: λ·p_k·m_k·t, the share of a weight that decays; empty without decay.
        finite: False where nothing may move; None where that has been looked at.
        state: the new state, but for the momentum.
    """

    directions: dict[str, Direction]
    gradients: dict[str, Tensor]
    amounts: dict[str, Scalar]
    shrink: dict[str, Scalar]
    finite: Bool[Tensor, ""] | None
    state: State

    def factor(self, name: str, direction: Direction) -> Tensor:
        """What the direction's base is multiplied with."""
        return (direction.factor * self.amounts[name]).to(direction.base.dtype)


@dataclass(frozen=True)
class Method:
    """An optimisation method for one network and one loss; made by ``agd``, whose arguments its fields are."""

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
    decay: float = 0.0
    relaxation: float | None = 1.0
    precision: Literal["auto", "full", "half"] = "auto"
    curvature: Literal["measured", "declared"] = "declared"
    balance: Literal["measured", "declared"] = "declared"
    _plans: dict[torch.device, Plan] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def atoms(self) -> dict[str, Weighted]:
        """Each atom by the name of its parameter."""
        return self.network.weights()

    @cached_property
    def masses(self) -> dict[str, float]:
        """m_k of each parameter."""
        return {name: atom.mass for name, atom in self.atoms.items()}

    def periods(self, device: torch.device) -> dict[str, int]:
        """Steps that one direction of each parameter serves, not compiled."""
        lasting = self._plan(device).periods
        return lasting if self.momentum is not None else dict.fromkeys(lasting, 1)

    def keeps(self, device: torch.device) -> set[str]:
        """The parameters whose direction is kept after a step: it serves again, or the next gradient is measured along it."""
        return {name for name, period in self.periods(device).items() if self.measures or period > 1}

    @property
    def skips(self) -> bool:
        """Whether a step with a gradient that is not finite is left out."""
        return self.nonfinite == "skip"

    @property
    def measures(self) -> bool:
        """Whether the next gradient is measured along the directions of the steps taken."""
        return "measured" in (self.curvature, self.balance)

    @property
    def needs_evidence(self) -> bool:
        """Whether ``update`` must be given ``evidence``."""
        return self.search.needs_evidence

    def started(self, momentum: Mapping[str, Tensor], exchange: Exchange = ALONE) -> dict[str, Tensor] | None:
        """Whether each momentum has seen a gradient, where gradients may have been left out; None where none ever is."""
        return exchange.nonzero(momentum) if self.skips else None

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
            domain, codomain = _settled(self.network, self.network.domain), self._codomain()
            outputs, _ = self.network.run(params, inputs, generator=generator)
            residual = self.loss.residual(outputs, targets, codomain)
            return Evidence(residual, domain.norm(inputs).amax())

    def init(self, params: Mapping[str, Tensor]) -> State:
        """The state before the first update; holds no weight-sized tensor.

        Raises:
            InvalidArgument: the parameters are not the network's.
        """
        check_parameters(self.atoms, params)
        device = next(iter(params.values())).device
        plan = self._plan(device)
        zero = torch.zeros((), device=device, dtype=precise(device))
        count = torch.zeros((), device=device, dtype=torch.int64)
        numbers = {name: zero for name in State._fields if name not in WEIGHT_SIZED} | {
            "magnitude": zero + plan.bound.magnitude,
            "depth": zero + plan.bound.depth,
            **dict.fromkeys(("descents", "gained", "used", "counted"), zero.expand(len(self.atoms))),
            **dict.fromkeys(("portions", "rates"), torch.ones_like(plan.sizes)),
            "sizes": plan.sizes,
            "steps": count,
            "skipped": count,
            "clock": torch.zeros((), dtype=torch.int64),
            "loss": zero + torch.inf,
        }
        # each a tensor of its own, or a compiled update would be compiled again once they are
        return State(**{name: value.clone() for name, value in numbers.items()}, momentum={}, directions={})

    def update(
        self,
        grads: Mapping[str, Tensor | None],
        state: State,
        params: Mapping[str, Tensor],
        evidence: Evidence | None = None,
        *,
        value: Tensor | float | None = None,
        part: float = 1.0,
        exchange: Exchange = ALONE,
    ) -> tuple[dict[str, Tensor], State]:
        """One step: what to add to the parameters, and the new state. Pure.

        Args:
            grads: gradient of the mean loss by parameter name; a parameter without one (None or absent) is left alone.
            state: as ``init``, ``absorb`` or the last ``update`` returned it.
            params: the parameters at which the gradient was taken.
            evidence: R and a₀ of the same batch, for a certified search.
            value: the mean loss of the batch, 0-d, for the record of predicted and realised decrease in the state.
            part: the share of the step's samples that the gradient is made of, where ``absorb`` was given the others.
            exchange: the other processes; ``grads``, ``state`` and ``params`` are what this one holds.

        Returns:
            Updates by name, in each parameter's dtype (none for a parameter of mass 0 or without a gradient), and the state that
            describes this step.

        Raises:
            NonFiniteGradient: on a CPU and not compiled, unless ``nonfinite="skip"``; elsewhere the step is zero and counted in
                ``state.skipped`` (asking the device would be a wait), and ``check`` raises when called.
            InvalidArgument: a gradient fits no parameter, or evidence is missing.
        """
        if not (finite_number(part) and 0 < part <= 1):
            raise InvalidArgument(f"update was given part={part!r}, which must be above 0 and at most 1")
        move = self.decide(grads, state, params, evidence, value, exchange)
        updates = {}
        for name, direction in move.directions.items():
            factor = move.factor(name, direction)
            update = direction.base * factor
            if self.decay:
                update = update - (move.shrink[name] * params[name].detach()).to(update.dtype)
            update = update.to(params[name].dtype)
            updates[name] = torch.where(move.finite, update, 0.0) if move.finite is not None else update
        momentum = state.momentum
        if self.momentum is not None:
            momentum = renewed(
                momentum, move.gradients, self.share(state, part), move.finite, started=self.started(momentum, exchange)
            )
        return updates, move.state._replace(momentum=momentum)

    def absorb(
        self,
        grads: Mapping[str, Tensor | None],
        state: State,
        params: Mapping[str, Tensor],
        part: float,
        *,
        exchange: Exchange = ALONE,
    ) -> State:
        """Take a part of a step's samples into the direction before the rest measures the descent along it. Pure.

        For gradient accumulation: what the other micro-batches then measure (``update`` with ``part``) is held out from them, and
        the direction is as fresh as it can be. The very first step is measured without bias too.

        Args:
            grads: mean gradient of that part of the samples, at ``params``.
            state: as ``init`` or the last ``update`` returned it.
            params: the parameters.
            part: the share of the step's samples that it is made of, between 0 and 1.
            exchange: as for ``update``.

        Raises:
            InvalidArgument: the method has no momentum, or the share or a gradient is none.
            NonFiniteGradient: as for ``update``.
        """
        if self.momentum is None:
            raise InvalidArgument(
                "absorb was called on a method without momentum, whose directions are made of the gradient itself. "
                "Add the micro-batches' gradients up and call update once, or leave momentum=None out."
            )
        if not (finite_number(part) and 0 < part < 1):
            raise InvalidArgument(f"absorb was given part={part!r}, which must lie between 0 and 1")
        self._check_arguments(grads, state, params, None, exchange, needs_evidence=False)
        gradients = self._gradients(grads)
        if not gradients:
            return state
        ends = exchange.total(torch.stack([_ends(gradients.get(name), params[name]) for name in self.atoms]))
        masked = self._masked(ends.device)
        if not masked:
            check_finite(dict(zip(self.atoms, ends.tolist(), strict=True)))
        good = ends.isfinite().all() if masked else None
        momentum = renewed(
            state.momentum, gradients, part * (1 - self.momentum), good, started=self.started(state.momentum, exchange)
        )
        # a direction kept from before would not have seen what was just absorbed
        return self._looked_back(gradients, state, exchange)[0]._replace(momentum=momentum, directions={})

    def share(self, state: State, part: float) -> float:
        """What a fresh gradient of a part of the samples counts for in the momentum; at the first step parts count alike."""
        if self.momentum is None:
            return 1.0
        first = part < 1 and int(state.clock) == 0
        return part if first else part * (1 - self.momentum)

    def decide(
        self,
        grads: Mapping[str, Tensor | None],
        state: State,
        params: Mapping[str, Tensor],
        evidence: Evidence | None = None,
        value: Tensor | float | None = None,
        exchange: Exchange = ALONE,
    ) -> Move:
        """What ``update`` does, before anything is multiplied out; its state still holds the old momentum."""
        self._check_arguments(grads, state, params, evidence, exchange)
        told = loss_told(value, state)
        told = exchange.means({"loss": told})["loss"] if told is not None else None
        evidence = exchange.evidence(evidence) if evidence is not None else None
        device = next(iter(params.values())).device
        zero = torch.zeros((), device=device, dtype=precise(device))
        gradients = self._gradients(grads)
        # like the directions, of the past alone: what the fresh gradient measures must not depend on it
        parts = portions(state, self._plan(device).depths) if self.balance == "measured" else state.portions
        state, left = self._looked_back(gradients, state, exchange)
        directions, kept = self._directions(gradients, state, device, exchange)
        # a direction that serves on was measured already
        serving = {name for name, direction in directions.items() if direction.base is state.directions.get(name)}
        descents = {n: left[n] if n in serving & left.keys() else d.pair(gradients[n]) for n, d in directions.items()}
        pairs = torch.stack([descents.get(name, zero) for name in self.atoms])
        shrinking = self._shrinking(gradients, params, device)
        pairs, shrinking = exchange.total(torch.stack((pairs, shrinking))).unbind()

        sizes, plan = self._sizes(params, device, exchange), self._plan(device)
        reach = sizes * plan.masses * parts
        descent = (reach * pairs).sum() + (parts * shrinking).sum()
        finite = descent.isfinite()
        masked = self._masked(device)
        if not masked:
            check_finite(dict(zip(self.atoms, (pairs * sizes).tolist(), strict=True)))

        usable, smoothed, scale, weight = measured(torch.where(finite, descent, 0.0), state, self.smoothing)
        if self.momentum is not None:
            # a zero gradient means a zero step of its weight, whatever the past says
            reach = reach * (pairs != 0)
        majorant, factor = self._majorant(usable.clamp(min=0.0), sizes, device, evidence), self._curvature(state)
        best = self.search.minimum(majorant if factor is None else majorant.curved(factor))
        relaxed = 2.0 - steadiness(smoothed, scale, weight) if self.relaxation is None else self.relaxation
        t = relaxed * best.t
        # sizes or magnitudes near the ends of the number range can overflow on the way to a step, in the weights' precision too
        finite = finite & t.float().isfinite()
        if not masked:
            check_step(t.float(), evidence)
        else:
            # made of a gradient itself, a direction may be NaN
            kept |= {name: torch.where(finite, kept[name], 0.0) for name in kept.keys() - state.momentum.keys()}
        after = state._replace(
            eta=relaxed * best.eta,
            t=t,
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
            clock=state.clock + 1,
            directions=_kept(kept, state.directions, finite if masked else None),
            due=torch.where(finite, relaxed * majorant.descent / (1.0 if factor is None else factor), 0.0),
            portions=parts,
            rates=torch.ones_like(parts),
            **forecast(state, told),
        )
        amounts = dict(zip(self.atoms, (-t * reach).unbind(), strict=True))
        # no weight passes through 0, and one with a zero gradient does not move at all
        moved = dict(zip(self.atoms, (pairs != 0).unbind(), strict=True))
        lengths = dict(zip(self.atoms, (t * plan.masses * parts).unbind(), strict=True))
        shares = {name: (self.decay * lengths[name]).clamp(max=1.0) for name in directions if self.decay}
        shrink = {name: share * moved[name] for name, share in shares.items()}
        return Move(directions, gradients, amounts, shrink, finite if masked else None, after)

    def check(self, state: State) -> None:
        """Raise ``NonFiniteGradient`` if the update behind ``state`` met one. Waits for the device."""
        check_finite(dict(zip(self.atoms, (state.descents * state.sizes).tolist(), strict=True)))

    # -- parts of an update ----------------------------------------------------------------------------------------------

    def _masked(self, device: torch.device) -> bool:
        """Whether what cannot be looked at without a wait (or, compiled, without leaving the graph) is masked instead."""
        return self.nonfinite == "skip" or device.type != "cpu" or torch.compiler.is_compiling()

    def _gradients(self, grads: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Of each parameter that moves, in the network's order."""
        found = {name: grads.get(name) for name, atom in self.atoms.items() if atom.mass > 0}
        return {name: gradient.detach() for name, gradient in found.items() if gradient is not None}

    def _directions(
        self, gradients: Mapping[str, Tensor], state: State, device: torch.device, exchange: Exchange
    ) -> tuple[dict[str, Direction], dict[str, Tensor]]:
        """u of each parameter, and those that shall serve further steps."""
        periods = self._plan(device).periods
        places = {name: index for index, name in enumerate(self.atoms)}
        # which directions are due is for the host to decide, which would cut the graph
        renews = self.momentum is None or (torch.compiler.is_compiling() and self.refresh is None)
        lasting = {name for name in gradients if periods[name] > 1 and not renews}
        clock = int(state.clock) if lasting else 0
        held = set(gradients) if self.measures else lasting
        old = {name for name in lasting & state.directions.keys() if not due(clock, places[name], periods[name])}
        sources = {name: state.momentum.get(name, gradients[name]) for name in gradients if name not in old}
        if self.skips:
            known = {name: state.momentum[name] for name in sources if name in state.momentum}
            started = exchange.nonzero(known)
            sources |= {name: begun(x, gradients[name], started[name]) for name, x in known.items()}
        fresh = exchange.directions(self.norms, sources, half=self._half(sources, device))
        kept = {name: fresh[name].dense() for name in fresh if name in held} | {n: state.directions[n] for n in old}
        # what is kept for a parameter without a gradient this time stays
        kept = {name: value for name, value in state.directions.items() if name not in kept} | kept
        one = torch.ones((), device=device)
        found = {name: Direction(kept[name], one.to(kept[name])) if name in old else fresh[name] for name in gradients}
        if self.momentum is not None:
            found = exchange.seen(found, gradients)
        return found, kept

    def _looked_back(
        self, gradients: Mapping[str, Tensor], state: State, exchange: Exchange
    ) -> tuple[State, dict[str, Scalar]]:
        """The state with the curvature along the last step counted in, and ⟨g, u⟩ of each gradient with the direction of that step."""
        if not self.measures or not state.directions:
            return state, {}
        one, zero = torch.ones_like(state.t), torch.zeros_like(state.t)
        left = {n: Direction(u, one).pair(gradients[n]) for n, u in state.directions.items() if n in gradients}
        pairs = exchange.total(torch.stack([left.get(name, zero) for name in self.atoms]))
        reach = state.sizes * self._plan(state.t.device).masses
        fallen = looked_back(state, pairs, reach * state.portions) if self.curvature == "measured" else {}
        used = weighed(state, pairs, reach) if self.balance == "measured" else {}
        return state._replace(**fallen, **used), left

    def _curvature(self, state: State) -> Scalar | None:
        """κ, where it is measured."""
        return curvature(state) if self.curvature == "measured" else None

    def _half(self, sources: Mapping[str, Tensor], device: torch.device) -> bool:
        """Whether polar factors are iterated in bfloat16; "auto": where that is what an accelerator is fast at."""
        if self.precision != "auto":
            return self.precision == "half"
        return device.type == "cuda" and all(source.dtype != torch.float64 for source in sources.values())

    def _shrinking(self, gradients: Mapping[str, Tensor], params: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """What decay of each parameter alone lowers the loss by, to first order and per unit t: λ·m_k·⟨g_k, W_k⟩."""
        parts = dict.fromkeys(self.atoms, torch.zeros((), device=device, dtype=precise(device)))
        if self.decay:
            for name, gradient in gradients.items():
                flat = wide(torch.dot(gradient.flatten(), params[name].detach().to(gradient.dtype).flatten()))
                parts[name] = self.decay * self.masses[name] * flat
        return torch.stack(list(parts.values()))

    @cached_property
    def norms(self) -> dict[str, Norm]:
        """The norm in which each parameter's direction is taken."""
        return {
            name: atom.norm if self.direction == "spectral" else atom.norm.euclidean
            for name, atom in self.atoms.items()
        }

    def _check_arguments(
        self,
        grads: Mapping[str, Tensor | None],
        state: State,
        params: Mapping[str, Tensor],
        evidence: Evidence | None,
        exchange: Exchange,
        *,
        needs_evidence: bool = True,
    ) -> None:
        shapes = {name: exchange.shape(name, atom.shape) for name, atom in self.atoms.items()}
        check_update(self.atoms, grads, state, params, evidence, shapes)
        if needs_evidence and self.needs_evidence and evidence is None:
            raise InvalidArgument(
                "a certified update was asked for without evidence of R and the input magnitude. "
                "Pass evidence=method.evidence(params, inputs, targets) of the same batch."
            )

    def _codomain(self) -> Space:
        if not self.network.captured:
            _settled(self.network, self.network.domain)
        return _settled(self.network, self.network.codomain)

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

    def _plan(self, device: torch.device) -> Plan:
        if device not in self._plans:
            scalars = precise(device)
            sizes = torch.tensor([atom.size for atom in self.atoms.values()], device=device, dtype=scalars)
            masses = torch.tensor(list(self.masses.values()), device=device, dtype=scalars)
            # on an accelerator polar factors are cheap
            refresh = self.refresh if self.refresh is not None or device.type == "cpu" else 1
            periods = {name: period(self.norms[name], atom.shape, refresh) for name, atom in self.atoms.items()}
            depths = masses.new_tensor(list(self._depths({}).values()) if self.balance == "measured" else [])
            self._plans[device] = Plan(*self._evaluate({}, self.magnitude, device), sizes, masses, periods, depths)
        return self._plans[device]

    def _evaluate(self, sizes: Mapping[str, Number], magnitude: Number, device: torch.device) -> tuple[Tensor, Bound]:
        options = {"magnitude": magnitude, "constants": self.constants, "sizes": sizes}
        # decay moves a weight too: by at most λ·m_k·t of its size, which the growth counts
        network = self.network.with_mass(1.0 + self.decay) if self.decay else self.network
        points = self.search.points(network.bound(0.0, **options), device)
        return points, network.bound(points, **options)

    def _majorant(self, descent: Scalar, sizes: Tensor, device: torch.device, evidence: Evidence | None) -> Majorant:
        if self.sizes == "prescribed":
            plan = self._plan(device)
            points, bound = plan.points, plan.bound
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
        proved, typical = self.loss.conversion(self._codomain())
        return proved.value if self.constants == "proved" else typical.value

    def sensitivities(self, state: State) -> dict[str, float]:
        """m_k·d_k of each parameter: its part of the depth D = Σ_k m_k·d_k, which is linear in the masses. Waits for the device."""
        return self._depths(dict(zip(self.atoms, state.sizes.tolist(), strict=True)) if self.sizes == "tracked" else {})

    def _depths(self, sizes: Mapping[str, Number]) -> dict[str, float]:
        options: dict[str, Any] = {"magnitude": self.magnitude, "constants": self.constants, "sizes": sizes}

        def depth(masses: Mapping[str, Any]) -> Number:
            return self.network.massed(masses).bound(0.0, **options).depth

        # as many networks at once as there are parameters, each with the mass of one of them alone
        alone = torch.diag(torch.tensor(list(self.masses.values()), dtype=torch.float64))
        try:
            found = torch.as_tensor(depth(dict(zip(self.atoms, alone.unbind(), strict=True)))).expand(len(alone))
        except (RuntimeError, TypeError, ValueError):
            # a user's rule may want numbers, for max() or an if
            rows = [dict(zip(self.atoms, row, strict=True)) for row in alone.tolist()]
            found = torch.tensor([float(depth(row)) for row in rows])
        return dict(zip(self.atoms, found.tolist(), strict=True))

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
            how = f"which decay sees to while steps are below {1 / self.decay:g} of a weight" if self.decay >= 1 else ""
            what = "prescribed sizes: weight norms stay at most at their declared values"
            bound = bound.assuming(", ".join(filter(None, (what, how))))
        if self.curvature == "measured":
            bound = bound.assuming("measured curvature: the loss stays as curved along steps as the last ones found it")
        if self.balance == "measured":
            bound = bound.assuming(
                "measured balance: the growth is that of equal steps to first order, and taken to be so beyond"
            )
        if self.relaxation != 1:
            times = "up to 2" if self.relaxation is None else f"{self.relaxation:g}"
            bound = bound.assuming(f"relaxation: the loss bears steps of {times} times the majorant's minimiser")
        return bound


def _settled(network: Network, space: Space | None) -> Space:
    if space is None:
        raise UnknownBound(
            f"{brief(network)} has no settled spaces. Compose it with a typed module such as Linear, or name its domain: "
            "network.bind(Features(3))."
        )
    return space


def _kept(new: dict[str, Tensor], old: dict[str, Tensor], finite: Bool[Tensor, ""] | None) -> dict[str, Tensor]:
    """The directions to keep: a step that is left out leaves them as they were."""
    if finite is None:
        return new
    return {
        n: x if x is old.get(n) else torch.where(finite, x, old.get(n, torch.zeros_like(x))) for n, x in new.items()
    }


def _ends(gradient: Tensor | None, like: Tensor) -> Scalar:
    """The sum of its smallest and largest entry: infinite or NaN where one is, and nowhere else in double precision."""
    if gradient is None or gradient.numel() == 0:
        return torch.zeros((), device=like.device, dtype=precise(like.device))
    return wide(gradient.amin()) + wide(gradient.amax())
