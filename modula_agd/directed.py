"""Which way each weight moves: the part of the engine that makes directions, keeps them, and measures the next gradient along them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from modula_agd.balance import weighed
from modula_agd.curvature import looked_back
from modula_agd.decay import lost
from modula_agd.derivation import Derivation
from modula_agd.directions import dense, dots, due, pairs
from modula_agd.exchange import Exchange
from modula_agd.held_out import begun, lead, renewed, short_dtype, steadiness
from modula_agd.many import cast
from modula_agd.norm import Direction
from modula_agd.polar import working_dtype
from modula_agd.row_signal import Rows, in_momentum, in_powers, signal
from modula_agd.state import Each, Scalar, State
from modula_agd.stretch import spent


@dataclass(frozen=True)
class Directed(Derivation):
    """What of a method concerns directions u_k, and what weights lose beside them: no step is decided on here."""

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
        self, gradients: Mapping[str, Tensor], state: State, means: Rows, device: torch.device, exchange: Exchange
    ) -> tuple[dict[str, Direction], dict[str, Tensor]]:
        """u of each parameter, rows by their signal, and those that shall serve further steps."""
        periods = self._serving(device)
        places = {name: index for index, name in enumerate(self.atoms)}
        lasting = {name for name in gradients if periods[name] > 1}
        clock = int(state.clock) if lasting else 0
        held = set(gradients) if self.measures else lasting
        old = {name for name in lasting & state.directions.keys() if not due(clock, places[name], periods[name])}
        # one that was kept to measure along it is too rough to step along
        old = {name for name in old if state.directions[name].dtype == working_dtype(gradients[name].dtype)}
        sources = {name: state.lead.get(name, gradients[name]) for name in gradients if name not in old}
        sources = cast(sources, {name: working_dtype(gradients[name].dtype) for name in sources})
        if self.skips:
            known = {name: source for name, source in sources.items() if name in state.lead}
            started = exchange.nonzero(known)
            sources |= {name: begun(x, gradients[name], started[name]) for name, x in known.items()}
        fresh = exchange.directions(self.norms, sources, half=self._half(sources, device))
        shares = signal(state, means) if self.row_places else means
        for name, place in self.row_places.items():
            if name in fresh and name in state.momentum:
                base, factor = fresh[name]
                held_rows = exchange.held_rows(name, shares[place]).to(base.dtype)[:, None]
                fresh[name] = Direction(base, factor * held_rows)
        dtypes = {n: self.kept_dtype(u.base.dtype, periods[n]) for n, u in fresh.items() if n in held}
        kept = dense({n: fresh[n] for n in dtypes}, dtypes)
        kept |= {name: state.directions[name] for name in old}
        # what is kept for a parameter without a gradient this time stays
        kept = {name: value for name, value in state.directions.items() if name not in kept} | kept
        found = {name: Direction(kept[name]) if name in old else fresh[name] for name in gradients}
        if self.momentum is not None:
            found = exchange.seen(found, gradients)
        return found, kept

    def row_means(self, state: State, exchange: Exchange) -> Rows:
        """‖m_r‖² of all rows that go by their signal."""
        return self._row_squares(state.momentum, state, exchange)

    def _row_squares(self, tensors: Mapping[str, Tensor], state: State, exchange: Exchange) -> Rows:
        """The squares of all rows that go by their signal, 0 where there is no tensor."""
        found = exchange.row_squares({name: tensors[name] for name in self.row_places if name in tensors})
        parts = [found[n] if n in found else torch.zeros_like(state.powers[at]) for n, at in self.row_places.items()]
        return torch.cat(parts) if parts else state.powers

    def _heard(
        self,
        gradients: Mapping[str, Tensor],
        state: State,
        means: Rows | None,
        part: float,
        finite: Bool[Tensor, ""],
        exchange: Exchange,
    ) -> dict[str, Rows]:
        """What the state says of rows, with the gradients of a part of a step's samples counted in.

        Args:
            gradients: by name, detached.
            state: before the update.
            means: as ``row_means`` returned them; None of gradients that are absorbed, which others of the step follow.
            part: the share of the step's samples.
            finite: where False, all stays.
            exchange: the other processes.
        """
        if self.momentum is None or not self.row_places:
            return {}
        squares = self._row_squares(gradients, state, exchange)
        never = torch.zeros_like(finite)
        counts = [
            (finite if name in gradients else never).expand(place.stop - place.start)
            for name, place in self.row_places.items()
        ]
        told = in_momentum(state, squares, part * (1 - self.momentum), torch.cat(counts))
        return told if means is None else told | in_powers(state, squares, means, part, torch.cat(counts))

    def _looked_back(
        self, gradients: Mapping[str, Tensor], state: State, exchange: Exchange
    ) -> tuple[State, dict[str, Scalar]]:
        """The state with what the last step used up counted in, and ⟨g, u⟩ of each gradient with the direction of that step."""
        if not self.measures or not state.directions:
            return state, {}
        left = pairs({name: Direction(u) for name, u in state.directions.items()}, gradients)
        slopes = exchange.total(self._each(left, torch.zeros_like(state.t)))
        plan = self._plan(state.t.device)
        reach = state.sizes * plan.masses
        fallen = {}
        if self.curvature == "measured":
            fallen = looked_back(
                state, slopes, reach * state.portions, doubtful=self.network.captured or plan.least < 1
            )
        further = plan.strides * state.stretches
        used = weighed(state, slopes, reach, further) if self.balance == "measured" else {}
        if self.stretch == "measured":
            steady = steadiness(state.smoothed, state.scale, state.weight)
            used["slopes"] = spent(state, slopes, reach * further, steady)
        return state._replace(**fallen, **used), left

    def _ways(
        self,
        gradients: Mapping[str, Tensor],
        directions: Mapping[str, Direction],
        params: Mapping[str, Tensor],
        average: Mapping[str, Tensor],
        zero: Scalar,
    ) -> tuple[Each, Each]:
        """⟨g_k, w_k − w̄_k⟩ of each parameter, 0 of one without a gradient or an average; and how many of its rows do not move."""
        none = zero.expand(len(self.atoms))
        known = {name: x for name, x in gradients.items() if name in average}
        if not known or self.stretch == "declared":
            return none, none
        # one way at a time, each as large as its weight
        ways = dots(known, lambda name: params[name].detach() - average[name].detach())
        silent = {name: directions[name].silent() for name in known if directions[name].by_rows}
        return self._each(ways, zero), self._each(silent, zero)

    def _each(self, numbers: Mapping[str, Scalar], otherwise: Scalar) -> Each:
        """Numbers of some parameters as one vector of all, in the network's order."""
        return torch.stack([numbers.get(name, otherwise) for name in self.atoms])

    def gains(self, state: State) -> Each:
        """p_k·m_k·ω_k·⟨g_k, u_k⟩ of each parameter: what it gave to the descent of the last step."""
        return state.portions * self._plan(state.t.device).masses * state.sizes * state.descents

    def lost(
        self, t: Scalar, portions: Each, stretches: Each, steps: Int[Tensor, ""], moves: Bool[Tensor, " parameters"]
    ) -> Each:
        """s_k, the share of itself that each parameter loses with a step (``decay.py``).

        Args:
            t: its length.
            portions: p_k.
            stretches: x_k.
            steps: n ≥ 1, this one counted, those left out not.
            moves: whether each parameter moves at all.

        Raises:
            InvalidArgument: a rule of one's own returns something else.
        """
        if self.decay is None:
            return torch.zeros_like(portions)
        plan = self._plan(t.device)
        lengths, fades = t * plan.masses * portions, plan.fades * moves
        return lost(self.decay, lengths, stretches, steps, fades, look=not self._masked(t.device))

    def _half(self, sources: Mapping[str, Tensor], device: torch.device) -> bool:
        """Whether polar factors are iterated in bfloat16; "auto": where that is what an accelerator is fast at."""
        if self.precision != "auto":
            return self.precision == "half"
        return device.type == "cuda" and all(source.dtype != torch.float64 for source in sources.values())
