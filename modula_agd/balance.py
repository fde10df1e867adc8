"""Balance: how a step is divided among the weights, by how much of its slope each was seen to use up.

Equal relative steps are a convention. Along the directions u_k the loss of a step r_k of each weight is, to second order,
−Σ_k r_k·s_k + ½·Σ_kj r_k·H_kj·r_j, and the next batch's gradient tells what each slope has lost (as in ``curvature.py``):

    s_k = m_k·ω_k·⟨g_t, u_k⟩        f_k = m_k·ω_k·⟨g_t − g_{t+1}, u_k⟩ = Σ_j H_kj·r_j

At the best steps f_k = s_k for every k. Where H has no negative entry, r_k ← r_k·s_k/f_k lowers this loss by minimising a majorant of it
(Sha, Lin, Saul & Lee 2007, Neural Computation 19(8), multiplicative updates for nonnegative quadratic programming). Here the factor
alone is taken, of the steps as they are divided: *portions*

    p_k ∝ mean of s_k / mean of f_k,   within 1/4 and 4 of the whole network's ratio,   Σ_k d_k·p_k = Σ_k d_k = D

Where weights do not interact, f_k = H_kk·p_k, they come to rest at p_k ∝ sqrt(s_k/H_kk), half-way between equal steps and the best.
To go all the way loses where layers pull alike, as any division is then about as good and noise decides (docs/trials.md).

A weight whose slope stays (a head on features that hardly differ) goes further, and one that uses its own up (a first layer on
correlated pixels) less far, while the growth of the whole is, to first order, the declared one: the majorant stays, and t with it is
chosen as before. Both means are of past gradients alone, so that the fresh one measures the descent of a step that it has not seen.
"""

from typing import Any

import torch

from modula_agd.many import is_finite
from modula_agd.state import Each, State

MEMORY = 0.98
"""Weight of the past in both means: about the last fifty steps."""
RANGE = 4.0
"""A portion's ratio is kept within this factor of the whole network's."""


def portions(state: State, depths: Each) -> Each:
    """p_k of each parameter; 1 before anything was measured.

    Args:
        state: with all past steps counted in.
        depths: m_k·d_k of each parameter, its part of the depth.
    """
    gained, used = state.gained.sum(), state.used.sum()
    whole = torch.where((gained > 0) & (used > 0), gained / used, 1.0)
    ratio = torch.where(state.used > 0, state.gained / state.used, torch.inf) / whole
    # a slope that has vanished asks for no step, whatever was used up
    ratio = torch.where(state.gained > 0, ratio, 0.0).clamp(1 / RANGE, RANGE)
    # the first measurements are little more than noise
    wanted = ratio**state.counted
    total = (depths * wanted).sum()
    return torch.where(total > 0, wanted * depths.sum() / total, 1.0)


def weighed(state: State, left: Each, reach: Each, further: Each) -> dict[str, Any]:
    """The state's ``gained``, ``used`` and ``counted`` with the last step counted in, but for weights that stood still or have no gradient.

    Args:
        state: before the update, with the last step's ``descents``.
        left: ⟨g_{t+1}, u_k⟩ of each parameter, 0 where there is no gradient or was no direction.
        reach: m_k·ω_k of each parameter at the last step.
        further: how many times as far each parameter went as its portion of a unit step (``row_signal.py``, ``stretch.py``).
    """
    moved = state.rates > 0
    # a slope is used up per unit step: what a longer one uses up more is not the weight's doing
    fall = reach * (state.descents - left) / torch.where(moved, state.rates * further, 1.0)
    seen = moved & (state.descents != 0) & (left != 0) & (state.due > 0) & is_finite(fall)
    share = (1 - MEMORY) * seen.to(fall.dtype)
    return {
        "gained": state.gained.lerp(torch.where(seen, reach * state.descents, 0.0), share),
        "used": state.used.lerp(torch.where(seen, fall, 0.0), share),
        "counted": state.counted.lerp(torch.ones_like(fall), share),
    }
