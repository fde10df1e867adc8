"""The polar factor never exceeds norm 1, and the bound of a singular value is never below it."""

import numpy
import pytest
import torch
from torch import Tensor

from modula_agd.polar import SCHEDULE, SMALLEST, largest_singular_value_bound, polar, working_dtype
from modula_agd.rescale import rescale
from support import DTYPES, gaussian, tolerance, with_singular_values


def polar_by_svd(matrix: torch.Tensor) -> torch.Tensor:
    """The reference for ``polar``: U Vᵀ over the singular values above rounding (a partial isometry at lower rank)."""
    x, _ = rescale(matrix.to(working_dtype(matrix.dtype)), (-2, -1))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    rounding = max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    kept = (s > rounding * s[..., :1]).to(x.dtype)
    return ((u * kept[..., None, :]) @ vh).to(matrix.dtype)


ONES = torch.ones(5, dtype=torch.float64)
MATRICES = {
    "1×n": gaussian(1, 7),
    "n×1": gaussian(7, 1),
    "1×1": gaussian(1, 1),
    "square": gaussian(12, 12),
    "wide": gaussian(3, 40),
    "tall": gaussian(40, 3),
    "rank 1": with_singular_values(ONES[:1], 9, 6),
    "rank 2": with_singular_values(torch.tensor([1.0, 0.3]), 8, 8),
    "repeated singular values": with_singular_values(ONES, 5, 9),
    "two repeated": with_singular_values(torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0]), 6, 5),
    "ill-conditioned": with_singular_values(torch.logspace(-12, 0, 10), 10, 10),
    "just above the smallest": with_singular_values(torch.tensor([1.0, 1.001e-3]), 4, 4),
    "one large, many small": with_singular_values(torch.cat([ONES[:1], torch.full((63,), 0.0125)]), 64, 128),
    "zero": torch.zeros(4, 3, dtype=torch.float64),
    "one nonzero entry": torch.eye(6, 4, dtype=torch.float64)[:, :1] @ torch.ones(1, 4, dtype=torch.float64),
    "diagonal": torch.diag(torch.tensor([1.0, 0.5, 0.25, 1e-3], dtype=torch.float64)),
}
SCALES = (1.0, 1e-30, 1e30)


def overshoot(dtype: torch.dtype, rank: int) -> float:
    """What the docstring of ``polar`` allows above 1; rounding to half precision moves σ by half an ulp of ‖X‖_F."""
    if dtype == torch.float64:
        return 1e-9
    return 1e-5 + (torch.finfo(dtype).eps / 2 * rank**0.5 if dtype != torch.float32 else 0.0)


