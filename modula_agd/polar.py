"""The polar factor of a matrix, and certified bounds of its largest singular value.

For G = U diag(s) Vᵀ the polar factor is U Vᵀ: the unit-norm direction along which a linear functional ⟨G, ·⟩ rises
fastest in the spectral norm. Two things live here:

* ``polar``: an iteration of odd polynomials, X ← aX + bX(XᵀX) + cX(XᵀX)², using matrix products alone. Each polynomial is
  the best approximation of 1 on the interval that the previous one reaches (Amsel, Persson, Musco, Gower 2025, *The
  Polar Express*, arXiv:2505.16932). The last is divided by its largest value, so that no singular value ends above 1.
  A singular value below ``SMALLEST`` of the matrix's Schatten 4-norm falls short of 1; it never overshoots. For wide (or
  tall) matrices the polynomials are composed on the small Gram matrix, three at a time.
* ``largest_singular_value_bound``: Gram iteration (Delattre, Barthélemy, Araujo, Allauzen 2023, arXiv:2305.16173), an
  upper bound at every step. Power iteration would be a lower bound, which certifies nothing.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from modula_agd.device import exact, precise
from modula_agd.error import InvalidArgument
from modula_agd.rescale import rescale, unit

SMALLEST = 1e-3
"""Singular values above this share of the Schatten 4-norm, (Σ sⱼ⁴)^(1/4), end between 0.997 and 1."""

# Minimax odd quintics on [SMALLEST, 1], each shrunk by 1e-4 so that rounding cannot leave the next one's interval, the
# last also divided by its largest value. tests/test_polar.py derives the table again by Remez exchange.
SCHEDULE = (
    (8.4694817710, -25.1055638992, 18.6274126716),
    (4.1824158999, -3.1083902398, 0.5805486207),
    (3.9614610932, -2.9537683400, 0.5629198203),
    (3.2862575584, -2.4644736625, 0.5073069581),
    (2.2735226194, -1.6444959019, 0.4161493084),
    (1.8867981277, -1.2638724057, 0.3761365550),
)


GRAM_SIDE = 1.5
"""From this ratio of long to short side on, fewer operations are needed on the Gram matrix than on the matrix itself."""

GROUPS = (SCHEDULE[:3], SCHEDULE[3:])
"""Polynomials that may be composed on one Gram matrix: rounding, which they magnify for small singular values, is left behind
when the next group starts from a fresh one."""

HALF_MARGIN = 1.02
"""Room for the rounding of bfloat16: without it a singular value can leave the next polynomial's interval, and the iteration
explodes. Over spectra from flat to 1e-5 and sides from 16 to 256 the largest singular value came to 1.0092 before the last division."""

ROUGH_SCHEDULE = (SCHEDULE[0], *((a / HALF_MARGIN, b / HALF_MARGIN**3, c / HALF_MARGIN**5) for a, b, c in SCHEDULE[1:]))
"""The polynomials of what is divided by ``HALF_MARGIN`` before each; before the first, the ceiling is."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms and directions are computed: float32 for half precision, else the tensor's own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def polar(matrix: Float[Tensor, "*batch rows cols"], *, half: bool = False) -> Float[Tensor, "*batch rows cols"]:
    """The orthogonal factor U Vᵀ of each matrix, approximately, with no singular value above 1.

    Args:
        matrix: any rank, shape and scale; half precision is iterated in float32.
        half: iterate in bfloat16, many times faster on an accelerator. Singular values above a hundredth of the Schatten
            4-norm then end above 0.75 (measured, as is that none exceeds 1: ``HALF_MARGIN``).

    Returns:
        A matrix of the same shape and dtype: zero where the input is zero (or denormal); singular values within
        [0.997, 1] for those of the input above ``SMALLEST`` of its Schatten 4-norm, which is at most rank^(1/4) times the
        largest of them; less for smaller ones, and for all where products may be rounded to TF32, as with ``half``. Above 1 by at most
        rounding: 1e-5 in float32, 1e-9 in float64, and one rounding to the nearest for half precision.
    """
    with exact(matrix.device):
        return _polar(matrix, half)


def _polar(matrix: Float[Tensor, "*batch rows cols"], half: bool) -> Float[Tensor, "*batch rows cols"]:
    wide, working = _wide(matrix), working_dtype(matrix.dtype)
    # a matrix, or one stack of them
    x = unit(wide.to(working).flatten(0, max(0, wide.ndim - 3)), (-2, -1))
    # products in TF32 or of bfloat16 parts round like half precision, whatever their operands
    rough = half or (working == torch.float32 and matrix.is_cuda and _rounds_to_tf32())
    if half:
        x = x.to(torch.bfloat16)
    gram = x @ x.mT
    # ‖XXᵀ‖_F^(1/2) is the Schatten 4-norm: at least the largest singular value, and tighter than ‖X‖_F
    ceiling = torch.linalg.matrix_norm(gram, keepdim=True, dtype=working).sqrt()
    ceiling = ceiling * (HALF_MARGIN if rough else 1 + 16 * torch.finfo(working).eps)
    # the largest entry is 1, and with it this is above 1, but of a matrix of zeros
    ceiling = ceiling.clamp(min=1.0)
    x, gram = (x / ceiling).to(x.dtype), (gram / ceiling.square()).to(x.dtype)
    if not rough and x.shape[-1] >= GRAM_SIDE * x.shape[-2]:
        for index, group in enumerate(GROUPS):
            x = _factor(gram if index == 0 else x @ x.mT, group) @ x
    else:
        for index, (a, b, c) in enumerate(ROUGH_SCHEDULE if rough else SCHEDULE):
            gram = gram if index == 0 else x @ x.mT
            # aX + bGX + cG²X
            x = _addmm(x, _addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a, alpha=1)
    orthogonal = (x.to(working) / HALF_MARGIN if rough else x).to(matrix.dtype).reshape(wide.shape)
    return orthogonal if wide is matrix else orthogonal.mT


