"""The held-out rule: directions from past gradients, descent measured by the fresh one.

On a minibatch, ⟨g, u(g)⟩ counts noise as descent: a gradient always agrees with a direction made from itself. With
momentum β the direction is made of *past* gradients, and the *fresh* one, which it has not seen, measures the descent at
the same point:

    u_t = direction of l_{t−1}          s_t = Σ_k p_k·m_k·ω_k·⟨g_t, u_t⟩      Ŝ_t = mean of s_1 … s_t, with weights β_s^(t−i)
    m_t = β·m_{t−1} + (1 − β)·g_t       l_t = (1 − ν)·m_t + ν·g_t             t̂ = argmin of the majorant at max(Ŝ_t, 0)

A direction that has not seen g_t answers one step late, and momentum with a delay hardly damps: along an eigenvector of curvature
λ, a step that moves by a/λ for each unit of l is stable for a < 1 alone, whatever β, where momentum that has seen g_t bears
2(1 + β)/(1 − β), 78 at β = 0.95; beyond, weights swing with a period of 28 steps. So the direction is made of the *lead* l, in which
the newest past gradient counts for ν more (quasi-hyperbolic momentum, Ma & Yarats 2019, arXiv:1810.06801): at ν = 2(1 − β) it bears
a < 5.5, and what swings beyond does so within 8 steps. The lead is of the past as well. A direction that serves r steps is later
still, and has ν = 2(1 − β)·sqrt(r). No ν is above 1/2, from which on more of one gradient does not help.

The expectation of s_t over the fresh batch is the true descent along u_t. As signal drowns in noise Ŝ → 0, and with it the step
that the majorant asks for; the step made is a mean of those (``step_average.py``).
One wild measurement must not set the steps of the next twenty: an s_t beyond ``OUTLIER`` root-mean-squares of those before it
counts as that many. Where weights had outgrown their declared sizes, loss and step drove each other up without; so their mean
square rises by at most 6% a step at β_s = 0.95, and a tenfold rise of it takes forty.

Of the same measurements follows how far beyond the minimiser a step may go. By a quadratic, twice the minimiser is the longest step
that does not raise the loss; live weights are then no better for it, but their average is, about which they move, once it is
of many steps. So step n's majorant asks for r_n minimisers, with

    r_n = 1 + (1 − q)·(1 − c_n^⅕)       q = Ŝ²/mean of s²

c_n = 5/(n + 4) is what the newest weights count for in the average (``averaging.py``; here, steps that were left out are not counted),
so that the first step is its majorant's own. q is 1 where descents are all alike; it tends to 0 where they come to nothing in the mean,
by the noise of batches or as weights go back and forth across a valley.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from modula_agd.averaging import newest
from modula_agd.many import between, cast, copy_, unless, unless_
from modula_agd.polar import working_dtype
from modula_agd.state import Scalar, State

OUTLIER = 1.5
"""Root-mean-squares from which a measured descent is cut, chosen by training losses (docs/trials.md). Above 1, or pure noise
would wear the mean down to 0."""
LATE = 1 / 5
"""Power of c_n with which steps come to go beyond their minimisers, chosen by losses in training and on a tenth of the training data that
was held out of it (docs/trials.md)."""


def measured(descent: Scalar, state: State, smoothing: float | None) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """The descent to reckon with, and the state's ``smoothed``, ``scale`` and ``weight`` with the fresh measurement counted in.

    Args:
        descent: s_t, finite; 0 where there is nothing to measure (a zero gradient, a skipped batch), which counts in no mean.
        state: before the update.
        smoothing: β_s; None takes the descent as it is.

    Returns:
        Ŝ_t (0 where s_t is 0: a zero gradient means a zero step, whatever the past says), smoothed, scale, weight.
    """
    smoothed, scale, weight = state.smoothed, state.scale, state.weight
    if smoothing is None:
        return descent, smoothed, scale, weight
    share = (1 - smoothing) * (descent != 0).to(descent.dtype)
    bound = torch.where(weight > 0, OUTLIER * (scale / weight.clamp(min=1e-12)).sqrt(), torch.inf)
    cut = torch.minimum(torch.maximum(descent, -bound), bound)
    smoothed, scale = smoothed.lerp(cut, share), scale.lerp(cut.square(), share)
    weight = weight.lerp(torch.ones_like(weight), share)
    return torch.where(descent == 0, 0.0, smoothed / weight.clamp(min=1e-12)), smoothed, scale, weight


def steadiness(smoothed: Scalar, scale: Scalar, weight: Scalar) -> Scalar:
    """q, the share of the descents' mean square that their mean has: 1 where they are all alike, 0 where they come to nothing.

    Args:
        smoothed: as ``measured`` returned it, as are the next two.
        scale: the mean square times ``weight``.
        weight: the sum of what has been measured.
    """
    known = scale > 0
    mean = smoothed.clamp(min=0.0).square()
    return torch.where(known, mean / torch.where(known, scale * weight, 1.0), 1.0).clamp(max=1.0)


def relaxed(steady: Scalar, steps: Scalar) -> Scalar:
    """r_n, how many minimisers a majorant asks for: from 1 to 2 − q, the longer there have been averages to gain by it.

    Args:
        steady: q.
        steps: n ≥ 1, this one counted, those left out not.
    """
    return 1 + (1 - steady) * (1 - newest(steps.clamp(min=1).to(steady.dtype)) ** LATE)


def lead(momentum: float, period: int) -> float:
    """ν of a momentum β and directions that serve ``period`` steps.

    It is within a tenth of the value whose loop is stable for the longest steps (tests/test_held_out.py), for β from 0.5 where
    directions serve one step, and at 0.95 up to eight.
    """
    return min(0.5, 2 * (1 - momentum) * math.sqrt(period))


def short_dtype(dtype: torch.dtype) -> torch.dtype:
    """For what steps are not made of: a lead is a source of directions, and those are measured as they are made; a direction that is
    kept to measure along it alone may be any near it. Half a weight's size does.
    """
    return torch.float64 if dtype == torch.float64 else torch.bfloat16


def begun(past: Tensor, gradient: Tensor, started: Bool[Tensor, ""]) -> Tensor:
    """The lead, or the gradient where every gradient before was left out, so that there is none yet."""
    return torch.where(started, past, gradient.to(past.dtype))


def renewed(
    state: State,
    grads: Mapping[str, Tensor],
    share: float,
    leads: Mapping[str, float],
    finite: Bool[Tensor, ""] | None,
    *,
    full: bool = False,
    in_place: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """The state's ``momentum`` and ``lead`` with fresh gradients counted in.

    A first gradient counts like any other, as if those before had been 0: directions do not depend on a momentum's scale, and it
    would outweigh the next twenty otherwise.

    Args:
        state: before the update.
        grads: the fresh gradients by name, detached.
        share: what they count for in the momentum: 1 − β, times their part of the step's samples.
        leads: ν of each parameter.
        full: whether leads are as precise as the momentum.
        finite: where False, the past is kept; None where that has been looked at.
        in_place: write over what the state holds, for an optimizer that owns it.
    """
    fresh = {name: gradient.to(working_dtype(gradient.dtype)) for name, gradient in grads.items()}
    if not fresh:
        return {"momentum": state.momentum, "lead": state.lead}
    # parameters may have been moved to another dtype since
    means = {
        name: state.momentum[name].to(value.dtype) if name in state.momentum else torch.zeros_like(value)
        for name, value in fresh.items()
    }
    if finite is not None:
        fresh = {name: torch.where(finite, value, means[name]) for name, value in fresh.items()}
    if in_place:
        torch._foreach_lerp_(list(means.values()), list(fresh.values()), share)  # pyright: ignore
    else:
        means = between(means, fresh, share)
    led: dict[str, Tensor] = {}
    for nu in {leads[name] for name in fresh}:
        # held by nothing else, each of these is let go once it is in its own precision
        led |= _led(
            state.lead, between(means, {n: x for n, x in fresh.items() if leads[n] == nu}, nu), finite, full, in_place
        )
    return {"momentum": {**state.momentum, **means}, "lead": {**state.lead, **{name: led[name] for name in fresh}}}


def _led(
    before: Mapping[str, Tensor], new: dict[str, Tensor], finite: Bool[Tensor, ""] | None, full: bool, in_place: bool
) -> dict[str, Tensor]:
    """New leads in their own precision, or those before where a step is left out; where those are, if ``in_place``."""
    dtypes = {name: x.dtype if full else short_dtype(x.dtype) for name, x in new.items()}
    places = {n: before[n] for n in new if in_place and n in before and before[n].dtype == dtypes[n]}
    if finite is None:
        copy_(places, new)
    else:
        unless_(finite, places, cast({name: new[name] for name in places}, dtypes))
    rest: dict[str, Tensor] = {}
    for name in [name for name in new if name not in places]:
        rest |= unless(finite, before, {name: new.pop(name).to(dtypes[name])})
    return places | rest
