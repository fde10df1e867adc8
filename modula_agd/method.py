"""The engine: two pure functions, ``init`` and ``update``, built from a network and a loss.

It knows no layer and no loss by name. One update:

1. each atom's norm turns its gradient g_k into a unit dual direction u_k, and ⟨g_k, u_k⟩ is its share of the descent;
2. the search minimises the majorant (``majorisation.py``), which gives one number t;
3. each weight moves by −t·p_k·m_k·ω_k·u_k.

On minibatches the direction and its descent are told apart (``held_out.py``), the bound is as curved as past steps found the
loss (``curvature.py``), t is the mean of what majorants asked for (``step_average.py``), and the portions p_k, otherwise 1, are what
past steps found of each weight (``balance.py``).

All scalars stay on the device, so that a step waits for nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from modula_agd.balance import portions, weighed
from modula_agd.curvature import curvature, looked_back
from modula_agd.derivation import Derivation, settled
from modula_agd.device import precise
from modula_agd.directions import due
from modula_agd.error import InvalidArgument
from modula_agd.exchange import ALONE, Exchange
from modula_agd.forecast import forecast
from modula_agd.held_out import begun, lead, measured, renewed, short_dtype, steadiness
from modula_agd.inspection import check_finite, check_parameters, check_step, check_update, loss_told
from modula_agd.majorisation import Evidence
from modula_agd.norm import Direction, wide
from modula_agd.polar import working_dtype
from modula_agd.space import finite as finite_number
from modula_agd.state import WEIGHT_SIZED, Scalar, State
from modula_agd.step_average import averaged


class Move(NamedTuple):
    """A step before it is made.

    Args:
        directions: u_k of each parameter that moves.
        gradients: its gradient.
        amounts: −t·p_k·m_k·ω_k of each parameter, 0-d.
        shrink: λ·p_k·m_k·t, the share of a weight that decays; empty without decay.
        finite: False where nothing may move; None where that has been looked at.
        state: the new state, but for momentum and lead.
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
class Method(Derivation):
    """An optimisation method for one network and one loss, made by ``agd``; how an update is made of what they declare."""

    def counted(
        self,
        state: State,
        gradients: Mapping[str, Tensor],
        part: float,
        finite: Bool[Tensor, ""] | None,
        *,
        absorbed: bool = False,
        in_place: bool = False,
    ) -> dict[str, dict[str, Tensor]]:
        """The state's ``momentum`` and ``lead`` with the gradients of a part of a step's samples counted in.

        Args:
            state: before the update.
            gradients: by name, detached.
            part: the share of the step's samples.
            finite: where False, the past is kept; None where that has been looked at.
            absorbed: whether the next direction is made of them at once, and serves this step alone.
            in_place: write over what the state holds.
        """
        if self.momentum is None or not gradients:
            return {"momentum": state.momentum, "lead": state.lead}
        periods = self._serving(next(iter(gradients.values())).device)
        ahead = {name: lead(self.momentum, 1 if absorbed else periods[name]) for name in gradients}
        full = self.precision == "full"
        return renewed(state, gradients, part * (1 - self.momentum), ahead, finite, full=full, in_place=in_place)

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
            domain, codomain = settled(self.network, self.network.domain), self._codomain()
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
        return State(**{name: value.clone() for name, value in numbers.items()}, momentum={}, lead={}, directions={})

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
        past = self.counted(state, move.gradients, part, move.finite)
        return updates, move.state._replace(**past)

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
        past = self.counted(state, gradients, part, good, absorbed=True)
        # a direction kept from before would not have seen what was just absorbed
        return self._looked_back(gradients, state, exchange)[0]._replace(**past, directions={})

    def decide(
        self,
        grads: Mapping[str, Tensor | None],
        state: State,
        params: Mapping[str, Tensor],
        evidence: Evidence | None = None,
        value: Tensor | float | None = None,
        exchange: Exchange = ALONE,
    ) -> Move:
        """What ``update`` does, before anything is multiplied out; its state still holds the old momentum and lead."""
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
        steady = steadiness(smoothed, scale, weight)
        majorant = self._majorant(usable.clamp(min=0.0), sizes, device, evidence)
        factor = curvature(state, steady, self.noise) if self.curvature == "measured" else None
        best = self.search.minimum(majorant if factor is None else majorant.curved(factor))
        relaxed = 2.0 - steady if self.relaxation is None else self.relaxation
        t = relaxed * best.t
        # sizes or magnitudes near the ends of the number range can overflow on the way to a step, in the weights' precision too
        finite = finite & t.float().isfinite()
        if not masked:
            check_step(t.float(), evidence)
        else:
            # made of a gradient itself, a direction may be NaN
            kept |= {name: torch.where(finite, kept[name], 0.0) for name in kept.keys() - state.lead.keys()}
        means = {}
        if self.step_average is not None:
            t, means = averaged(t, state, self.step_average, finite & (descent != 0))
        _, depth = self.search.reckoned(majorant.bound)
        expected = t * self.search.stiffness(majorant)
        after = state._replace(
            eta=t * depth,
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
            directions=unless(finite if masked else None, state.directions, kept),
            due=torch.where(finite & expected.isfinite(), expected, 0.0),
            portions=parts,
            rates=torch.ones_like(parts),
            **means,
            **forecast(state, told),
        )
        amounts = dict(zip(self.atoms, (-t * reach).unbind(), strict=True))
        # no weight passes through 0, and one with a zero gradient does not move at all
        moved = dict(zip(self.atoms, (pairs != 0).unbind(), strict=True))
        lengths = dict(zip(self.atoms, (t * plan.masses * parts).unbind(), strict=True))
        shares = {name: (self.decay * lengths[name]).clamp(max=1.0) for name in directions if self.decay}
        shrink = {name: share * moved[name] for name, share in shares.items()}
        return Move(directions, gradients, amounts, shrink, finite if masked else None, after)

    def measured_curvature(self, state: State) -> Scalar:
        """κ, the curvature that steps found in units of the declared one; 1 where it is not measured."""
        if self.curvature != "measured":
            return torch.ones_like(state.t)
        return curvature(state, steadiness(state.smoothed, state.scale, state.weight), self.noise)

    def check(self, state: State) -> None:
        """Raise ``NonFiniteGradient`` if the update behind ``state`` met one. Waits for the device."""
        check_finite(dict(zip(self.atoms, (state.descents * state.sizes).tolist(), strict=True)))

    # -- parts of an update ----------------------------------------------------------------------------------------------

    def kept_dtype(self, dtype: torch.dtype, period: int = 1) -> torch.dtype:
        """In which a lead or a direction is kept that is computed in ``dtype``: short, unless steps are made along it again."""
        return dtype if period > 1 or self.precision == "full" else short_dtype(dtype)

    def _serving(self, device: torch.device) -> dict[str, int]:
        """Steps that one direction of each parameter serves here: which are due is for the host to decide, which would cut a graph."""
        compiled = torch.compiler.is_compiling() and self.refresh is None
        return dict.fromkeys(self.atoms, 1) if compiled else self.periods(device)

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
        periods = self._serving(device)
        places = {name: index for index, name in enumerate(self.atoms)}
        lasting = {name for name in gradients if periods[name] > 1}
        clock = int(state.clock) if lasting else 0
        held = set(gradients) if self.measures else lasting
        old = {name for name in lasting & state.directions.keys() if not due(clock, places[name], periods[name])}
        # one that was kept to measure along it is too rough to step along
        old = {name for name in old if state.directions[name].dtype == working_dtype(gradients[name].dtype)}
        sources = {name: state.lead.get(name, gradients[name]) for name in gradients if name not in old}
        sources = {name: source.to(working_dtype(gradients[name].dtype)) for name, source in sources.items()}
        if self.skips:
            known = {name: source for name, source in sources.items() if name in state.lead}
            started = exchange.nonzero(known)
            sources |= {name: begun(x, gradients[name], started[name]) for name, x in known.items()}
        fresh = exchange.directions(self.norms, sources, half=self._half(sources, device))
        kept = {n: u.dense().to(self.kept_dtype(u.base.dtype, periods[n])) for n, u in fresh.items() if n in held}
        kept |= {name: state.directions[name] for name in old}
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


def unless(finite: Bool[Tensor, ""] | None, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new tensors where ``finite``, or where that has been looked at (None); otherwise the old ones, or 0 without."""
    if finite is None:
        return dict(new)
    before = {n: old[n].to(x.dtype) if n in old else torch.zeros_like(x) for n, x in new.items() if x is not old.get(n)}
    return {n: torch.where(finite, x, before[n]) if n in before else x for n, x in new.items()}


def _ends(gradient: Tensor | None, like: Tensor) -> Scalar:
    """The sum of its smallest and largest entry: infinite or NaN where one is, and nowhere else in double precision."""
    if gradient is None or gradient.numel() == 0:
        return torch.zeros((), device=like.device, dtype=precise(like.device))
    return wide(gradient.amin()) + wide(gradient.amax())
