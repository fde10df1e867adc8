"""Each search against an independent minimiser of the majorant that it claims to minimise."""

import math
from collections.abc import Callable

import pytest
import torch

from modula_agd import (
    MLP,
    Bias,
    Certified,
    ClosedForm,
    CrossEntropy,
    ExactGrowth,
    Huber,
    Identity,
    InvalidArgument,
    Linear,
    Logits,
    Loss,
    Module,
    Multiply,
    ReLU,
    ResMLP,
    SquareLoss,
    Tanh,
    UnitBall,
    UnknownBound,
)
from modula_agd.bound import Number
from modula_agd.majorisation import Majorant, Search, closed_form, divergence_bound

NETWORKS: dict[str, Module] = {
    "one atom": Linear(3, 4),
    "chain": MLP(Logits(3), 5, 4, 8),
    "residual": ResMLP(Logits(3), 5, 4, 10),
    "many blocks": ResMLP(Logits(3), 5, 4, 40),
    "biases and masses": MLP(3, 5, 4, 3, bias=True).with_mass(2.5),
    "product": 3 * (Multiply() @ (Linear(4, 4), Linear(4, 4) @ Linear(4, 4))) @ Linear(4, 3),
    "ball": UnitBall() @ (4 * Linear(3, 3)) @ UnitBall() @ Linear(3, 3),
}
SMOOTH: dict[str, Module] = {
    "linear chain": Linear(3, 4) @ Linear(4, 5) @ Linear(5, 4),
    "tanh": Linear(3, 4) @ Tanh() @ Linear(4, 5),
    "residual": (0.5 * Identity() + 0.5 * Linear(4, 4)) ** 6 @ Bias(4) @ Linear(4, 4),
    "product": Multiply() @ (Linear(4, 4), Linear(4, 4)) @ Linear(4, 3),
}
LOSSES = {"square": SquareLoss(), "cross-entropy": CrossEntropy(), "Huber": Huber(0.1)}
each = pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)
each_smooth = pytest.mark.parametrize("net", SMOOTH.values(), ids=SMOOTH)
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def majorant(
    net: Module, loss: Loss, search: Search, descent: float, residual: float | None = None, magnitude: float = 1.0
) -> Majorant:
    constants = "proved" if search.needs_evidence else "typical"
    points = search.points(net.bound(0.0, magnitude=magnitude, constants=constants), torch.device("cpu"))
    bound = net.bound(points, magnitude=magnitude, constants=constants)
    known = None if residual is None else scalar(residual)
    return Majorant(points, bound, divergence_bound(bound, loss.bound), loss.curvature.value, scalar(descent), known)


def value(net: Module, loss: Loss, t: Number, descent: float, residual: float = 0.0, magnitude: float = 1.0) -> Number:
    """The majorant written out, at one step or many: proved constants where there is a residual."""
    bound = net.bound(t, magnitude=magnitude, constants="proved" if residual else "typical")
    second_order = residual * bound.magnitude * bound.error if residual else 0.0
    return -t * descent + second_order + loss.bound(bound.magnitude * (bound.growth - 1))


def minimiser(function: Callable[[torch.Tensor], torch.Tensor], low: float, high: float) -> float:
    """The best of an even grid in the logarithm, then of ever finer ones around it: no model of the function."""
    a, b = math.log(low), math.log(high)
    for _ in range(6):
        grid = torch.linspace(a, b, 201, dtype=torch.float64)
        best = function(grid.exp()).argmin().item()
        a, b = grid[max(best - 1, 0)].item(), grid[min(best + 1, 200)].item()
    return math.exp((a + b) / 2)


def root(slope: Callable[[float], float], high: float) -> float:
    """Where an increasing function crosses zero, by bisection between 0 and ``high``."""
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


# -- the closed form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [1e-12, 1e-6, 1e-2, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("magnitude", [1.0, 0.3, 12.0])
@pytest.mark.parametrize("curvature", [1.0, 0.25, 2.0])
@pytest.mark.parametrize("residual", [0.0, 0.7, 1e4])
def test_the_closed_form_is_the_minimiser(gradient: float, magnitude: float, curvature: float, residual: float) -> None:
    def slope(eta: float) -> float:
        quadratic = curvature * magnitude**2 * math.exp(eta) * math.expm1(eta)
        return -gradient + residual * magnitude * math.expm1(eta) + quadratic

    eta = closed_form(scalar(gradient), magnitude, curvature, residual).item()
    assert eta == pytest.approx(root(slope, 40.0), rel=1e-9)


