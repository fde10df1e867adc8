"""The directions of all weights of a network: polar factors of equal shapes at once, and not all of them at every step.

A direction made of past gradients may be used for several steps: it keeps its unit norm, and the fresh gradient, which it has
not seen, still measures the descent along it. So a polar factor, which costs about 18·min(o, i) multiplications for each entry of
a matrix [o, i], need not be taken anew at every step. With a *period* r a weight's direction is renewed at each of its first r
steps and then every r-th, different weights at different steps, so that steps cost alike.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modula_agd.norm import Direction, Norm
from modula_agd.polar import polar_of_each

SIDE = 64
"""Short side of a matrix for each step of its period on a CPU; below twice this, each step has a direction of its own."""
LONGEST = 8
"""The longest period that "auto" chooses: less than half of the 20 steps over which momentum 0.95 averages."""


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


def directions(norms: Mapping[str, Norm], sources: Mapping[str, Tensor], *, half: bool = False) -> dict[str, Direction]:
    """The unit dual direction of each weight.

    Args:
        norms: by name.
        sources: gradient or lead by name, for some of the names.
        half: whether polar factors are iterated in bfloat16.
    """
    wanted = {name: norms[name].matrices(source) for name, source in sources.items()}
    factors = iter(polar_of_each([matrix for matrices in wanted.values() for matrix in matrices], half=half))
    return {
        name: norms[name].assembled(source, [next(factors) for _ in wanted[name]]) for name, source in sources.items()
    }
