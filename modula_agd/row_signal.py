"""Rows by their signal: how far each row of a weight goes, where a direction is made row by row.

In a norm that is a maximum over rows (an embedding's, or a matrix into logits) the unit direction moves every row at full length, those of
which the gradient is all noise like the others. But a direction stays of unit norm, and the majorant stays, if rows go less far. Each
goes by the share of signal that its past gradients had,

    c_r = ‖m_r‖ / sqrt(v_r),   at most 1,      v_r = mean of ‖g_r‖², with weights β_v^(n−i)

with m the momentum, both means divided by what they weigh: the gradients that said something of the row. c_r is 1 where these are all
alike, however seldom they come, and where there was one; of pure noise it tends to sqrt((1 − β)/(1 + β)), 0.16 at β = 0.95. Adam (Kingma
& Ba 2015, arXiv:1412.6980) does so with each entry, and counts the gradients that say nothing; a row is the block of this norm, and takes
one number.

Rows into logits then bear longer steps than a bound allows that is attained where a feature vector of length sqrt(i) is parallel to a
row of length 1/sqrt(i). Where they are incoherent, as in the mean, a row moves the logit by 1/sqrt(i) of that: full alignment is too
careful for the last layer (Everett et al. 2024, arXiv:2407.05872). So at typical constants such a weight goes ``RowNorm.stride`` =
sqrt(i) times as far, which the certificate assumes to be borne. Neither the descent nor the growth counts what it goes further;
measured curvature, which is of the steps made, does.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from modula_agd.device import precise
from modula_agd.many import is_finite
from modula_agd.polar import working_dtype
from modula_agd.rescale import divided, peaks
from modula_agd.state import State

MEMORY = 0.98
"""β_v: about the last fifty gradients; 0.99 did alike (docs/trials.md)."""

Rows = Float[Tensor, " rows"]


def row_squares(x: Float[Tensor, "rows cols"]) -> Rows:
    """‖x_r‖² of each row, in double precision: no square over- or underflows, and nothing of x's size is in double precision."""
    x, wide = x.detach().to(working_dtype(x.dtype)), precise(x.device)
    peak = peaks(x, (1,))
    norms = torch.linalg.vector_norm(divided(x, peak), dim=1)
    return (norms.to(wide) * peak.flatten().to(wide)).square()


def signal(state: State, means: Rows) -> Rows:
    """c_r of all rows; 1 before anything was heard of one.

    Args:
        state: before the update.
        means: ‖m_r‖², with m as the state has it.
    """
    known = (state.powers > 0) & (state.mean_weights > 0)
    # one factor after another, as a weight's square may underflow of a row that was heard of long ago
    length = means.sqrt() / torch.where(known, state.mean_weights, 1.0)
    share = length * (torch.where(known, state.power_weights, 1.0) / torch.where(known, state.powers, 1.0)).sqrt()
    return torch.where(known, share.clamp(max=1.0), 1.0)


def in_momentum(state: State, squares: Rows, share: float, counts: Bool[Tensor, " rows"]) -> dict[str, Rows]:
    """The state's ``mean_weights`` with gradients counted in as the momentum counts them.

    Args:
        state: before the update.
        squares: ‖g_r‖² of these gradients; 0 of a row of which they say nothing, whose past alone counts less.
        share: what they count for in the momentum.
        counts: where False, of a weight without a gradient or a step left out, all stays.
    """
    return {"mean_weights": _renewed(state.mean_weights, (squares > 0).to(squares.dtype), share, counts)}


def in_powers(state: State, squares: Rows, means: Rows, part: float, counts: Bool[Tensor, " rows"]) -> dict[str, Rows]:
    """The state's ``powers`` and ``power_weights`` with fresh gradients counted in.

    Args:
        state: before the update, with what was absorbed counted in.
        squares: as for ``in_momentum``.
        means: as for ``signal``.
        part: the share of the step's samples that the gradients are made of; they have so much more noise than all of them.
        counts: as for ``in_momentum``.
    """
    heard, weight = squares > 0, state.mean_weights
    if part < 1:
        mean = torch.where(weight > 0, means / torch.where(weight > 0, weight.square(), 1.0), 0.0)
        squares = torch.where(heard, (mean + part * (squares - mean)).clamp(min=0.0), 0.0)
    return {
        "powers": _renewed(state.powers, squares, 1 - MEMORY, counts),
        "power_weights": _renewed(state.power_weights, heard.to(squares.dtype), 1 - MEMORY, counts),
    }


def _renewed(before: Rows, fresh: Rows, share: float, counts: Bool[Tensor, " rows"]) -> Rows:
    return torch.where(counts & is_finite(fresh), before.lerp(fresh, share), before)