def test_the_closed_form_is_theorem_2_of_the_agd_paper() -> None:
    for gradient in (1e-3, 0.5, 7.0):
        expected = math.log((1 + math.sqrt(1 + 4 * gradient)) / 2)
        assert closed_form(scalar(gradient), 1.0).item() == pytest.approx(expected, rel=1e-12)


def test_the_closed_form_with_residual_is_the_formula_of_the_theory() -> None:
    g, a, r = 0.8, 1.7, 0.4
    expected = math.log((1 - r / a + math.sqrt((1 + r / a) ** 2 + 4 * g / a**2)) / 2)
    assert closed_form(scalar(g), a, 1.0, r).item() == pytest.approx(expected, rel=1e-12)


def test_the_closed_form_of_no_gradient_is_exactly_zero() -> None:
    for residual in (0.0, 0.3, 1e6):
        assert closed_form(scalar(0.0), 1.7, 0.25, residual) == 0


@each
def test_closed_form_search_takes_the_ceiling_depth_and_the_magnitude(net: Module) -> None:
    found = ClosedForm().minimum(majorant(net, SquareLoss(), ClosedForm(), 0.6))
    bound = net.bound()
    eta = closed_form(scalar(0.6 / bound.ceiling), bound.magnitude).item()
    assert found.t.item() == pytest.approx(eta / bound.ceiling)
    predicted = -0.6 * found.t.item() + (bound.magnitude * math.expm1(eta)) ** 2 / 2
    assert found.change.item() == pytest.approx(predicted)


def test_closed_form_search_prefers_what_is_declared() -> None:
    found = ClosedForm(depth=4.0, magnitude=2.0).minimum(majorant(NETWORKS["chain"], SquareLoss(), ClosedForm(), 0.6))
    eta = closed_form(scalar(0.15), 2.0).item()
    assert found.t.item() == pytest.approx(eta / 4)


@each
@each_loss
def test_what_the_closed_form_promises_the_majorant_keeps(net: Module, loss: Loss) -> None:
    for descent in (1e-3, 1.0, 1e3):
        found = ClosedForm().minimum(majorant(net, loss, ClosedForm(), descent))
        assert value(net, loss, found.t.item(), descent) <= found.change.item() * (1 - 1e-12) < 0


# -- exact growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("descent", [1e-4, 1e-2, 1.0, 30.0, 1e3])
@each
@each_loss
def test_exact_growth_finds_the_minimiser_within_a_ten_thousandth(net: Module, loss: Loss, descent: float) -> None:
    found = ExactGrowth().minimum(majorant(net, loss, ExactGrowth(), descent))
    expected = minimiser(lambda t: value(net, loss, t, descent), 1e-9, 1e4 / net.bound().depth)
    if expected < 0.99e4 / net.bound().depth:
        assert found.t.item() == pytest.approx(expected, rel=1e-4)
        assert found.change.item() == pytest.approx(value(net, loss, expected, descent), rel=5e-5)


@each
@each_loss
def test_exact_growth_never_promises_less_than_the_closed_form(net: Module, loss: Loss) -> None:
    for exponent in range(-16, 13, 2):
        descent = 10.0**exponent
        exact = ExactGrowth().minimum(majorant(net, loss, ExactGrowth(), descent))
        closed = ClosedForm().minimum(majorant(net, loss, ClosedForm(), descent))
        assert exact.change.item() <= closed.change.item() < 0
        assert exact.t.item() > 0


@each
@each_loss
def test_what_exact_growth_promises_the_majorant_keeps(net: Module, loss: Loss) -> None:
    for descent in (1e-3, 1.0, 1e3):
        found = ExactGrowth().minimum(majorant(net, loss, ExactGrowth(), descent))
        # the promise is the value at the grid point, of which the refined step is a little better
        assert value(net, loss, found.t.item(), descent) <= found.change.item() * (1 - 1e-9) < 0