def remez(low: float, high: float) -> tuple[numpy.ndarray, float]:
    """The odd quintic nearest to 1 on [low, high] in the maximum norm, and its error."""
    nodes = numpy.array([low, low + (high - low) / 4, low + 3 * (high - low) / 4, high])
    for _ in range(100):
        system = numpy.stack([nodes, nodes**3, nodes**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = numpy.linalg.solve(system, numpy.ones(4))
        # the polynomial's own extrema: a + 3b·x² + 5c·x⁴ = 0
        inner = numpy.sort(numpy.sqrt(numpy.roots([5 * c, 3 * b, a]).real))
        moved = numpy.array([low, *inner, high])
        if numpy.abs(moved - nodes).max() < 1e-15:
            break
        nodes = moved
    return numpy.array([a, b, c]), abs(error)


def composed(x: Tensor) -> Tensor:
    for a, b, c in SCHEDULE:
        x = a * x + b * x**3 + c * x**5
    return x


def test_the_schedule_is_the_minimax_one_to_the_printed_digits() -> None:
    low, high, rows = SMALLEST, 1.0, []
    for _ in SCHEDULE:
        coefficients, error = remez(low, high)
        rows.append(coefficients * (1 - 1e-4))
        low, high = 1 - error, 1 + error
    rows[-1] = rows[-1] / high
    assert numpy.abs(numpy.array(rows) - numpy.array(SCHEDULE)).max() < 0.51e-10


def test_the_remez_exchange_finds_a_known_minimax_polynomial() -> None:
    # on a short interval the error must equioscillate: four extrema of equal size and alternating sign
    (a, b, c), error = remez(0.5, 1.0)
    x = numpy.linspace(0.5, 1.0, 100_001)
    deviation = a * x + b * x**3 + c * x**5 - 1
    signs = numpy.sign(deviation[numpy.abs(deviation) > 0.999999 * error])
    assert numpy.abs(deviation).max() == pytest.approx(error, rel=1e-9)
    assert (numpy.diff(signs) != 0).sum() == 3


def test_the_composed_polynomial_stays_within_0_and_1() -> None:
    x = torch.cat([torch.linspace(0, 1, 1_000_001, dtype=torch.float64), torch.logspace(-9, 0, 200_001).double()])
    y = composed(x.clamp(max=1.0))
    assert y.max() <= 1
    assert y.min() >= 0


def test_the_composed_polynomial_is_near_1_above_the_smallest() -> None:
    x = torch.logspace(-3, 0, 1_000_001, dtype=torch.float64)
    assert composed(x).min() >= 0.997
    assert composed(torch.tensor(SMALLEST / 2, dtype=torch.float64)) < 0.997


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MATRICES)
def test_polar_never_exceeds_norm_1(name: str, dtype: torch.dtype, scale: float) -> None:
    matrix = (MATRICES[name] * scale).to(dtype)
    factor = polar(matrix)
    assert factor.dtype == dtype
    assert factor.shape == matrix.shape
    largest = torch.linalg.matrix_norm(factor.double(), ord=2)
    assert largest <= 1 + overshoot(dtype, min(matrix.shape))
    assert largest >= 0.997 - overshoot(dtype, min(matrix.shape)) or name == "zero"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", MATRICES)
def test_polar_has_the_singular_vectors_of_the_svd_and_values_near_1(name: str, scale: float) -> None:
    matrix = MATRICES[name] * scale
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > SMALLEST * s[0]
    if name == "zero":
        assert not polar(matrix).any()
        return
    inner = u[:, kept].mT @ polar(matrix) @ vh[kept].mT
    assert torch.allclose(inner, inner.diagonal().diag(), rtol=0, atol=1e-9)
    assert (inner.diagonal() >= 0.997).all()
    reference = polar_by_svd(matrix)
    above = u[:, kept] @ vh[kept]
    assert torch.linalg.matrix_norm(u[:, kept].mT @ (reference - above) @ vh[kept].mT) < 1e-9


def test_a_singular_value_below_the_smallest_falls_short_and_does_not_overshoot() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1e-5], dtype=torch.float64))
    small = polar(matrix)[1, 1]
    assert 0.01 < small < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, -2.0, -5.0])
