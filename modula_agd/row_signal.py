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
from modula_agd.polar import working_dtype
from modula_agd.rescale import rescale

MEMORY = 0.98
"""β_v: about the last fifty gradients; 0.99 did alike (docs/benchmarks.md)."""

Rows = Float[Tensor, " rows"]


def row_squares(x: Float[Tensor, "rows cols"]) -> Rows:
    """‖x_r‖² of each row, in double precision: no square over- or underflows, and nothing of x's size is in double precision."""
    scaled, peak = rescale(x.detach().to(working_dtype(x.dtype)), (1,))
    norms = torch.linalg.vector_norm(scaled, dim=1).to(precise(x.device))
    return (norms * peak.flatten().to(norms)).square()


def signal(mean: Rows, mean_weight: Rows, power: Rows, power_weight: Rows) -> Rows:
    """c_r of each row; 1 before anything was heard of it.

    Args:
        mean: ‖m_r‖², with m as the state has it.
        mean_weight: what m_r weighs, below 1.
        power: v_r times what it weighs, as ``renewed`` returned it.
        power_weight: what v_r weighs, below 1.
    """
    known = (power > 0) & (mean_weight > 0)
    # one factor after another, as a weight's square may underflow of a row that was heard of long ago
    length = mean.sqrt() / torch.where(known, mean_weight, 1.0)
    share = length * (torch.where(known, power_weight, 1.0) / torch.where(known, power, 1.0)).sqrt()
    return torch.where(known, share.clamp(max=1.0), 1.0)


def renewed(
    before: Rows, fresh: Rows | None, share: float, heard: Bool[Tensor, " rows"], finite: Bool[Tensor, ""]
) -> Rows:
    """A mean times what it weighs, with the fresh value counted in; or what it weighs. Nothing is uploaded, which a graph could not hold.

    Args:
        before: before.
        fresh: of this gradient; None for what it weighs, which is 1.
        share: what it counts for.
        heard: where False, of a row of which the gradient says nothing, only the past counts less.
        finite: where False, of a step left out, all stays.
    """
    value = heard.to(before.dtype) if fresh is None else torch.where(heard, fresh, 0.0)
    return torch.where(finite & value.isfinite(), before.lerp(value, share), before)
