"""Rows by their signal: how far each row of a weight goes, where a direction is made row by row.

In a norm that is a maximum over rows (an embedding's, or a matrix into logits) the unit direction moves every row at full length, those of
which the gradient is all noise like the others: a rare token's, or one long unseen. But a direction stays of unit norm, and the
majorant stays, if rows go less far. Each goes by the share of signal that its past gradients had,

    c_r = ‖m_r‖ / sqrt(v_r),   at most 1,      v_r = mean of ‖g_r‖², with weights β_v^(n−i)

with m the momentum, both means divided by the sum of their weights. c_r is 1 where a row's gradients are all alike; of pure noise it is
about sqrt((1 − β)/(1 + β)), 0.16 at β = 0.95; and it falls by β a step where a row is not touched. Adam (Kingma & Ba 2015,
arXiv:1412.6980) does so with each entry; a row is the block of this norm, and takes one number.

Rows into logits then bear longer steps than a bound allows that is attained where a feature vector of length sqrt(i) is parallel to a
row of length 1/sqrt(i). Where they are incoherent, as in the mean, a row moves the logit by 1/sqrt(i) of that: full alignment is too
careful for the last layer (Everett et al. 2024, arXiv:2407.05872). So at typical constants such a weight goes ``RowNorm.stride`` =
sqrt(i) times as far, which the certificate assumes to be borne.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from modula_agd.device import precise

MEMORY = 0.98
"""β_v: about the last fifty steps; 0.99 did alike (docs/benchmarks.md)."""

Rows = Float[Tensor, " rows"]


def row_squares(x: Float[Tensor, "rows *rest"]) -> Rows:
    """‖x_r‖² of each row, in double precision."""
    return torch.linalg.vector_norm(x.detach().flatten(1), dim=1, dtype=precise(x.device)).square()


def signal(mean: Rows, power: Rows, momentum: float, heard: Rows) -> Rows:
    """c_r of each row; 1 before anything was heard of it.

    Args:
        mean: ‖m_r‖², with m as the state has it.
        power: v_r, as ``power_renewed`` returned it.
        momentum: β.
        heard: gradients that m and v are made of.
    """
    known = power > 0
    # of means that began at 0
    weights = (1 - MEMORY**heard) / (1 - momentum**heard).clamp(min=1e-30).square()
    share = torch.where(known, mean / torch.where(known, power, 1.0), 0.0) * weights
    return torch.where(known, share.sqrt().clamp(max=1.0), 1.0)


def power_renewed(power: Rows, squares: Rows, heard: Rows) -> Rows:
    """v_r times the sum of its weights, with the fresh gradient counted in.

    Args:
        power: before.
        squares: ‖g_r‖² of the fresh gradient.
        heard: where False, of a weight without a gradient or a step left out, v stays.
    """
    return power.lerp(torch.where(heard, squares, power), (1 - MEMORY))
