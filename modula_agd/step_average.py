"""Averaged steps: a step is the mean of those that the majorants of a growing part of the run asked for.

On minibatches the minimiser t̂_n of one step's majorant is mostly noise: the mean of twenty measured descents stands out of it
by little, and is now several times the true one, now none at all. Such steps cost more than even ones of the same length, as what a step
loses by curvature is quadratic in it. Nor is a minimiser far-sighted: it answers each sharp valley by shorter steps, and of
shorter steps the valley gets sharper still (Roulet et al. 2024, arXiv:2407.06183). So, with the weights of a polynomial average,

    t̄_n = t̄_{n−1} + c_n·(t̂_n − t̄_{n−1}),        c_n = (ρ + 1)/(n + ρ)

about the last 1/(ρ + 1) of the run's steps decide, however many there have been, as of the averaged weights (``averaging.py``), which alone
are evaluated: what moves about faster than they do is taken out by them.

Half a run is late where descents vanish, as training samples are fitted, or weights run away: a step is at most ``MOST`` times a mean of
the newest, r_n, which is made like t̄ with shares of at least 1 − ``MEMORY``, but those of averaged weights once these are less:

    t_n = min(t̄_n, MOST·r_n)

So r_n is of about the last fifty steps, and in long runs of the last fifth: where descents hardly stand out of noise, fifty majorants
in a row may ask for next to nothing, and weights would stop. At ρ = 1 both means are the same for the first hundred steps, in which the
limit cannot bind.
"""

from typing import Any

import torch
from torch import Tensor

from modula_agd.averaging import newest
from modula_agd.state import Scalar, State

POWER = 1.0
"""ρ: about the last half of a run counts. Chosen by training losses (docs/trials.md), as were the next two."""
MEMORY = 0.98
"""Weight of the past in the mean of recent steps, at least; more in a run of more than 246 steps, by the averaged weights' share."""
MOST = 2.0
"""Means of recent steps that a step is at most."""


def averaged(wanted: Scalar, state: State, power: float, counts: Tensor) -> tuple[Scalar, dict[str, Any]]:
    """t_n, 0 where the step does not count, and the state's ``asked``, ``recent`` and ``majorants`` with it counted in.

    Args:
        wanted: t̂_n ≥ 0.
        state: before the update.
        power: ρ ≥ 0.
        counts: where False, of a step left out and of a zero gradient, which say nothing of steps, all three stay.
    """
    count = state.majorants + 1
    share = newest(count, power)
    means: dict[str, Any] = {"majorants": torch.where(counts, count, state.majorants)}
    recent = torch.maximum(share, newest(count).clamp(max=1 - MEMORY))
    for name, least in (("asked", share), ("recent", recent)):
        before = getattr(state, name)
        means[name] = torch.where(counts, before + least * (wanted - before), before)
    return torch.where(counts, torch.minimum(means["asked"], MOST * means["recent"]), 0.0), means
