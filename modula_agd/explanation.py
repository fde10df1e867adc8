"""Why a step was as long as it was: what each weight gave, what it cost, and what held it back.

A step t lowers the loss by t·S, S = Σ_k m_k·ω_k·⟨g_k, u_k⟩, and the majorant takes back what the network's growth may do, of
which the slope at 0 is the depth D = Σ_k m_k·d_k: d_k is how often a relative change of weight k arrives at the output. So a
weight with the portion p_k of a step *gives* p_k·m_k·ω_k·⟨g_k, u_k⟩/Σ|…| of the descent and *costs* p_k·m_k·d_k/D of the growth. The
descent along directions made of past gradients, divided by what the mean of those gradients promises, ‖m_k‖_dual, tells signal from
noise: about 1 is all signal, about 0 all noise; being of one batch, it is as noisy as that batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from modula_agd import row_signal
from modula_agd.bound import aligned
from modula_agd.error import InvalidArgument
from modula_agd.exchange import ALONE, Exchange
from modula_agd.forecast import MEMORY
from modula_agd.method import Method
from modula_agd.state import State
from modula_agd.summary import columns

NOISE = 0.1
"""Share of signal below which noise is said to hold a weight back."""
DEAR = 2.0
"""A weight whose cost is this many times what it gives is said to be held back by growth."""


@dataclass(frozen=True)
class Share:
    """One weight in a step.

    Args:
        name: of the parameter.
        dual: ‖m‖_dual of the mean of past gradients (of the gradient where there is no momentum): the descent that they promise, rows by
            their signal where they go so. Of a weight whose first gradient came late it is too small by what it missed.
        descent: ⟨g, u⟩, what the fresh gradient measures along the direction.
        signal: descent/dual; 1 is no noise. Without momentum the two are the same.
        gives: share of the descent, negative where it raises the loss; their absolute values add up to 1.
        costs: share of the growth to first order.
        moved: ‖ΔW‖/ω along the direction, the relative step of this weight, the optimizer's multiplier counted in; of rows that go by
            their signal, that of a row which is all signal.
        stretch: how many times as far it goes as its portion of the step, because it lags.
        decayed: share of itself that the weight lost beside it, from 0 to 1.
        spared: its kind, where the decay leaves that alone, such as "vector" or "logits"; else None.
        held_back_by: what bounds it, in words.
    """

    name: str
    dual: float
    descent: float
    signal: float
    gives: float
    costs: float
    moved: float
    stretch: float
    decayed: float
    spared: str | None
    held_back_by: str


@dataclass(frozen=True)
class Explanation:
    """The last step of a method; ``print`` shows it as a table.

    Args:
        shares: one per weight, in the network's order.
        eta: η.
        t: relative step of a weight of mass 1.
        descent: S as this batch measured it.
        smoothed: Ŝ, the mean that the step reckoned with.
        depth: D.
        magnitude: a.
        curvature: κ, measured along the last steps in units of the declared curvature; 1 where it is not measured.
        asked: mean of the steps that majorants asked for, over the run's last half by default; None where steps are not averaged.
        recent: mean of the newest, twice which a step is at most; None likewise.
        promised: what the last majorant says that this step lowers the loss by, at least; below 0 where the step, a mean of those that
            majorants asked for, is longer than this one allows. The optimizer's multiplier is not counted in.
        predicted: the mean of that over the last hundred steps or so; None where no loss was told.
        realised: the mean of what the loss fell by.
        error: standard error of ``realised``.
    """

    shares: tuple[Share, ...]
    eta: float
    t: float
    descent: float
    smoothed: float
    depth: float
    magnitude: float
    curvature: float
    asked: float | None
    recent: float | None
    promised: float
    predicted: float | None
    realised: float | None
    error: float | None

    @property
    def verdict(self) -> str:
        """Whether the majorant is loose or violated, in words."""
        if self.predicted is None or self.realised is None or self.error is None:
            return "unknown: no loss was told; pass value=loss to step() or update()"
        if self.realised + 2 * self.error < self.predicted:
            return "violated: the loss falls by less than predicted, or the gradient's own batch flatters it"
        if self.realised - 2 * self.error > self.predicted:
            return "loose: the loss falls by more than predicted, and longer steps would do"
        return "neither loose nor violated, within two standard errors"

    def __str__(self) -> str:
        header = [
            "parameter",
            "dual norm",
            "descent",
            "signal",
            "gives",
            "costs",
            "step",
            "stretch",
            "decay",
            "held back by",
        ]
        shown = [True] * 7 + [
            any(x.stretch != 1 for x in self.shares),
            any(x.decayed or x.spared for x in self.shares),
            True,
        ]
        body = [
            (
                x.name,
                f"{x.dual:.3g}",
                f"{x.descent:.3g}",
                f"{x.signal:.0%}",
                f"{x.gives:.1%}",
                f"{x.costs:.1%}",
                f"{x.moved:.2e}",
                f"{x.stretch:.2f}",
                f"none: {x.spared}" if x.spared else f"{x.decayed:.2e}",
                x.held_back_by,
            )
            for x in self.shares
        ]
        header, *body = ([*compress(row, shown)] for row in (header, *body))
        facts = [("η", f"{self.eta:.4g}")]
        if self.asked is not None:
            means = (
                f"t is the mean of those that majorants asked for: {self.asked:.4g}, of the newest {self.recent:.4g}"
            )
            facts.append(("steps", means))
        facts += [
            (
                "descent S",
                f"{self.descent:.4g} on this batch, {self.smoothed:.4g} in the mean that the step reckons with",
            ),
            ("growth", f"depth {self.depth:.4g}, output magnitude {self.magnitude:.4g}"),
            ("curvature", f"{self.curvature:.3g} of the declared one, along the last steps"),
            ("promised decrease", f"{self.promised:.4g}"),
        ]
        if self.predicted is not None:
            facts.append(("predicted, mean", f"{self.predicted:.4g} per step"))
            facts.append(("realised, mean", f"{self.realised:.4g} ± {self.error:.2g} per step"))
        facts.append(("majorant", self.verdict))
        table = columns(header, body)
        return "\n".join([*table, table[1], aligned(facts)])


def explain(
    method: Method, state: State, multipliers: Mapping[str, float] | None = None, exchange: Exchange = ALONE
) -> Explanation:
    """Account for the update behind a state. Waits for the device.

    Args:
        method: that made it.
        state: as the update returned it.
        multipliers: what the steps were multiplied with afterwards, by parameter; 1 where absent.
        exchange: the other processes, which must all ask.

    Raises:
        InvalidArgument: the state is another method's.
    """
    if not isinstance(state, State) or state.descents.numel() != len(method.atoms):
        what = f"{state.descents.numel()} parameters" if isinstance(state, State) else type(state).__name__
        raise InvalidArgument(
            f"explain was given the state of {what}, but its method has the parameters {', '.join(method.atoms)}. Pass the state that "
            "this method's update returned."
        )
    t, sizes, pairs = float(state.t), (state.sizes * state.portions).tolist(), state.descents.tolist()
    portions = dict(zip(method.atoms, state.portions.tolist(), strict=True))
    sensitivities = {name: portions[name] * depth for name, depth in method.sensitivities(state).items()}
    depth = sum(sensitivities.values()) or 1.0
    total = sum(abs(mass * size * pair) for mass, size, pair in zip(method.masses.values(), sizes, pairs, strict=True))
    made, finite = int(state.steps) > 0, math.isfinite(float(state.descent))
    shares = []
    found = exchange.numbers(lambda norm, momentum: norm.dual(momentum), method.norms, state.momentum)
    # the mean of the gradients so far: before them there was nothing
    counted = 1 - (method.momentum or 0.0) ** max(int(state.steps - state.skipped), 1)
    duals = {name: float(dual) / counted for name, dual in found.items()}
    # rows that go less far promise less
    means = method.row_means(state, exchange)
    promised = row_signal.signal(state, means) * means.sqrt()
    for name in method.row_places.keys() & duals.keys():
        scale = method.norms[name].factor(method.atoms[name].shape)  # pyright: ignore[reportAttributeAccessIssue]
        duals[name] = float(promised[method.row_places[name]].sum()) / (scale * counted)
    steps = (state.steps - state.skipped).clamp(min=1)
    shrinks = method.lost(state.t, state.portions, state.stretches, steps, state.descents != 0)
    each = zip(method.masses.items(), sizes, pairs, state.stretches.tolist(), shrinks.tolist(), strict=True)
    for (name, mass), size, pair, stretch, shrink in each:
        dual = duals.get(name, float(pair))
        gives = mass * size * pair / total if total else 0.0
        costs = sensitivities[name] / depth
        signal = pair / dual if dual else 0.0
        length = stretch * portions[name] * mass * t if pair and finite else 0.0
        multiplier = (multipliers or {}).get(name, 1.0)
        moved = multiplier * method.strides[name] * length
        decayed = min(multiplier * shrink, 1.0) if length else 0.0
        if made and finite:
            reason = _reason(mass, pair, signal, gives, costs, method.momentum is not None)
        else:
            reason = "skipped: the gradient was not finite" if made else "no step was made yet"
        shares.append(
            Share(name, dual, pair, signal, gives, costs, moved, stretch, decayed, method.spared(name), reason)
        )
    told = float(state.told)
    predicted = float(state.predicted) / told if told else None
    realised = float(state.realised) / told if told else None
    error = _standard_error(float(state.wander) / told, told) if told else None
    weight = float(state.weight)
    smoothed = float(state.smoothed) / weight if weight else float(state.descent)
    return Explanation(
        tuple(shares),
        float(state.eta),
        t,
        float(state.descent),
        smoothed,
        float(state.depth),
        float(state.magnitude),
        float(method.measured_curvature(state)),
        None if method.step_average is None else float(state.asked),
        None if method.step_average is None else float(state.recent),
        -float(state.change),
        predicted,
        realised,
        error,
    )


def scalars(method: Method, state: State, multipliers: Mapping[str, float | Tensor] | None = None) -> dict[str, float]:
    """The update behind a state in numbers, for a logger. Waits for the device, once.

    Args:
        method: that made it.
        state: as the update returned it.
        multipliers: as for ``explain``.

    Returns:
        "eta", "t", "descent" and "smoothed" (S of this batch, Ŝ of the mean), "depth", "magnitude", "curvature" (κ, 1 where it is
        not measured), "promised", "steps", "skipped"; "asked" and "recent", the means that t is made of, where steps are averaged;
        "predicted" and "realised" where losses were told; "step/NAME", the relative step of each weight.
    """
    weight, told = state.weight.clamp(min=1e-300), state.told.clamp(min=1e-300)
    smoothed = torch.where(state.weight > 0, state.smoothed / weight, state.descent)
    moved = (state.descents != 0) * state.stretches * state.portions * state.t
    numbers = {
        "eta": state.eta,
        "t": state.t,
        "descent": state.descent,
        "smoothed": smoothed,
        "depth": state.depth,
        "magnitude": state.magnitude,
        "curvature": method.measured_curvature(state),
        "promised": -state.change,
        "asked": state.asked,
        "recent": state.recent,
        "predicted": state.predicted / told,
        "realised": state.realised / told,
        "steps": state.steps,
        "skipped": state.skipped,
        "told": state.told,
    }
    for (name, mass), length in zip(method.masses.items(), moved.unbind(), strict=True):
        numbers[f"step/{name}"] = method.strides[name] * mass * length * (multipliers or {}).get(name, 1.0)
    flat = torch.stack([value.to(state.t).reshape(()) for value in numbers.values()])
    found = dict(zip(numbers, flat.tolist(), strict=True))
    if not found.pop("told"):
        del found["predicted"], found["realised"]
    if method.step_average is None:
        del found["asked"], found["recent"]
    return found


def _reason(mass: float, pair: float, signal: float, gives: float, costs: float, held_out: bool) -> str:
    if mass == 0:
        return "frozen: mass 0"
    if pair == 0:
        return "no gradient"
    if pair < 0 and held_out:
        return "noise: the fresh gradient points the other way"
    if held_out and signal < NOISE:
        return "noise"
    if costs > DEAR * max(gives, 0.0):
        return "growth: it costs more than it gives"
    return "the common step"


def _standard_error(square: float, told: float) -> float:
    """Of an exponential mean of differences of values with independent noise of variance square/2."""
    return (1 - MEMORY) / told * (square / 2) ** 0.5
