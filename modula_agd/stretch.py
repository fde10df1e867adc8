"""Stretch: weights whose way from the averaged weights still leads downhill go further.

Curvature and balance look one step ahead, and short steps find the loss more curved than long ones do: a weight that crosses a
narrow valley with every step, and creeps along it, seems well measured. What it creeps along shows over more steps. The averaged weights
w̄ (``averaging.py``) lie about n/6 steps behind the live ones. Along the way d_k = w_k − w̄_k from there to here

    d_k ← (1 − c_n)·(d_k + Δw_k)        h_k = ⟨g_{n+1}, d_k⟩, the slope that is left at its end
    e_k ← (1 − c_n)·(e_k + f_k)         f_k = −⟨g_n, Δw_k⟩ − q³·⟨g_{n+1} − g_n, Δw_k⟩/2

e_k is what the steps of that way foresaw that it brings. A step that ends beyond its minimiser brings less than its slope says, by half of
what it uses up (the trapezoid rule), which the next gradient measures where directions are kept. It counts as far as descents are steady
(q, ``held_out.py``): in a noisy run steps go beyond their minimisers on purpose, and averages gain by it. Where batches are large and q is
near 1, stretches that slopes alone answered for made steps of several minimisers, and a transformer of 10 million weights whose weights
faded lost what it had learnt.
Of a quadratic h_k rises along the way from −e_k through 0, at the minimiser, to e_k/4 a ninth beyond it and e_k a third. A weight that
is not past e_k/4 goes further, in a run that is twice as long at most twice as far:

    x_k ← x_k·exp(b_k/n),       b_k = (e_k/4 − h_k)/(|e_k|/4 + |h_k|),       1 ≤ x_k ≤ 8 or 2

No weight goes less far than its portion of t: past the minimiser h_k/e_k hardly tells steps that are too long from such as serve
(docs/trials.md). Nor does it where weights swing about a minimiser, as each swing is a slope that a step foresees and that h has not. So
the most is ``MOST`` where outputs are declared not to grow with the weight, as something behind it normalises: the noise that long
steps add to it makes the next ones relatively shorter. Where outputs grow with it and others at once (twice the sizes of all weights are
more than twice the outputs), noise in one layer lengthens the steps of all others, and in plain networks of eight layers and more
stretches, steps and weights drove each other up: there the most is ``PLAIN``. Captured models, whose bounds are an example's, go less
far: to ``PLAIN`` where something normalises, and else no further than their portions.

A weight some rows of which the gradient does not touch keeps its x_k: such rows move by the very gradients that
measure them, and others see less of the way. Neither the descent nor the growth counts what a weight goes further, so that t is chosen as
before; measured curvature does, which is of the steps made. The fresh gradient changes x_k by at most 2%, so a step depends on it by
as much.
"""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from modula_agd.averaging import newest
from modula_agd.many import is_finite
from modula_agd.network import Network
from modula_agd.sensitivity import compounding
from modula_agd.state import Each, Scalar, State

PAST = 1 / 4
"""h_k/e_k of a weight that goes no further."""
MOST, PLAIN = 8.0, 2.0
"""The most that a weight goes further, and the most where outputs grow with it and others at once."""
LARGE = 16.0
"""Times its size that each weight of a captured model has where it is asked how outputs grow: an example's count for more at first."""
STEADY = 3
"""Power of q with which what a step used up counts, chosen by training losses (docs/trials.md)."""
FIRST, SOON = 20, 50
"""Steps before which nothing is stretched, as directions are made of too few gradients; and up to which n counts as that many."""


def spent(state: State, left: Each, reach: Each, steady: Scalar) -> Each:
    """The state's ``slopes`` less what the last step used up of them, as far as descents are steady.

    Args:
        state: before the update, with the last step's ``descents``.
        left: ⟨g_{n+1}, u_n⟩ of each parameter, 0 where there is no gradient or was no direction.
        reach: m_k·ω_k of each parameter, times what it goes further than its portion.
        steady: q of the last step.
    """
    moves = state.t * state.portions * reach
    fall = moves * (state.descents - left) * steady**STEADY / 2
    seen = (state.descents != 0) & (left != 0) & (state.slopes != 0) & is_finite(fall)
    return torch.where(seen, state.slopes - fall, state.slopes)


def stretched(state: State, left: Each, silent: Each, counts: Bool[Tensor, ""], most: Each) -> dict[str, Any]:
    """The state's ``stretches`` and ``foreseen``, for the step that is to be made.

    Args:
        state: before the update, with all that is known of the last step.
        left: h_k; 0 of a weight without a gradient or an average, which goes as far as it did.
        silent: above 0 of a weight that has rows which the gradient does not touch.
        counts: False of a step that is left out.
        most: ``MOST`` or ``PLAIN`` of each.
    """
    steps = state.steps.to(left.dtype)
    moved = torch.where(state.rates > 0, state.rates * state.slopes, 0.0)
    promise = (1 - newest(steps.clamp(min=1))) * (state.foreseen + moved)
    wanted = PAST * promise
    total = wanted.abs() + left.abs()
    lag = torch.where(total > 0, (wanted - left) / torch.where(total > 0, total, 1.0), 0.0)
    further = torch.minimum((state.stretches * (lag / steps.clamp(min=SOON)).exp()).clamp(min=1.0), most)
    # one that stands still says nothing of its steps
    usable = counts & (left != 0) & (silent == 0) & (state.rates > 0) & is_finite(lag) & (steps >= FIRST)
    return {"stretches": torch.where(usable, further, state.stretches), "foreseen": promise}


def farthest(network: Network, **options: Any) -> list[float]:
    """The most that each weight of a network goes further.

    Args:
        network: of those weights.
        options: of ``Network.bound``.
    """
    weights = network.weights()
    sizes = {name: weight.size for name, weight in weights.items()}
    if not network.captured:
        return [PLAIN if x else MOST for x in compounding(network, sizes, **options).tolist()]
    vectors = {name for name, weight in weights.items() if weight.role == "vector"}
    large = {name: size if name in vectors else LARGE * size for name, size in sizes.items()}
    found = dict(zip(sizes, compounding(network, large, vectors, **options).tolist(), strict=True))
    # a bias is small beside large weights, and goes as far as they do
    return [1.0 if x or (name in vectors and any(found.values())) else PLAIN for name, x in found.items()]
