"""Each norm against its definition: draws, directions, dual norms, certified bounds."""

import math

import pytest
import torch
from torch import Tensor

from modula_agd import RMS, Frobenius, Norm, PerTap, RowBlocks, RowNorm, Sign, Spectral, Unfolded
from modula_agd.directions import stays_finite
from modula_agd.norm import Direction, Transposed
from support import DTYPES, gaussian, seeded, tolerance, with_singular_values
from wrong_layers import Overshooting

CPU = torch.device("cpu")
CASES: dict[str, tuple[Norm, tuple[int, ...]]] = {
    "Spectral wide": (Spectral(), (5, 8)),
    "Spectral tall": (Spectral(), (8, 5)),
    "Spectral 1×n": (Spectral(), (1, 6)),
    "Spectral n×1": (Spectral(), (6, 1)),
    "Spectral 1×1": (Spectral(), (1, 1)),
    "Spectral stack": (Spectral(), (3, 2, 4, 5)),
    "Spectral transposed": (Transposed(Spectral()), (5, 8)),
    "RowNorm transposed": (Transposed(RowNorm(2.0)), (5, 8)),
    "RowBlocks transposed": (Transposed(RowBlocks(Spectral(), 3)), (5, 6)),
    "Frobenius": (Frobenius(), (5, 8)),
    "Frobenius 1×1": (Frobenius(), (1, 1)),
    "Frobenius stack": (Frobenius(), (3, 2, 4, 5)),
    "Frobenius stack of one group": (Frobenius(), (3, 1, 4, 5)),
    "RowNorm into logits": (RowNorm.into_logits(8), (5, 8)),
    "RowNorm into one logit": (RowNorm.into_logits(8), (1, 8)),
    "RowNorm of an embedding": (RowNorm.of_embedding(4), (7, 4)),
    "RMS": (RMS(), (6,)),
    "RMS of one": (RMS(), (1,)),
    "Sign": (Sign(), (6,)),
    "PerTap": (PerTap(Spectral(), gain=3.0), (6, 4, 3, 3)),
    "PerTap grouped": (PerTap(Spectral(), gain=3.0, groups=2), (6, 2, 3, 3)),
    "PerTap depthwise": (PerTap(Spectral(), gain=2.0, groups=4), (4, 1, 2, 2)),
    "PerTap Frobenius": (PerTap(Frobenius(), gain=9.0), (6, 4, 3, 3)),
    "PerTap Frobenius grouped": (PerTap(Frobenius(), gain=3.0, groups=2), (6, 2, 1, 3)),
    "PerTap transposed": (PerTap(Spectral(), gain=2.0, groups=2, transposed=True), (4, 3, 2)),
    "Unfolded": (Unfolded(Spectral()), (6, 4, 3, 3)),
    "Unfolded grouped": (Unfolded(Spectral(), groups=2), (6, 2, 2)),
    "Unfolded depthwise": (Unfolded(Spectral(), groups=4), (4, 1, 2, 2, 1)),
    "Unfolded Frobenius": (Unfolded(Frobenius(), groups=2), (6, 2, 1, 3)),
    "Unfolded transposed": (
        Unfolded(Spectral(), groups=2, transposed=True, patches=((0, 2, 6, 8), (1, 7), (3, 5), (4,))),
        (4, 3, 3, 3),
    ),
    "Unfolded transposed Frobenius": (Unfolded(Frobenius(), transposed=True, patches=((0, 2), (1,))), (4, 3, 3)),
}
EXACT = {name: case for name, case in CASES.items() if "Spectral()" not in repr(case[0])}
POLAR = {name: case for name, case in CASES.items() if name not in EXACT}
BLOCKWISE = {name: case for name, case in EXACT.items() if case[0] != Sign()}


