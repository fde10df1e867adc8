"""The engine: two pure functions, ``init`` and ``update``, built from a network and a loss.

It knows no layer and no loss by name. One update:

1. each atom's norm turns its gradient g_k into a unit dual direction u_k, and ⟨g_k, u_k⟩ is its share of the descent;
2. the search minimises the majorant (``majorisation.py``), which gives one number t;
3. each weight moves by −t·x_k·p_k·m_k·ω_k·u_k, rows into logits sqrt(i) times as far (``row_signal.py``).

Directions are made and kept in ``directed.py``. On minibatches direction and descent are told apart (``held_out.py``), the bound is
as curved as past steps found the loss (``curvature.py``), t is the mean of what majorants asked for (``step_average.py``), and the
portions p_k and stretches x_k, otherwise 1, are what past steps found of each weight (``balance.py``, ``stretch.py``).

All scalars stay on the device, so that a step waits for nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from modula_agd.balance import portions
from modula_agd.curvature import curvature, mean_multiple
from modula_agd.derivation import settled
from modula_agd.device import precise
from modula_agd.directed import Directed
from modula_agd.directions import dots, pairs, stays_finite
from modula_agd.error import InvalidArgument
from modula_agd.exchange import ALONE, Exchange
from modula_agd.forecast import forecast
from modula_agd.held_out import measured, relaxed, steadiness
from modula_agd.inspection import check_average, check_finite, check_parameters, check_step, check_update, loss_told
from modula_agd.majorisation import Evidence
from modula_agd.many import is_finite, unless
from modula_agd.move import Move
from modula_agd.norm import wide
from modula_agd.space import finite as finite_number
from modula_agd.state import WAYS, WEIGHT_SIZED, Each, Scalar, State
from modula_agd.step_average import averaged
from modula_agd.stretch import stretched


@dataclass(frozen=True)
class Method(Directed):
    """An optimisation method for one network and one loss, made by ``agd``; how an update is made of what they declare."""

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
        """R and a₀ of a batch, by one forward pass; of dropout, with a generator in the state that the gradient's had.

        Where ``Attention`` drops weights on CUDA by torch's own generator, no other draws the same masks: pass that one, put back.
        """
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
            **dict.fromkeys(("descents", *WAYS, "gained", "used", "counted"), zero.expand(len(self.atoms))),
            **dict.fromkeys(("portions", "stretches", "rates"), torch.ones_like(plan.sizes)),
            **dict.fromkeys(("powers", "power_weights", "mean_weights"), zero.expand(self.row_count)),
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
        average: Mapping[str, Tensor] | None = None,
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
            average: averaged weights by name, as ``averaging.averaged`` made them after every update before: what lags behind them goes
                further, where ``stretch`` is measured. Without, all goes as far as it did.
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
        move = self.decide(grads, state, params, evidence, value, exchange, part, average)
        factors, shares = move.factors()
        updates = {}
        for name, direction in move.directions.items():
            update = direction.base * factors[name]
            if name in shares:
                update = update - (shares[name] * params[name].detach()).to(update.dtype)
            update = update.to(params[name].dtype)
            updates[name] = torch.where(move.finite, update, 0.0) if move.finite is not None else update
        past = self.counted(state, move.gradients, part, move.finite)
        directions = unless(move.finite, state.directions, move.state.directions)
        return updates, move.state._replace(**past, directions=directions)

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
        good = is_finite(ends).all() if masked else None
        past = self.counted(state, gradients, part, good, absorbed=True)
        # a direction kept from before would not have seen what was just absorbed
        heard = self._heard(gradients, state, None, part, is_finite(ends).all(), exchange)
        return self._looked_back(gradients, state, exchange)[0]._replace(**past, **heard, directions={})

    def decide(
        self,
        grads: Mapping[str, Tensor | None],
        state: State,
        params: Mapping[str, Tensor],
        evidence: Evidence | None = None,
        value: Tensor | float | None = None,
        exchange: Exchange = ALONE,
        part: float = 1.0,
        average: Mapping[str, Tensor] | None = None,
    ) -> Move:
        """What ``update`` does, before anything is multiplied out; its state still holds the old momentum and lead."""
        self._check_arguments(grads, state, params, evidence, exchange, average)
        told = loss_told(value, state)
        told = exchange.means({"loss": told})["loss"] if told is not None else None
        evidence = exchange.evidence(evidence) if evidence is not None else None
        device = next(iter(params.values())).device
        zero = torch.zeros((), device=device, dtype=precise(device))
        gradients = self._gradients(grads)
        # like the directions, of the past alone: what the fresh gradient measures must not depend on it
        plan = self._plan(device)
        parts = portions(state, plan.depths) if self.balance == "measured" else torch.ones_like(state.portions)
        state, left = self._looked_back(gradients, state, exchange)
        means = self.row_means(state, exchange)
        directions, kept = self._directions(gradients, state, means, device, exchange)
        # a direction that serves on was measured already
        serving = {name for name, direction in directions.items() if direction.base is state.directions.get(name)}
        known = {name: left[name] for name in serving & left.keys()}
        fresh = {name: direction for name, direction in directions.items() if name not in known}
        descents = self._each(known | pairs(fresh, gradients), zero)
        pulls = self._pulls(gradients, params, zero)
        ways = self._ways(gradients, directions, params, average or {}, zero)
        descents, pulls, ways, silent = exchange.total(torch.stack((descents, pulls, *ways))).unbind()

        sizes = self._sizes(params, device, exchange)
        reach = sizes * plan.masses * parts
        descent = (reach * descents).sum()
        finite = is_finite(descent)
        masked = self._masked(device)
        if not masked:
            check_finite(dict(zip(self.atoms, (descents * sizes).tolist(), strict=True)))

        if self.momentum is not None:
            # a zero gradient means a zero step of its weight, whatever the past says
            reach = reach * (descents != 0)
        t, finite, numbers = self._length(descent, finite, sizes, state, evidence)
        if self.stretch == "declared":
            # a state may come from a method that measured
            numbers |= {"stretches": torch.ones_like(descents), **{field: torch.zeros_like(descents) for field in WAYS}}
        else:
            # without averages there is no way from them
            if average:
                numbers |= stretched(state, ways, silent, finite, plan.reaches)
            else:
                numbers |= {"stretches": state.stretches, "foreseen": torch.zeros_like(descents)}
            numbers["due"] = numbers["due"] * mean_multiple(numbers["stretches"], reach * descents)
        further = t * numbers["stretches"]
        lengths = further * plan.strides * reach
        # a weight with a zero gradient does not move at all
        shares = self.lost(t, parts, numbers["stretches"], state.steps - state.skipped + 1, descents != 0)
        if self.stretch == "measured":
            slopes = lengths * descents + shares.clamp(max=1.0) * pulls
            numbers["slopes"] = torch.where(finite & is_finite(slopes), slopes, 0.0)
        after = state._replace(
            descent=descent,
            descents=descents,
            sizes=sizes,
            steps=state.steps + 1,
            skipped=state.skipped + (~finite).to(state.skipped.dtype),
            clock=state.clock + 1,
            directions=kept,
            portions=parts,
            rates=torch.ones_like(parts),
            **self._heard(gradients, state, means, part, finite, exchange),
            **numbers,
            **forecast(state, told),
        )
        # made of a gradient itself, a direction may be NaN
        sure = set() if self.skips else {name for name in state.lead if stays_finite(self.norms[name])}
        unsure = frozenset(directions.keys() - sure)
        fading = None if self.decay is None else shares
        return Move(
            directions, gradients, tuple(self.atoms), -lengths, fading, finite if masked else None, unsure, after
        )

    def _length(
        self, descent: Scalar, finite: Bool[Tensor, ""], sizes: Tensor, state: State, evidence: Evidence | None
    ) -> tuple[Scalar, Bool[Tensor, ""], dict[str, Scalar]]:
        """The relative step t, whether it is a number, and what the new state says of it.

        Args:
            descent: S of this batch.
            finite: whether it is a number.
            sizes: ω_k.
            state: with the curvature along past steps counted in.
            evidence: for a certified search.
        """
        usable, smoothed, scale, weight = measured(torch.where(finite, descent, 0.0), state, self.smoothing)
        steady = steadiness(smoothed, scale, weight)
        declared = self._majorant(usable.clamp(min=0.0), sizes, descent.device, evidence)
        factor = (
            curvature(state, steady, self.noise, self._plan(state.t.device).least)
            if self.curvature == "measured"
            else None
        )
        majorant = declared if factor is None else declared.curved(factor)
        t, change = self.search.minimum(majorant)
        if self.relaxation != 1:
            t = (relaxed(steady, state.steps - state.skipped + 1) if self.relaxation is None else self.relaxation) * t
        # sizes or magnitudes near the ends of the number range can overflow on the way to a step, in the weights' precision too
        finite = finite & is_finite(t.float())
        if not self._masked(descent.device):
            check_step(t.float(), evidence)
        means = {}
        if self.step_average is not None:
            t, means = averaged(t, state, self.step_average, finite & (descent != 0))
        if self.relaxation != 1 or self.step_average is not None:
            change = self.search.change(majorant, t)
        _, depth = self.search.reckoned(declared.bound)
        expected = t * self.search.stiffness(declared)
        numbers = {
            "t": t,
            "eta": t * depth,
            "change": change,
            "magnitude": torch.zeros_like(t) + declared.bound.magnitude,
            "depth": torch.zeros_like(t) + declared.bound.depth,
            "smoothed": smoothed,
            "scale": scale,
            "weight": weight,
            "due": torch.where(finite & is_finite(expected), expected, 0.0),
        }
        return t, finite, numbers | means

    def measured_curvature(self, state: State) -> Scalar:
        """κ, the curvature that steps found in units of the declared one; 1 where it is not measured."""
        if self.curvature != "measured":
            return torch.ones_like(state.t)
        return curvature(
            state, steadiness(state.smoothed, state.scale, state.weight), self.noise, self._plan(state.t.device).least
        )

    def check(self, state: State) -> None:
        """Raise ``NonFiniteGradient`` if the update behind ``state`` met one. Waits for the device."""
        check_finite(dict(zip(self.atoms, (state.descents * state.sizes).tolist(), strict=True)))

    # -- parts of an update ----------------------------------------------------------------------------------------------

    def _pulls(self, gradients: Mapping[str, Tensor], params: Mapping[str, Tensor], zero: Scalar) -> Each:
        """⟨g_k, W_k⟩ of each parameter, what a loss falls by per unit share that a weight decays; 0 where nobody asks."""
        asked = self.decay is not None and self.stretch == "measured"
        return self._each(dots(gradients, lambda name: params[name].detach()) if asked else {}, zero)

    def _check_arguments(
        self,
        grads: Mapping[str, Tensor | None],
        state: State,
        params: Mapping[str, Tensor],
        evidence: Evidence | None,
        exchange: Exchange,
        average: Mapping[str, Tensor] | None = None,
        *,
        needs_evidence: bool = True,
    ) -> None:
        shapes = {name: exchange.shape(name, atom.shape) for name, atom in self.atoms.items()}
        check_update(self.atoms, grads, state, params, evidence, shapes, self.row_count)
        check_average(average, shapes)
        if needs_evidence and self.needs_evidence and evidence is None:
            raise InvalidArgument(
                "a certified update was asked for without evidence of R and the input magnitude. "
                "Pass evidence=method.evidence(params, inputs, targets) of the same batch."
            )


def _ends(gradient: Tensor | None, like: Tensor) -> Scalar:
    """The sum of its smallest and largest entry: infinite or NaN where one is, and nowhere else in double precision."""
    if gradient is None or gradient.numel() == 0:
        return torch.zeros((), device=like.device, dtype=precise(like.device))
    return wide(gradient.amin()) + wide(gradient.amax())