def test_exact_growth_gains_the_square_of_the_ratio_of_the_depths_on_a_residual_stack() -> None:
    # ten two-layer blocks: D = 2, D̄ = 20, and short steps promise S²/(2·(a·depth)²)
    net = (0.9 * Identity() + 0.1 * (Linear(4, 4) @ Linear(4, 4))) ** 10
    assert (net.bound().depth, net.bound().ceiling) == (pytest.approx(2), pytest.approx(20))
    exact = ExactGrowth().minimum(majorant(net, SquareLoss(), ExactGrowth(), 1e-4)).change.item()
    closed = ClosedForm().minimum(majorant(net, SquareLoss(), ClosedForm(), 1e-4)).change.item()
    assert exact / closed == pytest.approx(100, rel=1e-2)


def test_a_finer_grid_changes_nothing_that_matters() -> None:
    steps = [
        search.minimum(majorant(NETWORKS["residual"], SquareLoss(), search, 1.0)).t.item()
        for search in (ExactGrowth(), ExactGrowth(count=20_000))
    ]
    assert steps[0] == pytest.approx(steps[1], rel=1e-4)


def test_a_descent_beyond_the_grid_gives_a_finite_step() -> None:
    for search in (ExactGrowth(), Certified()):
        residual = 0.5 if search.needs_evidence else None
        found = search.minimum(majorant(Linear(3, 4), SquareLoss(), search, 1e30, residual))
        assert found.t.isfinite()
        assert found.change < 0


def test_an_overflow_of_the_growth_is_never_chosen() -> None:
    net = MLP(Logits(3), 5, 4, 200)
    built = majorant(net, SquareLoss(), ExactGrowth(), 1e3)
    assert built.values().isinf().any()
    assert not built.values().isnan().any()
    assert ExactGrowth().minimum(built).change.isfinite()


# -- certified -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [1e-3, 0.5, 20.0])
@pytest.mark.parametrize("descent", [1e-2, 1.0, 1e3])
@each_smooth
def test_certified_finds_the_minimum_of_the_whole_majorant(net: Module, descent: float, residual: float) -> None:
    for magnitude in (1.0, 0.2, 5.0):
        built = majorant(net, SquareLoss(), Certified(), descent, residual, magnitude)
        found = Certified().minimum(built)

        def whole(t: Number, magnitude: float = magnitude) -> Number:
            return value(net, SquareLoss(), t, descent, residual, magnitude)

        best = minimiser(whole, 1e-9, 1e4 / built.bound.depth)
        assert found.t.item() == pytest.approx(best, rel=0.004)
        assert found.change.item() == pytest.approx(whole(best), rel=5e-5)
        # what is promised is the majorant where the step ends, not near it
        assert found.change.item() == pytest.approx(whole(found.t.item()), rel=1e-9)


def test_certified_promises_no_less_than_the_closed_form_with_residual() -> None:
    net, r = SMOOTH["linear chain"], 0.7
    for g in (1e-2, 1.0, 1e2):
        found = Certified().minimum(majorant(net, SquareLoss(), Certified(), 3 * g, r))
        eta = closed_form(scalar(g), 1.0, 1.0, r).item()
        closed = -g * eta + r * (math.expm1(eta) - eta) + math.expm1(eta) ** 2 / 2
        assert found.change.item() <= closed * (1 - 1e-4) < 0


def test_a_residual_shortens_the_step() -> None:
    net = SMOOTH["linear chain"]
    steps = [
        Certified().minimum(majorant(net, SquareLoss(), Certified(), 1.0, residual)).t.item()
        for residual in (0.0, 0.1, 1.0, 10.0)
    ]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < steps[0] / 2
    assert steps[0] == pytest.approx(
        ExactGrowth().minimum(majorant(net, SquareLoss(), ExactGrowth(), 1.0)).t.item(), rel=0.004
    )


def test_certified_refuses_a_network_with_a_kink_and_the_others_do_not() -> None:
    kinked, smooth = (Linear(3, 4) @ bond @ Linear(4, 3) for bond in (ReLU(), Tanh()))
    with pytest.raises(UnknownBound, match=r"second-order bound \(ReLU.*search=ExactGrowth\(\)"):
        Certified().check(kinked.bound())
    Certified().check(smooth.bound())
    for search in (ExactGrowth(), ClosedForm()):
        search.check(kinked.bound())