def each(cases: dict[str, tuple[Norm, tuple[int, ...]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("norm", "shape"), cases.values(), ids=cases)


def inner_product(x: Tensor, y: Tensor) -> float:
    return (x.double() * y.double()).sum().item()


# -- draws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@each(CASES)
def test_a_draw_has_size_1(norm: Norm, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = norm.draw(shape, seeded(), CPU, dtype)
    assert weight.shape == shape
    assert weight.dtype == dtype
    assert weight.is_contiguous()
    assert norm.size(weight).item() == pytest.approx(1.0, rel=tolerance(dtype, weight.numel()))


@each(CASES)
def test_a_draw_is_the_same_in_every_dtype_and_differs_between_seeds(norm: Norm, shape: tuple[int, ...]) -> None:
    exact = norm.draw(shape, seeded(1), CPU, torch.float64)
    assert torch.equal(exact.float(), norm.draw(shape, seeded(1), CPU, torch.float32))
    if exact.numel() > 1:
        assert not torch.equal(exact, norm.draw(shape, seeded(2), CPU, torch.float64))


def test_a_spectral_draw_has_all_singular_values_equal() -> None:
    values = torch.linalg.svdvals(Spectral().draw((8, 5), seeded(), CPU, torch.float64))
    assert torch.allclose(values, torch.full_like(values, math.sqrt(8 / 5)))


def test_spectral_draws_of_one_entry_take_both_signs() -> None:
    generator = seeded()
    draws = [Spectral().draw((1, 1), generator, CPU, torch.float64).item() for _ in range(20)]
    assert {round(draw, 12) for draw in draws} == {-1.0, 1.0}


# -- directions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
@each(EXACT)
def test_an_exact_direction_has_norm_1(norm: Norm, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    direction = norm.direction(gaussian(*shape, dtype=dtype) * scale).dense()
    assert direction.shape == shape
    assert norm.size(direction.double()).item() == pytest.approx(1.0, rel=tolerance(dtype, direction.numel()))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
@each(POLAR)
def test_a_spectral_direction_has_norm_1_or_slightly_less(
    norm: Norm, shape: tuple[int, ...], dtype: torch.dtype, scale: float
) -> None:
    size = norm.size(norm.direction(gaussian(*shape, dtype=dtype) * scale).dense().double()).item()
    slack = tolerance(dtype, math.prod(shape))
    assert 0.997 - slack <= size <= 1 + slack


@each(CASES)
def test_no_direction_exceeds_norm_1_at_low_rank(norm: Norm, shape: tuple[int, ...]) -> None:
    gradient = torch.zeros(shape, dtype=torch.float64)
    gradient[(0,) * len(shape)] = -2.5
    assert norm.size(norm.direction(gradient).dense()).item() <= 1 + tolerance(torch.float64, gradient.numel())


@each(CASES)
def test_the_direction_of_zero_is_zero(norm: Norm, shape: tuple[int, ...]) -> None:
    zero = torch.zeros(shape)
    direction = norm.direction(zero)
    assert not direction.dense().any()
    assert direction.pair(zero) == 0
    assert norm.dual(zero) == 0
    assert norm.size(zero) == 0


@each(BLOCKWISE | POLAR)
def test_a_denormal_gradient_counts_as_zero(norm: Norm, shape: tuple[int, ...]) -> None:
    denormal = torch.full(shape, 1e-41)
    assert denormal.all(), "this machine flushes denormal numbers, so the trap cannot be set"
    assert not norm.direction(denormal).dense().any()


@pytest.mark.parametrize("norm", [RowNorm.into_logits(4), RowNorm.of_embedding(4)])
def test_zero_and_denormal_rows_stay_zero_and_tiny_rows_get_norm_1(norm: RowNorm) -> None:
    # the squares of 1e-30 underflow in float32; a row that decayed into denormals must not become m/0 (theory, section 6)
    gradient = torch.tensor([[1.0], [0.0], [1e-41], [-1e-30], [1e30]]) * torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    direction = norm.direction(gradient).dense()
    sizes = direction.norm(dim=1) * norm.scale
    assert torch.allclose(sizes, torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), rtol=0, atol=tolerance(torch.float32, 4))
    assert (direction[3] * gradient[3] >= 0).all()


@each(CASES)
def test_a_stack_or_tap_without_gradient_does_not_disturb_the_others(norm: Norm, shape: tuple[int, ...]) -> None:
    gradient = gaussian(*shape)
    gradient[..., 0] = 0
    direction = norm.direction(gradient).dense()
    assert direction.isfinite().all()
    assert not direction[..., 0].any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@each(CASES)
def test_a_finite_gradient_of_any_length_has_a_finite_direction(
    norm: Norm, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert stays_finite(norm)
    ends = torch.finfo(dtype)
    for length in (ends.smallest_normal / 4, ends.smallest_normal, ends.eps, 1.0, ends.max / 4):
        gradient = gaussian(*shape).clamp(-4, 4).mul(length).to(dtype)
        assert gradient.isfinite().all()
        assert norm.direction(gradient).dense().isfinite().all()


def test_of_the_norms_of_others_nobody_knows() -> None:
    assert not stays_finite(Overshooting())
    assert not stays_finite(RowBlocks(Transposed(Overshooting()), 2))
    assert not stays_finite(PerTap(Overshooting(), gain=2.0))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@each(CASES)
def test_a_nonfinite_gradient_shows_in_the_pairing(norm: Norm, shape: tuple[int, ...], poison: float) -> None:
    gradient = gaussian(*shape)
    gradient[(-1,) * len(shape)] = poison
    assert not norm.direction(gradient).pair(gradient).isfinite()


@each(BLOCKWISE | POLAR)
def test_nan_passes_through_the_direction(norm: Norm, shape: tuple[int, ...]) -> None:
    gradient = gaussian(*shape)
    gradient[(-1,) * len(shape)] = math.nan
    assert norm.direction(gradient).dense().isnan().any()


# -- pairings and dual norms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@each(CASES)
def test_the_pairing_is_the_inner_product_with_the_direction(
    norm: Norm, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    gradient, other = gaussian(*shape, dtype=dtype), gaussian(*shape, seed=5, dtype=dtype)
    direction = norm.direction(gradient)
    for g in (gradient, other):
        size = g.double().abs().mul(direction.dense().double().abs()).sum().item()
        assert direction.pair(g).item() == pytest.approx(
            inner_product(g, direction.dense()), abs=size * tolerance(dtype, g.numel())
        )
        assert direction.pair(g).dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@each(EXACT)
def test_the_pairing_of_an_exact_direction_is_the_dual_norm(
    norm: Norm, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    gradient = gaussian(*shape, dtype=dtype)
    expected = norm.dual(gradient).item()
    assert norm.direction(gradient).pair(gradient).item() == pytest.approx(
        expected, rel=tolerance(dtype, gradient.numel())
    )


@each(POLAR)
def test_the_pairing_of_a_spectral_direction_is_within_3_thousandths_of_the_dual_norm(
    norm: Norm, shape: tuple[int, ...]
) -> None:
    gradient = gaussian(*shape)
    dual, pair = norm.dual(gradient).item(), norm.direction(gradient).pair(gradient).item()
    assert 0.997 * dual <= pair <= dual * (1 + tolerance(torch.float64, gradient.numel()))


@each(CASES)
def test_no_weight_of_norm_1_pairs_with_a_gradient_beyond_the_dual_norm(norm: Norm, shape: tuple[int, ...]) -> None:
    gradient = gaussian(*shape)
    dual = norm.dual(gradient).item()
    for seed in range(1, 30):
        # half of the competitors lie near the maximiser, where a wrong dual norm would be exceeded first
        weight = gaussian(*shape, seed=seed) * (1.0 if seed % 2 else 0.05)
        weight = weight if seed % 2 else weight + norm.direction(gradient).dense()
        pair = inner_product(gradient, weight / norm.size(weight))
        assert pair <= dual * (1 + tolerance(torch.float64, weight.numel()))


def test_dual_norms_of_small_matrices_by_hand() -> None:
    g = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    ratio = math.sqrt(3 / 2)
    assert Spectral().dual(g).item() == pytest.approx(ratio * 7)
    assert Frobenius().dual(g).item() == pytest.approx(ratio * 5)
    assert RowNorm.into_logits(2).dual(g).item() == pytest.approx(7 / math.sqrt(2))
    assert RMS().dual(g[:, 0]).item() == pytest.approx(math.sqrt(3) * 3)
    assert Sign().dual(g.flatten()).item() == pytest.approx(7)
    assert Spectral().size(g).item() == pytest.approx(4 / ratio)
    assert Frobenius().size(g).item() == pytest.approx(5 / ratio)
    assert RowNorm.of_embedding(2).size(g).item() == pytest.approx(4 / math.sqrt(2))
    assert RMS().size(g[:, 0]).item() == pytest.approx(math.sqrt(3))
    assert Sign().size(-g.flatten()).item() == 4


@pytest.mark.parametrize("factor", [torch.tensor(2.0), torch.tensor([[2.0], [3.0], [0.5]])])
def test_a_direction_is_its_base_times_its_factor(factor: Tensor) -> None:
    base, gradient = gaussian(3, 4), gaussian(3, 4, seed=1)
    direction = Direction(base, factor.double())
    assert torch.equal(direction.dense(), base * factor)
    assert direction.pair(gradient).item() == pytest.approx((gradient * base * factor).sum().item())


# -- certified bounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
@each(CASES)
def test_the_bound_is_never_below_the_size_nor_far_above(
    norm: Norm, shape: tuple[int, ...], dtype: torch.dtype, scale: float
) -> None:
    for seed in range(5):
        weight = gaussian(*shape, seed=seed, dtype=dtype) * scale
        exact = norm.size(weight.double()).item()
        assert exact <= norm.bound(weight).item() <= 1.03 * exact


def test_the_bound_of_many_rows_stays_near_their_size() -> None:
    weight = gaussian(20_000, 16, dtype=torch.float32)
    norm = RowNorm.of_embedding(16)
    assert norm.bound(weight).item() <= norm.size(weight).item() * (1 + 1e-4)


@each({name: case for name, case in POLAR.items() if name != "Spectral 1×1"})
def test_the_euclidean_norm_is_no_smaller_and_its_directions_have_norm_at_most_1(
    norm: Norm, shape: tuple[int, ...]
) -> None:
    weight, gradient = gaussian(*shape), gaussian(*shape, seed=3)
    slack = tolerance(torch.float64, weight.numel())
    assert norm.size(weight).item() <= norm.euclidean.size(weight).item() * (1 + slack)
    assert norm.size(norm.euclidean.direction(gradient).dense()).item() <= 1 + slack
    assert norm.dual(gradient).item() * (1 + slack) >= norm.euclidean.dual(gradient).item()


@each(EXACT)
def test_a_norm_without_polar_factor_is_its_own_euclidean_norm(norm: Norm, shape: tuple[int, ...]) -> None:
    assert norm.euclidean == norm


def test_frobenius_is_the_spectral_size_at_rank_1_and_larger_at_rank_2() -> None:
    one = with_singular_values(torch.tensor([3.0]), 4, 6)
    two = with_singular_values(torch.tensor([3.0, 4.0]), 4, 6)
    assert Frobenius().size(one).item() == pytest.approx(Spectral().size(one).item())
    assert Frobenius().size(two).item() == pytest.approx(1.25 * Spectral().size(two).item())


@each(CASES)
def test_half_precision_is_measured_in_float32(norm: Norm, shape: tuple[int, ...]) -> None:
    weight = gaussian(*shape, dtype=torch.bfloat16)
    assert norm.size(weight).item() == norm.size(weight.float()).item()
    assert norm.bound(weight).item() == norm.bound(weight.float()).item()


# -- operator norms --------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def test_row_norm_is_the_operator_norm_from_rms_into_the_maximum() -> None:
    weight = gaussian(5, 8)
    size = RowNorm.into_logits(8).size(weight).item()
    x = gaussian(2000, 8, seed=9)
    x = x / rms(x)[:, None]
    assert (x @ weight.mT).abs().amax().item() <= size
    row = weight[weight.norm(dim=1).argmax()]
    assert (weight @ (row / rms(row))).abs().amax().item() == pytest.approx(size)


def test_row_norm_of_an_embedding_is_the_largest_rms_of_a_row() -> None:
    weight = gaussian(7, 4)
    assert RowNorm.of_embedding(4).size(weight).item() == pytest.approx(rms(weight).amax().item())


def test_spectral_is_the_operator_norm_from_rms_to_rms() -> None:
    weight = gaussian(5, 8)
    size = Spectral().size(weight).item()
    x = gaussian(2000, 8, seed=9)
    assert (rms(x @ weight.mT) / rms(x)).amax().item() <= size
    leading = torch.linalg.svd(weight)[2][0]
    assert (rms(weight @ leading) / rms(leading)).item() == pytest.approx(size)


def test_sign_is_the_operator_norm_of_a_diagonal_from_rms_to_rms() -> None:
    scale = gaussian(6)
    x = gaussian(2000, 6, seed=9)
    assert (rms(x * scale) / rms(x)).amax().item() <= Sign().size(scale).item()
    unit = torch.eye(6, dtype=torch.float64)[scale.abs().argmax()]
    assert (rms(unit * scale) / rms(unit)).item() == pytest.approx(Sign().size(scale).item())
