"""The directions of all weights of a network: polar factors of equal shapes at once, and not all of them at every step.

A direction made of past gradients may be used for several steps: it keeps its unit norm, and the fresh gradient, which it has
not seen, still measures the descent along it. So a polar factor, which costs about 18·min(o, i) multiplications for each entry of
a matrix [o, i], need not be taken anew at every step. With a *period* r a weight's direction is renewed at each of its first r
steps and then every r-th, different weights at different steps, so that steps cost alike.

What a step asks of all directions (products with gradients, numbers that they are multiplied with) is asked of many at once, too.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from modula_agd.kernel_norm import KernelNorm
from modula_agd.many import cast, scale_, scaled
from modula_agd.norm import (
    RMS,
    Direction,
    Frobenius,
    Norm,
    RowBlocks,
    RowNorm,
    Scalar,
    Sign,
    Spectral,
    Transposed,
    wide,
)
from modula_agd.polar import polar_of_each, working_dtype

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


def stays_finite(norm: Norm) -> bool:
    """Whether a finite gradient, however short or long, surely has a finite direction: with the norms here. Of others nobody knows."""
    while isinstance(norm, RowBlocks | Transposed | KernelNorm):
        norm = norm.inner
    return type(norm) in (Spectral, Frobenius, RowNorm, RMS, Sign)


def together(numbers: Sequence[Scalar]) -> Float[Tensor, " numbers"]:
    """0-d tensors as one in double precision: whatever follows is one operation, and not one for each."""
    alike = len({x.dtype for x in numbers}) == 1
    return wide(torch.stack(list(numbers) if alike else [wide(x) for x in numbers]))


def dots(xs: Mapping[str, Tensor], other: Callable[[str], Tensor]) -> dict[str, Scalar]:
    """⟨x, y⟩ of each x and the other of its name, in double precision; computed in the precision that x is, one after the other."""
    found = []
    for name, x in xs.items():
        dtype = working_dtype(x.dtype)
        found.append(torch.dot(x.to(dtype).flatten(), other(name).to(dtype).flatten()))
    return dict(zip(xs, together(found).unbind(), strict=True)) if found else {}


def pairs(found: Mapping[str, Direction], gradients: Mapping[str, Tensor]) -> dict[str, Scalar]:
    """⟨gradient, u⟩ of each direction that there is a gradient for."""
    whole = {name: u for name, u in found.items() if name in gradients and not u.by_rows}
    rows = {name: u for name, u in found.items() if name in gradients and u.by_rows}
    products = dots({name: gradients[name] for name in whole}, lambda name: whole[name].base)
    return times(whole, products) | {name: u.pair(gradients[name]) for name, u in rows.items()}


def times(found: Mapping[str, Direction], numbers: Mapping[str, Scalar]) -> dict[str, Tensor]:
    """The factor of each direction times a number in double precision."""
    asked = {name: u.factor for name, u in found.items() if isinstance(u.factor, Tensor)}
    # rows, and a number that a norm of someone's own left on the host
    apart = {n for n, factor in asked.items() if factor.ndim > 0 or factor.device != numbers[n].device}
    products = {name: asked.pop(name) * numbers[name] for name in apart}
    told = {name: u.factor for name, u in found.items() if not isinstance(u.factor, Tensor)}
    if all(factor == 1.0 for factor in told.values()):
        products |= {name: numbers[name] for name in told}
    else:
        products |= zip(told, scaled([numbers[name] for name in told], list(told.values())), strict=True)
    if asked:
        many = together(list(asked.values())) * torch.stack([numbers[name] for name in asked])
        products |= zip(asked, many.unbind(), strict=True)
    return products


def dense(found: Mapping[str, Direction], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """u of each direction, in its dtype: rounded to that before a Python number multiplies it."""
    told = {n: u.factor for n, u in found.items() if not isinstance(u.factor, Tensor) and u.base.dtype != dtypes[n]}
    rounded = cast({name: found[name].base for name in told}, dtypes)
    scale_(list(rounded.values()), list(told.values()))
    return {name: rounded[name] if name in told else u.dense().to(dtypes[name]) for name, u in found.items()}
