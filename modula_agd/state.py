"""What an optimisation method remembers between two updates: tensors only."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

Scalar = Float[Tensor, ""]


class State(NamedTuple):
    """What the last update did; tensors only, on the parameters' device, double precision.

    Args:
        eta: η, relative step of the whole network, dimensionless.
        t: relative step of an atom of mass 1, dimensionless.
        descent: S, first-order decrease of the loss per unit t.
        change: what the majorant predicted the loss to change by, ≤ 0.
        magnitude: a, bound of the output.
        depth: D.
        descents: ⟨g_k, u_k⟩ of each parameter, in the network's order; 0 without a gradient.
        sizes: ω_k of each parameter.
        steps: number of updates.
        skipped: number of them left out because of a non-finite gradient.
        smoothed: Ŝ times ``weight``; 0 without momentum, as are the next two.
        scale: the mean of s² times ``weight``.
        weight: 1 − β^n after n measurements, the sum of what they weigh.
        momentum: m of each parameter that has had a gradient; empty without momentum.
    """

    eta: Scalar
    t: Scalar
    descent: Scalar
    change: Scalar
    magnitude: Scalar
    depth: Scalar
    descents: Float[Tensor, " parameters"]
    sizes: Float[Tensor, " parameters"]
    steps: Int[Tensor, ""]
    skipped: Int[Tensor, ""]
    smoothed: Scalar
    scale: Scalar
    weight: Scalar
    momentum: dict[str, Tensor]