@torch.compiler.assume_constant_result
def _rounds_to_tf32() -> bool:
    """Whether torch was told that products of float32 matrices on CUDA may be; in compiled code as it was at the compilation."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def _addmm(base: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> Tensor:
    """beta·base + alpha·left·right of matrices or stacks of them, in one pass over the result."""
    addmm = torch.addmm if base.ndim == 2 else torch.baddbmm
    return addmm(base, left, right, beta=beta, alpha=alpha)


def polar_of_each(
    matrices: Sequence[Float[Tensor, "*batch rows cols"]], *, half: bool = False
) -> list[Float[Tensor, "*batch rows cols"]]:
    """``polar`` of many matrices (or stacks of them), those of one shape, up to transposition, in one iteration.

    Args:
        matrices: of any shapes and dtypes.
        half: as for ``polar``.

    Returns:
        Their polar factors, in order.
    """
    groups: dict[tuple[int, int, torch.dtype], list[int]] = {}
    for index, matrix in enumerate(matrices):
        short, long = sorted(matrix.shape[-2:])
        groups.setdefault((short, long, matrix.dtype), []).append(index)
    found: dict[int, Tensor] = {}
    for alike in groups.values():
        if len(alike) == 1:
            found[alike[0]] = polar(matrices[alike[0]], half=half)
            continue
        stacks = [_wide(matrices[index]).reshape(-1, *sorted(matrices[index].shape[-2:])) for index in alike]
        factors = polar(torch.cat(stacks), half=half).split([len(x) for x in stacks])
        for index, factor in zip(alike, factors, strict=True):
            shape = matrices[index].shape
            back = factor if shape[-2] <= shape[-1] else factor.mT
            found[index] = back.reshape(shape)
    return [found[index] for index in range(len(matrices))]


def _wide(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch short long"]:
    """The matrix or its transpose, whichever has no more rows than columns."""
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT


def _factor(
    gram: Float[Tensor, "*batch rows rows"], polynomials: tuple[tuple[float, float, float], ...]
) -> Float[Tensor, "*batch rows rows"]:
    """The matrix Q that some polynomials together multiply X with, from XXᵀ alone: each is X ← P·X with P = aI + bG + cG²."""
    product = gram
    for index, (a, b, c) in enumerate(polynomials):
        step = _addmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        product = step if index == 0 else step @ product
        if index + 1 < len(polynomials):
            # P and G commute, and the next Gram matrix is P·G·P
            gram = step @ gram @ step
    return product


def largest_singular_value_bound(
    matrix: Float[Tensor, "*batch rows cols"], iterations: int = 6
) -> Float[Tensor, "*batch"]:
    """An upper bound of each matrix's largest singular value, by Gram iteration.

    Squaring A ← AᵀA/‖·‖ k times bounds σ_max by the 2^(k+1)-Schatten norm: at most rank^(1/2^(k+1)) too large.

    Args:
        matrix: any shape and scale.
        iterations: number of squarings, ≥ 1; the excess is at most a factor rank^(1/2^(iterations + 1)).

    Returns:
        Upper bounds in the matrix's units, rounded up by the worst case of the products' rounding errors.
    """
    if iterations < 1:
        raise InvalidArgument(f"a bound by {iterations} Gram iterations was asked for; it takes at least 1")
    with exact(matrix.device):
        return _bounded(matrix, iterations)


def _bounded(matrix: Float[Tensor, "*batch rows cols"], iterations: int) -> Float[Tensor, "*batch"]:
    x, peak = rescale(matrix.to(working_dtype(matrix.dtype)), (-2, -1))
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    # log σ_max is gathered in double precision; each squaring halves the weight of what has been divided out
    scale = precise(matrix.device)
    exponent, log_bound = 0.5, torch.zeros(matrix.shape[:-2], dtype=scale, device=matrix.device)
    for step in range(iterations):
        size = torch.linalg.matrix_norm(gram, keepdim=True)
        size = size.masked_fill(size == 0, 1.0)
        log_bound = log_bound + exponent * size[..., 0, 0].to(scale).log()
        if step + 1 < iterations:
            gram = gram / size
            gram, exponent = gram @ gram, exponent / 2
    rounding = 4 * max(matrix.shape[-2:]) * torch.finfo(x.dtype).eps
    return log_bound.exp().mul(1 + rounding).to(x.dtype) * peak[..., 0, 0]
