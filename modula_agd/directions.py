"""The directions of all weights of a network: polar factors of equal shapes at once, and not all of them at every step.

A direction made of past gradients may be used for several steps: it keeps its unit norm, and the fresh gradient, which it has
not seen, still measures the descent along it. So a polar factor, which costs about 18·min(o, i) multiplications for each entry of
a matrix [o, i], need not be taken anew at every step. With a *period* r a weight's direction is renewed at each of its first r
steps and then every r-th, different weights at different steps, so that steps cost alike.

Nor need it be taken from nothing. Where it serves ``WARM_PERIOD`` steps or more, it mostly starts *warm*: each matrix of it is the polar
factor of that of the lead, l, with a part of that of the direction before, u,

    l/‖l‖ + WARM_SHARE·u/‖u‖        (Euclidean norms)

in which u stands for what past gradients say little of: singular values of l far below WARM_SHARE of their root-mean-square, which are
mostly noise, and which the first polynomials are for. Four of six are enough then, about 12·min(o, i) multiplications. u is of the past
as well, and the norm stays at most 1. What l has come to say nothing of at all would be kept at full length for ever, were not every
``RESTART``-th direction made of l alone: so it stops, if later than it would without.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from modula_agd.device import precise
from modula_agd.norm import Direction, Norm
from modula_agd.polar import polar_of_each

SIDE = 64
"""Short side of a matrix for each step of its period on a CPU; below twice this, each step has a direction of its own."""
LONGEST = 8
"""The longest period that "auto" chooses: less than half of the 20 steps over which momentum 0.95 averages."""
WARM_PERIOD = 4
"""From which on directions start warm. Chosen by losses in training (docs/trials.md), as is the next."""
WARM_SHARE = 0.1
"""What the direction before counts for."""
RESTART = 4
"""Of so many directions of a weight one does not start warm."""


def period(norm: Norm, shape: tuple[int, ...], refresh: int | None) -> int:
    """r, the steps that one direction of a weight serves: 1 where it needs no polar factor.

    Args:
        norm: of the weight.
        shape: of the weight.
        refresh: r wanted; None leaves it to the short side of the matrices, so that the cost per entry stays bounded.
    """
    matrices = norm.matrices(torch.empty(shape, device="meta"))
    side = max((min(matrix.shape[-2:]) for matrix in matrices), default=0)
    if side == 0:
        return 1
    return refresh if refresh is not None else max(1, min(LONGEST, side // SIDE))


def due(clock: int, index: int, period: int) -> bool:
    """Whether the direction of the ``index``-th weight is renewed at the step after ``clock`` steps."""
    return clock < period or (clock + index) % period == 0


def starts_warm(clock: int, index: int, period: int) -> bool:
    """Whether the direction of the ``index``-th weight that is made at the step after ``clock`` steps has a part of the one before."""
    return period >= WARM_PERIOD and (clock + index) // period % RESTART != 0


def warmed(
    matrix: Float[Tensor, "*stack rows cols"], before: Float[Tensor, "*stack rows cols"]
) -> Float[Tensor, "*stack rows cols"]:
    """What the next polar factor is taken of.

    Args:
        matrix: of the lead, of any scale.
        before: of the direction that is renewed, alike.

    Returns:
        Each matrix at Euclidean length 1 with a part of the one before, as above; itself where a length is no normal number of its dtype,
        so that what is 0 stays 0 (four polynomials have to do for it, too).
    """
    old = before.to(matrix.dtype)
    lengths = [torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=precise(x.device)) for x in (matrix, old)]
    both = [(length > torch.finfo(matrix.dtype).tiny) & length.isfinite() for length in lengths]
    usable = both[0] & both[1]
    share = torch.where(usable, 1 / lengths[0], 1.0).to(matrix.dtype)
    part = torch.where(usable, WARM_SHARE / lengths[1], 0.0).to(matrix.dtype)
    return torch.addcmul(matrix * share, old, part)


def directions(
    norms: Mapping[str, Norm],
    sources: Mapping[str, Tensor],
    before: Mapping[str, Tensor] | None = None,
    *,
    half: bool = False,
) -> dict[str, Direction]:
    """The unit dual direction of each weight.

    Args:
        norms: by name.
        sources: gradient or lead by name, for some of the names.
        before: the directions, by name, that some of these shall start warm from.
        half: whether polar factors are iterated in bfloat16.
    """
    wanted = {name: norms[name].matrices(source) for name, source in sources.items()}
    matrices, warm = [], []
    for name, found in wanted.items():
        old = norms[name].matrices(before[name]) if before and name in before else None
        matrices += found if old is None else [warmed(*pair) for pair in zip(found, old, strict=True)]
        warm += [old is not None] * len(found)
    factors = iter(polar_of_each(matrices, warm, half=half))
    return {
        name: norms[name].assembled(source, [next(factors) for _ in wanted[name]]) for name, source in sources.items()
    }
