"""The directions of all weights of a network: polar factors of equal shapes at once, and not all of them at every step.

A direction made of past gradients may be used for several steps: it keeps its unit norm, and the fresh gradient, which it has
not seen, still measures the descent along it. So a polar factor, which costs about 18·min(o, i) multiplications for each entry of
a matrix [o, i], need not be taken anew at every step. With a *period* r a weight's direction is renewed at each of its first r
steps and then every r-th, different weights at different steps, so that steps cost alike.

Nor need it be taken from nothing. Where matrices are large, a direction that is renewed is the polar factor of the lead l with a part of
the direction u before,

    l/‖l‖ + WARMTH·u/‖u‖        (Euclidean norms of the weight)

in which u stands for what past gradients say little of: singular values of l far below WARMTH of their root-mean-square, which are mostly
noise, and which the first polynomials are for. Four of six are enough then. u is of the past as well, and the norm stays at most 1.
"""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from modula_agd.norm import Direction, Norm
from modula_agd.polar import polar_of_each
from modula_agd.state import Scalar

SIDE = 64
"""Short side of a matrix for each step of its period on a CPU; below twice this, each step has a direction of its own."""
LONGEST = 8
"""The longest period that "auto" chooses: less than half of the 20 steps over which momentum 0.95 averages."""
WARM = 4
"""Period from which a direction that is renewed starts warm."""
WARMTH = 0.1
"""What the direction before counts for in the one that is made; both chosen by losses in training (docs/trials.md)."""


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


def warmed(
    source: Float[Tensor, "*shape"], square: Scalar, before: Float[Tensor, "*shape"], square_before: Scalar
) -> Float[Tensor, "*shape"]:
    """A lead with a part of the direction before, for a warm start.

    Args:
        source: the lead, of any scale, or what this process holds of it.
        square: the sum of squares of the whole.
        before: the direction that is renewed, alike.
        square_before: its sum of squares.

    Returns:
        Their sum as above, of the lead's dtype; the lead as it is where either is zero, or its square is no normal number.
    """
    least = torch.finfo(source.dtype).tiny ** 2
    both = (square > least) & square.isfinite() & (square_before > least)
    share = torch.where(both, square.rsqrt(), 1.0)
    old = torch.where(both, WARMTH * square_before.rsqrt(), 0.0)
    return source * share.to(source.dtype) + before * old.to(source.dtype)


def directions(
    norms: Mapping[str, Norm], sources: Mapping[str, Tensor], *, half: bool = False, warm: Collection[str] = ()
) -> dict[str, Direction]:
    """The unit dual direction of each weight.

    Args:
        norms: by name.
        sources: gradient or lead by name, for some of the names.
        half: whether polar factors are iterated in bfloat16.
        warm: the names of sources that are ``warmed``.
    """
    wanted = {name: norms[name].matrices(source) for name, source in sources.items()}
    held = [name in warm for name, matrices in wanted.items() for _ in matrices]
    factors = iter(polar_of_each([matrix for matrices in wanted.values() for matrix in matrices], half=half, warm=held))
    return {
        name: norms[name].assembled(source, [next(factors) for _ in wanted[name]]) for name, source in sources.items()
    }
