"""Facts recomputed by search and by quadrature, constants attained by their witnesses, maps against torch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from modula_agd import (
    GELU,
    Abs,
    Bond,
    Conv2d,
    Conv3d,
    Elementwise,
    Fact,
    Features,
    Flatten,
    Gain,
    Grade,
    Identity,
    Image,
    InvalidArgument,
    LeakyReLU,
    Linear,
    Logits,
    Mean,
    Multiply,
    ReLU,
    Sequence,
    Sigmoid,
    SiLU,
    Softmax,
    Space,
    SpaceMismatch,
    Tanh,
    ToSequence,
    UnitBall,
    Volume,
)
from modula_agd.bond import FACTS
from modula_agd.space import Tuple
from support import gaussian, tolerance

LEAKY = [LeakyReLU(slope).fact for slope in (0.01, 0.5, -0.5, -1.0, 2.0, -3.0)]
ALL = [*FACTS.values(), *LEAKY]
SMOOTH = [fact for fact in ALL if fact.second is not None]
# offset by an irrational number, so that no kink lies on the grid
GRID = torch.linspace(-12, 12, 240_001, dtype=torch.float64) + math.pi * 1e-6
each = pytest.mark.parametrize("fact", ALL, ids=lambda fact: fact.name)
each_smooth = pytest.mark.parametrize("fact", SMOOTH, ids=lambda fact: fact.name)


def derivative(function: Callable[[Tensor], Tensor], order: int) -> Callable[[Tensor], Tensor]:
    for _ in range(order):
        function = torch.func.grad(lambda x, inner=function: inner(x).sum())
    return function


def largest(function: Callable[[Tensor], Tensor]) -> float:
    """sup |function| over [-12, 12]: the best of a dense grid, then of ever denser ones around it."""
    grid = GRID
    for _ in range(4):
        value, index = function(grid).abs().max(0)
        step = (grid[1] - grid[0]).item()
        grid = torch.linspace(grid[index].item() - step, grid[index].item() + step, 201, dtype=torch.float64)
    return value.item()


# -- the table of facts ----------------------------------------------------------------------------------------------------


@each
def test_the_lipschitz_constant_is_the_largest_slope_rounded_up(fact: Fact) -> None:
    slope = largest(derivative(fact.function, 1))
    assert slope - 1e-14 <= fact.gain.proved.value <= slope + 1e-9


@each
def test_the_witness_pair_attains_the_lipschitz_constant(fact: Fact) -> None:
    x, y = (torch.tensor(value, dtype=torch.float64) for value in fact.gain.proved.witness)  # pyright: ignore
    ratio = ((fact.function(x) - fact.function(y)).abs() / (x - y).abs()).item()
    assert ratio == pytest.approx(fact.gain.proved.value, rel=1e-6)
    assert ratio <= fact.gain.proved.value * (1 + 1e-9)


@each_smooth
def test_the_second_derivative_is_bounded_by_its_largest_value_rounded_up(fact: Fact) -> None:
    assert fact.second is not None
    second = largest(derivative(fact.function, 2))
    assert second - 1e-14 <= fact.second <= second + 1e-9


@each
def test_a_fact_without_second_derivative_has_a_kink(fact: Fact) -> None:
    left, right = derivative(fact.function, 1)(torch.tensor([-1e-12, 1e-12], dtype=torch.float64)).tolist()
    assert (abs(left - right) > 0.4) == (fact.second is None)


@each
def test_the_typical_value_is_the_root_mean_square_of_the_change_from_zero(fact: Fact) -> None:
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    change = fact.function(z) - fact.function(torch.zeros((), dtype=torch.float64))
    expected = torch.trapezoid(change.square() * density, z).sqrt().item()
    assert fact.gain.typical.value == pytest.approx(expected, abs=1e-9)


@each
def test_a_typical_constant_does_not_exceed_the_proved_one(fact: Fact) -> None:
    assert fact.gain.typical.value <= fact.gain.proved.value
    assert (fact.gain.proved.grade, fact.gain.typical.grade) == (Grade.PROVED, Grade.TYPICAL)


@each
def test_the_value_at_zero_and_the_limit_are_those_of_the_function(fact: Fact) -> None:
    assert fact.at_zero == fact.function(torch.zeros((), dtype=torch.float64)).abs().item()
    far = fact.function(torch.tensor([-40.0, 40.0, -1e6, 1e6], dtype=torch.float64)).abs()
    assert far.max().item() <= fact.limit
    if math.isfinite(fact.limit):
        assert far.max().item() == pytest.approx(fact.limit)
    else:
        assert far.max().item() > 1e5


@pytest.mark.parametrize("bond", [ReLU(), Abs(), GELU(), SiLU(), Tanh(), Sigmoid(), *map(LeakyReLU, (0.1, 2.0))])
def test_an_elementwise_bond_is_lipschitz_in_rms_and_in_the_maximum(bond: Elementwise) -> None:
    for space in (Features(6), Logits(6)):
        bound = bond.bind(space)
        for seed in range(20):
            x, change = 2 * gaussian(50, 6, seed=seed), gaussian(50, 6, seed=seed + 99) * 10.0 ** (-seed % 4)
            moved = bound({}, x + change) - bound({}, x)
            assert (space.norm(moved) <= bond.gain.proved.value * space.norm(change) * (1 + 1e-9)).all()


@pytest.mark.parametrize("space", [Features(6), Sequence(6), Image(6), Logits(6)])
@pytest.mark.parametrize("bond", [GELU(), SiLU(), Tanh(), Sigmoid()])
def test_the_curvature_bounds_the_linearisation_error_and_one_nonzero_entry_nearly_attains_it(
    bond: Elementwise, space: Space
) -> None:
    settled = bond.bind(space)
    assert isinstance(settled, Elementwise)
    assert settled.curvature is not None
    slope = derivative(bond.forward, 1)
    positions = {Sequence: (3,), Image: (2, 2)}.get(type(space), ())
    channels = 1 if isinstance(space, Image) else -1

    def worst(x: Tensor, change: Tensor) -> float:
        error = bond.forward(x + change) - bond.forward(x) - slope(x) * change
        return (space.norm(error) / space.norm(change).square()).max().item()

    shape = (40, 6, *positions) if isinstance(space, Image) else (40, *positions, 6)
    for seed in range(10):
        x, change = 2 * gaussian(*shape, seed=seed), gaussian(*shape, seed=seed + 99)
        assert worst(x, change) <= settled.curvature
    spike = torch.zeros_like(change).movedim(channels, -1)
    spike[..., 0] = 1e-3
    steepest = GRID[derivative(bond.forward, 2)(GRID).abs().argmax()].item()
    attained = worst(torch.full_like(change, steepest), spike.movedim(-1, channels))
    assert 0.998 * settled.curvature <= attained <= settled.curvature * (1 + 1e-6)


def test_a_kink_or_an_unsettled_space_has_no_curvature() -> None:
    assert ReLU().bind(Features(3)).bind(Features(3)).curvature is None  # pyright: ignore[reportAttributeAccessIssue]
    assert Tanh().curvature is None


def test_a_linear_fact_has_no_curvature_at_all() -> None:
    linear = Elementwise(Fact("Twice", lambda x: 2 * x, Gain.exact(2.0, "a multiple"), second=0.0))
    assert linear.curvature == 0
    assert (linear @ Linear(3, 3)).bound(0.5).error == 0


def test_a_bounded_bond_limits_the_magnitude() -> None:
    assert (Sigmoid() @ Linear(3, 3)).bound(constants="proved").magnitude == 0.75
    assert (Sigmoid() @ Linear(3, 3)).bound(magnitude=10.0, constants="proved").magnitude == 1
    assert (Tanh() @ Linear(3, 3)).bound(magnitude=10.0).magnitude == 1


def test_typical_bounds_are_never_looser_than_proved_ones() -> None:
    for bond in (ReLU(), Abs(), GELU(), SiLU(), Tanh(), Sigmoid()):
        net = bond @ Linear(3, 3)
        typical, proved = net.bound(0.1), net.bound(0.1, constants="proved")
        assert typical.magnitude <= proved.magnitude
        moved = typical.magnitude * (typical.growth - 1)
        assert moved <= proved.magnitude * (proved.growth - 1) * (1 + 1e-12)


# -- maps against torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bond", "reference"),
    [
        (ReLU(), nn.ReLU()),
        (LeakyReLU(0.2), nn.LeakyReLU(0.2)),
        (GELU(), nn.GELU()),
        (SiLU(), nn.SiLU()),
        (Tanh(), nn.Tanh()),
        (Sigmoid(), nn.Sigmoid()),
        (Abs(), torch.abs),
        (Identity(), nn.Identity()),
        (Flatten(6, 6), nn.Flatten()),
        (Mean(), lambda x: x.mean((2, 3))),
    ],
)
def test_forward_is_that_of_torch(bond: Bond, reference: Callable[[Tensor], Tensor]) -> None:
    x = gaussian(2, 3, 6, 6)
    settled = bond.bind(Image(3))
    out = settled({}, x)
    assert torch.allclose(out, reference(x), rtol=tolerance(torch.float64, 36), atol=0)
    assert settled.codomain is not None
    assert settled.codomain.fits(out)


def test_mean_averages_a_sequence_over_time_and_a_volume_over_space() -> None:
    x = gaussian(2, 5, 3)
    assert torch.allclose(Mean().bind(Sequence(3))({}, x), x.mean(1))
    x = gaussian(2, 5, 3, 2, 4)
    assert torch.allclose(Mean().bind(Volume(5))({}, x), x.flatten(2).mean(2))


def test_flatten_refuses_images_of_another_size() -> None:
    with pytest.raises(SpaceMismatch, match=r"Flatten\(2, 3\) was given images of 3×2 pixels"):
        Flatten(2, 3).bind(Image(4))({}, gaussian(1, 4, 3, 2))


@pytest.mark.parametrize("pixels", [(0, 2), (2, -1), (2.0, 2)])
def test_flatten_takes_positive_numbers_of_pixels(pixels: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match="of a Flatten must be an integer of at least 1"):
        Flatten(*pixels)


# -- linear bonds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bond", "space", "shape"),
    [
        (Identity(), Features(4), (5, 4)),
        (Flatten(3, 2), Image(4), (5, 4, 3, 2)),
        (Mean(), Image(4), (5, 4, 3, 2)),
        (Mean(), Sequence(4), (5, 3, 4)),
        (Mean(), Volume(4), (5, 4, 3, 2, 2)),
    ],
)
def test_a_linear_bond_never_enlarges_the_norm_and_keeps_that_of_a_constant(
    bond: Bond, space: Space, shape: tuple[int, ...]
) -> None:
    settled = bond.bind(space)
    assert settled.codomain is not None
    for seed in range(10):
        x, y = gaussian(*shape, seed=seed), gaussian(*shape, seed=seed + 50)
        ratio = settled.codomain.norm(settled({}, x)) / space.norm(x)
        assert ratio.max().item() <= 1 + tolerance(torch.float64, x.numel())
        assert torch.allclose(settled({}, x - 2 * y), settled({}, x) - 2 * settled({}, y))
    constant = torch.ones(shape, dtype=torch.float64)
    assert settled.codomain.norm(settled({}, constant)).tolist() == pytest.approx([1.0] * 5)
    bound = (settled @ _into(space)).bound(0.1)
    assert (bound.magnitude, bound.growth, bound.error) == (pytest.approx(1.0), pytest.approx(1.1), 0)


def _into(space: Space) -> Linear | Conv2d | Conv3d:
    """An atom whose codomain is ``space`` and whose proved gain is 1."""
    if isinstance(space, Image):
        return Conv2d(space.width, 2, 1)
    if isinstance(space, Volume):
        return Conv3d(space.width, 2, 1)
    return Linear(space.width, type(space)(2))  # pyright: ignore[reportCallIssue]


# -- the unit ball ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "shape"),
    [(Features(4), (9, 4)), (Sequence(4), (9, 3, 4)), (Image(4), (9, 4, 2, 2)), (Volume(4), (9, 4, 2, 1, 2))],
)
def test_the_unit_ball_projects_each_position(space: Space, shape: tuple[int, ...]) -> None:
    ball, channels = UnitBall().bind(space), 1 if isinstance(space, Image | Volume) else -1
    x = 3 * gaussian(*shape)
    vectors, projected = x.movedim(channels, -1).flatten(0, -2), ball({}, x).movedim(channels, -1).flatten(0, -2)
    for before, after in zip(vectors, projected, strict=True):
        assert torch.allclose(after, before / max(1.0, before.square().mean().sqrt().item()))


def test_the_unit_ball_is_1_lipschitz() -> None:
    ball, space = UnitBall().bind(Features(3)), Features(3)
    for seed in range(40):
        x, change = 2 * gaussian(200, 3, seed=seed), gaussian(200, 3, seed=seed + 99) * 10.0 ** (-seed % 5)
        ratio = space.norm(ball({}, x + change) - ball({}, x)) / space.norm(change)
        assert ratio.max().item() <= 1 + 1e-10


def test_in_the_max_norm_the_same_map_has_constant_2_so_logits_are_refused() -> None:
    def project(x: Tensor) -> Tensor:
        return x / x.abs().amax().clamp(min=1)

    x = torch.tensor([1.0, 1.0], dtype=torch.float64)
    change = torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    ratio = (project(x + change) - project(x)).abs().amax() / change.abs().amax()
    assert ratio.item() == pytest.approx(2, rel=1e-5)
    with pytest.raises(SpaceMismatch, match="projects in the RMS norm"):
        UnitBall().bind(Logits(2))


@pytest.mark.parametrize("magnitude", [0.5, 2.0])
def test_the_unit_ball_limits_the_magnitude_to_1(magnitude: float) -> None:
    bound = (UnitBall() @ Linear(3, 3)).bound(0.1, magnitude=magnitude)
    assert bound.magnitude == min(magnitude, 1)
    assert bound.growth == pytest.approx(1 + max(magnitude, 1) * 0.1)
    assert bound.error is None


# -- products --------------------------------------------------------------------------------------------------------------


def test_a_product_in_rms_attains_the_square_root_of_the_width() -> None:
    space = Features(9)
    product = Multiply().bind(Tuple((space, space)))
    spike = torch.eye(9, dtype=torch.float64)[:1]
    ratio = (space.norm(product({}, (spike, spike))) / space.norm(spike).square()).item()
    assert ratio == pytest.approx(3)
    assert product.gain.proved.value == 3  # pyright: ignore[reportAttributeAccessIssue]
    assert product.gain.typical.value == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_product_with_a_factor_bounded_in_the_max_norm_has_constant_1() -> None:
    features, logits = Features(9), Logits(9)
    product = Multiply().bind(Tuple((logits, features)))
    assert product.gain.typical.value == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert product.gain.proved.grade == product.gain.typical.grade == Grade.PROVED  # pyright: ignore
    assert product.codomain == features
    for seed in range(10):
        x, y = gaussian(20, 9, seed=seed), gaussian(20, 9, seed=seed + 50)
        assert (features.norm(product({}, (x, y))) <= logits.norm(x) * features.norm(y)).all()


def test_growths_and_magnitudes_of_a_product_multiply() -> None:
    net = Multiply() @ (Linear(4, 3, size=2.0), Linear(4, 4) @ Linear(4, 3, size=3.0))
    bound = net.bound(0.1, constants="proved")
    assert bound.magnitude == pytest.approx(math.sqrt(4) * 6)
    assert bound.growth == pytest.approx(1.1**3)
    assert (bound.depth, bound.ceiling) == (3, 3)


def test_silu_is_the_gate_of_itself() -> None:
    x = gaussian(5, 4)
    gated = (Multiply() @ (Sigmoid(), Identity()))({}, x)
    assert torch.allclose(gated, functional.silu(x))


# -- probabilities, and pixels as a sequence -------------------------------------------------------------------------------


def test_a_softmax_moves_by_half_of_what_two_equal_scores_move() -> None:
    softmax, worst = Softmax().bind(Logits(4)), 0.0
    for seed in range(30):
        scores, change = 2 * gaussian(50, 4, seed=seed), gaussian(50, 4, seed=seed + 99).sign()
        for step in (1e-3, 1.0):
            moved = (softmax({}, scores + step * change) - softmax({}, scores)).abs().amax()
            assert float(moved) <= math.tanh(step / 2) <= softmax.gain.proved.value * step
            worst = max(worst, float(moved) / math.tanh(step / 2))
    assert worst > 0.8
    two, step = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1e-4, -1e-4]], dtype=torch.float64)
    moved = (two + step).softmax(-1) - two.softmax(-1)
    assert float(moved.abs().amax()) == pytest.approx(softmax.gain.proved.value * 1e-4)


def test_the_curvature_of_a_softmax_is_attained_by_two_scores() -> None:
    softmax, step = Softmax().bind(Logits(2)), 1e-3
    half = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    scores = torch.stack([half, -half], -1)
    change = step * torch.tensor([1.0, -1.0], dtype=torch.float64).expand_as(scores)
    before, linear = torch.func.jvp(lambda z: z.softmax(-1), (scores,), (change,))
    left = (softmax({}, scores + change) - before - linear).abs().amax() / step**2
    assert float(left) == pytest.approx(softmax.curvature, rel=1e-3)  # pyright: ignore[reportAttributeAccessIssue]


def test_probabilities_are_at_most_1_and_equal_at_zero() -> None:
    softmax = Softmax().bind(Logits(4))
    assert torch.equal(softmax({}, torch.zeros(1, 4)), torch.full((1, 4), 0.25))
    bound = (Softmax() @ Linear(Logits(4), 3)).bound(0.1, magnitude=0.5)
    assert bound.magnitude == pytest.approx(0.25 + 0.25)
    assert bound.growth == pytest.approx(1 + 0.5 * 0.5 / 0.5 * 0.1)
    assert (Softmax() @ Linear(Logits(4), 3)).bound(magnitude=9.0).magnitude == 1
    with pytest.raises(SpaceMismatch, match=r"Logits\(n\).*Features\(3\)"):
        Softmax() @ Linear(3, 3)


def test_pixels_become_positions_row_by_row() -> None:
    x, layer = gaussian(2, 3, 2, 4), ToSequence().bind(Image(3))
    out = layer({}, x)
    assert out.shape == (2, 8, 3)
    assert torch.equal(out[1, 4 + 2], x[1, :, 1, 2])
    assert torch.equal(layer.codomain.norm(out), Image(3).norm(x))
    assert (Linear(Sequence(2), Sequence(3)) @ ToSequence()).domain == Image(3)
    with pytest.raises(SpaceMismatch, match=r"Sequence\(3\)"):
        ToSequence().bind(Sequence(3))