def test_the_gram_side_and_the_direct_iteration_agree(
    spread: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = with_singular_values(torch.logspace(spread, 0, 12), 12, 50).to(dtype)
    small = polar(matrix)
    monkeypatch.setattr("modula_agd.polar.GRAM_SIDE", torch.inf)
    direct = polar(matrix)
    assert not torch.equal(small, direct)
    # singular values far below the smallest are rounding in float32 either way
    assert torch.linalg.matrix_norm(small - direct, ord=2) < (1e-3 if dtype == torch.float32 else 1e-9)
    assert torch.linalg.matrix_norm(small, ord=2) <= 1 + overshoot(dtype, 12)


def test_singular_values_are_near_1_above_the_stated_share_of_the_schatten_norm() -> None:
    values = torch.cat([torch.ones(20), torch.tensor([1.1e-3 * 20**0.25])]).double()
    assert torch.linalg.svdvals(polar(with_singular_values(values, 21, 21))).amin() > 0.997


def test_polar_by_svd_is_a_partial_isometry_at_lower_rank() -> None:
    values = torch.linalg.svdvals(polar_by_svd(MATRICES["rank 2"]))
    assert torch.allclose(values[:2], ONES[:2])
    assert values[2:].max() < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_each_matrix_by_itself(dtype: torch.dtype) -> None:
    stack = gaussian(2, 3, 5, 4, dtype=dtype) * torch.logspace(-3, 3, 6).reshape(2, 3, 1, 1).to(dtype)
    stack[0, 1] = 0
    for function in (polar, polar_by_svd):
        together = function(stack)
        for i in range(2):
            for j in range(3):
                apart = function(stack[i, j])
                assert torch.allclose(together[i, j], apart, rtol=0, atol=tolerance(dtype, 20))


def test_half_precision_is_the_float32_result_rounded_once() -> None:
    matrix = gaussian(9, 6, dtype=torch.bfloat16)
    assert torch.equal(polar(matrix), polar(matrix.float()).bfloat16())


SPECTRA = {
    "flat": torch.ones,
    "tenfold": lambda n: torch.logspace(-1, 0, n),
    "steep": lambda n: torch.logspace(-5, 0, n),
}


@pytest.mark.parametrize("scale", [1.0, 1e-20])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("rows", "cols"), [(1, 9), (16, 16), (64, 64), (40, 160), (160, 40)])
def test_iterated_in_bfloat16_no_singular_value_exceeds_1(rows: int, cols: int, spectrum: str, scale: float) -> None:
    values = SPECTRA[spectrum](min(rows, cols)).double()
    matrix = (with_singular_values(values, rows, cols, seed=rows) * scale).float()
    found = torch.linalg.svdvals(polar(matrix, half=True))
    assert found[0] <= 1
    assert found[int((values > 1e-2).sum()) - 1] > 0.75
    assert polar(matrix, half=True).dtype == torch.float32


def test_a_zero_or_bad_matrix_in_bfloat16() -> None:
    assert not polar(torch.zeros(3, 4), half=True).any()
    assert polar(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), half=True).isnan().any()


def test_a_denormal_matrix_counts_as_zero_and_nan_passes_through() -> None:
    assert not polar(torch.full((3, 3), 1e-41)).any()
    assert polar(torch.tensor([[1.0, torch.nan], [0.0, 1.0]])).isnan().any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MATRICES)
def test_the_largest_singular_value_is_bounded_within_the_stated_factor(
    name: str, dtype: torch.dtype, scale: float
) -> None:
    matrix = (MATRICES[name] * scale).to(dtype)
    exact = torch.linalg.matrix_norm(matrix.double(), ord=2)
    rounding = 8 * max(matrix.shape) * torch.finfo(working_dtype(dtype)).eps
    for iterations in (1, 2, 6, 9):
        bound = largest_singular_value_bound(matrix, iterations).double()
        assert bound >= exact
        assert bound <= exact * min(matrix.shape) ** (0.5 ** (iterations + 1)) * (1 + rounding)


def test_the_bound_is_the_schatten_norm_of_the_stated_order() -> None:
    matrix = gaussian(6, 8)
    values = torch.linalg.svdvals(matrix)
    for iterations in (1, 3):
        order = 2 ** (iterations + 1)
        schatten = (values**order).sum() ** (1 / order)
        assert largest_singular_value_bound(matrix, iterations).item() == pytest.approx(schatten.item(), rel=1e-12)


def test_bounds_of_a_batch_are_those_of_each_matrix() -> None:
    stack = gaussian(4, 5, 3)
    apart = torch.stack([largest_singular_value_bound(matrix) for matrix in stack])
    assert torch.allclose(largest_singular_value_bound(stack), apart, rtol=tolerance(torch.float64, 15), atol=0)


def test_autocast_around_a_step_changes_nothing() -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = polar(matrix), largest_singular_value_bound(matrix)
    assert torch.equal(inside[0], polar(matrix))
    assert torch.equal(inside[1], largest_singular_value_bound(matrix))