def test_a_residual_without_second_order_bound_is_an_error() -> None:
    with pytest.raises(UnknownBound, match="second-order error"):
        majorant(Linear(3, 4) @ ReLU() @ Linear(4, 3), SquareLoss(), ExactGrowth(), 1.0, residual=1.0).values()


# -- any step --------------------------------------------------------------------------------------------------------------


@each
@each_loss
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_majorant_is_known_at_any_step(net: Module, loss: Loss, factor: float) -> None:
    built = majorant(net, loss, ExactGrowth(), 0.6).curved(scalar(factor))
    bound = net.bound()
    for eta in (0.0, 1e-9, 1e-3, 0.1, 0.7, 2.0):
        t = eta / bound.depth
        growth = net.bound(t, constants="typical")
        expected = -t * 0.6 + factor * loss.bound(growth.magnitude * (growth.growth - 1))
        found = ExactGrowth().change(built, scalar(t)).item()
        # a chord of a convex function lies above it, and here by at most a part of its curvature
        slack = 1e-3 * abs(expected + t * 0.6)
        assert expected - 1e-12 * t <= found <= expected + slack + 1e-7 * t
    assert ExactGrowth().change(built, scalar(0.0)) == 0


@each_smooth
def test_a_certified_majorant_is_known_at_any_step(net: Module) -> None:
    built = majorant(net, SquareLoss(), Certified(), 0.6, residual=0.4)
    for t in (1e-3, 0.1, 0.7):
        expected = value(net, SquareLoss(), t, 0.6, residual=0.4)
        assert (
            expected - 1e-12 <= Certified().change(built, scalar(t)).item() <= expected + 1e-4 * abs(expected + 0.6 * t)
        )


@each
def test_the_closed_form_is_known_at_any_step(net: Module) -> None:
    bound = net.bound()
    for t in (0.0, 1e-3, 0.2):
        expected = -0.6 * t + (bound.magnitude * math.expm1(bound.ceiling * t)) ** 2 / 2
        found = ClosedForm().change(majorant(net, SquareLoss(), ClosedForm(), 0.6), scalar(t))
        assert found.item() == pytest.approx(expected)


def test_a_majorant_at_one_point_says_that_it_knows_no_other() -> None:
    with pytest.raises(InvalidArgument, match="evaluated at one alone"):
        majorant(Linear(3, 4), SquareLoss(), ClosedForm(), 1.0).at(scalar(0.1))


# -- all searches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [ClosedForm(), ExactGrowth(), Certified()])
@each_smooth
def test_no_descent_gives_no_step(search: Search, net: Module) -> None:
    residual = 0.5 if search.needs_evidence else None
    found = search.minimum(majorant(net, SquareLoss(), search, 0.0, residual))
    assert (found.t.item(), found.change.item()) == (0, 0)


@each_smooth
@each_loss
def test_the_majorant_is_zero_at_zero_and_convex(net: Module, loss: Loss) -> None:
    bound = net.bound(torch.linspace(0, 0.5, 501, dtype=torch.float64), constants="proved")
    t = torch.linspace(0, 0.5, 501, dtype=torch.float64)
    taken = divergence_bound(bound, loss.bound)
    values = Majorant(t, bound, taken, loss.curvature.value, scalar(0.4), scalar(0.3)).values()
    assert values[0] == 0
    assert (values.diff().diff() >= -1e-12).all()


@pytest.mark.parametrize("what", ["depth", "magnitude"])
@pytest.mark.parametrize("number", [0.0, -1.0, math.nan, math.inf, "two"])
def test_a_declared_depth_or_magnitude_is_positive(what: str, number: float) -> None:
    with pytest.raises(InvalidArgument, match=f"ClosedForm was given {what}=.*must be a finite number > 0"):
        ClosedForm(**{what: number})


@pytest.mark.parametrize("kind", [ExactGrowth, Certified])
def test_a_grid_has_at_least_three_points(kind: type[ExactGrowth]) -> None:
    with pytest.raises(InvalidArgument, match="at least 3 points"):
        kind(count=2)
