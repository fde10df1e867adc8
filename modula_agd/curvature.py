"""Measured curvature: how fast the slope is used up along the steps that were taken, against what the bound expects.

The next batch's gradient, which a step's direction has not seen either, measures the slope that the step has left:

    s_n = Σ_k p_k·m_k·ω_k·⟨g_n, u_n⟩     s′_n = Σ_k p_k·m_k·ω_k·⟨g_{n+1}, u_n⟩     κ = mean of s_n − s′_n / mean of e_n

(p_k are the portions of step n, ``balance.py``. Of weights that go further than these, ``stretch.py`` and multipliers, e_n is as many times
more as they do in the mean.)

The declared bound, of curvature h·(a·D)² along a short step, expects one of t_n to use up e_n = t_n·h·(a·D)². So κ is a secant estimate
of the true curvature in units of the declared one: 1 where the bound tells it exactly, below 1 where it is loose, above 1 where weights
have outgrown their declared sizes. Of a long step the bound itself, whose growth is more than linear, expects more than e_n (half as
much again at η = 0.5), which counts as curvature here and keeps long steps shorter. Fresh batches make both slopes unbiased, and in the
mean of differences their noise nearly cancels, as the gradient that ends one difference begins the next.

The steps are those of majorants whose B is multiplied by κ (``Majorant.curved``). Scores of classes that are declared near 0, as those
of many layers without a factor are, come to 1 soon, by growth that no bound at declared sizes has: counted as they are, κ would have to be
1/a² there, and plain networks of eight layers did not learn (docs/trials.md). So scores count as ``OUTPUTS`` at least where curvature is
measured, and κ may be as much less as that is cautious (``slack``). The bound of a captured model can be off by more than a declared
one, either way: with scores of 0.3, near what an example shows at first, κ comes to 0.4 on a BERT and to 16 and more on a plain
convolutional network.
"""

from typing import Any

import torch
from torch import Tensor

from modula_agd.many import is_finite
from modula_agd.state import Each, Scalar, State

MEMORY = 0.95
"""Weight of the past in both means: about the last twenty steps."""
LEAST, MOST = 1 / 8, 16.0
"""κ is kept between these (the least times ``slack``), and no single step counts for more than MOST. A slope that has not
fallen must not send a step to infinity; steps that were let grow further did no better by training losses over whole runs
(docs/trials.md)."""
UNKNOWN = 1 / 2
"""The least κ where measured descents do not stand out of noise, of which steps would be made that are longer by 1/κ."""

OUTPUTS = 1.0
"""Least magnitude that outputs of captured models count with, and scores of classes of any network: what this library's own declare, and
what scores come to as they are learnt."""
SEEN = 0.3
"""Least magnitude that measured curvature may let scores count with, where they are declared or seen below ``OUTPUTS``. Assumed, as is
that: chosen by training losses of small models."""


def slack(scores: float) -> float:
    """What the least κ is multiplied with where scores of that magnitude count as ``OUTPUTS`` at least."""
    return (max(scores, SEEN) / max(scores, OUTPUTS)) ** 2


def curvature(state: State, steady: Scalar, noise: float, least: float = 1.0) -> Scalar:
    """κ: 1 before anything was measured.

    Args:
        state: with the steps so far counted in.
        steady: q, the share of the descents' mean square that their mean has (``held_out.py``).
        noise: what q is, in expectation, of noise alone: (1 − β_s)/(1 + β_s) of a mean with weight β_s of the past. Up to
            this q the least κ is ``UNKNOWN``, and from four times as much on ``LEAST``.
        least: what the least κ is multiplied with (``slack``).
    """
    known = state.expected > 0
    ratio = state.fallen / torch.where(known, state.expected, 1.0)
    lowest = least * (UNKNOWN * noise / steady).clamp(LEAST, UNKNOWN)
    return torch.where(known, torch.maximum(ratio, lowest), 1.0).clamp(max=MOST)


def mean_multiple(multiples: Each, gains: Each) -> Scalar:
    """How many times as much slope a step is to use up, of which each weight goes so many times as far; 1 where nothing descends.

    Args:
        multiples: of each parameter.
        gains: p_k·m_k·ω_k·⟨g_k, u_k⟩ of each parameter, what it gives to the descent.
    """
    weights = gains.clamp(min=0.0)
    total = weights.sum()
    known = (total > 0) & is_finite(total)
    return torch.where(known, (weights * multiples).sum() / torch.where(known, total, 1.0), 1.0)


def looked_back(state: State, left: Tensor, reach: Tensor, *, doubtful: bool = False) -> dict[str, Any]:
    """The state's ``fallen`` and ``expected`` with the last step counted in. The very first counts as if κ were 1.

    A step that moved a weight of which the fresh gradient says nothing (or the other way round) is left out, and so is one without
    an expectation.

    Args:
        state: before the update, with the last step's ``descents``.
        left: ⟨g_{t+1}, u_t⟩ of each parameter, 0 where there is no gradient or was no direction.
        reach: p_k·m_k·ω_k of each parameter at the last step.
        doubtful: whether the bound may be far off, as a captured model's is or one whose scores count for more than is declared. The first
            steps' means are then plain ones, so that a few steps outweigh it, and not twenty.
    """
    fall = (reach * (state.descents - left)).sum()
    comparable = ((state.descents != 0) == (left != 0)).all() & is_finite(fall) & (state.due > 0)
    share = (1 - MEMORY) * comparable.to(fall.dtype)
    if doubtful:
        share = torch.maximum(share, comparable / (state.steps - state.skipped + 1).to(fall.dtype))
    bound = MOST * state.due
    fall = torch.where(comparable, torch.minimum(torch.maximum(fall, -bound), bound), 0.0)
    known = state.expected > 0
    fallen, expected = (torch.where(known, mean, state.due) for mean in (state.fallen, state.expected))
    return {"fallen": fallen.lerp(fall, share), "expected": expected.lerp(state.due, share)}
