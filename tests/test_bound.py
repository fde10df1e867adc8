"""The bound algebra in plain numbers: each rule by hand, then what every composition of rules must satisfy."""

import ast
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from numpy.polynomial import Polynomial

from modula_agd import bound as algebra
from modula_agd.bound import Bound, Constant, Gain, Grade

X = Bound(magnitude=2.0, growth=1.5, error=0.1, depth=3.0, ceiling=4.0)
Y = Bound(magnitude=6.0, growth=1.2, error=0.2, depth=1.0, ceiling=5.0)


def same(bound: Bound, **expected: object) -> None:
    for name, value in expected.items():
        assert getattr(bound, name) == (value if value is None else pytest.approx(value)), name


# -- each rule by hand -----------------------------------------------------------------------------------------------------


def test_a_source_has_its_magnitude_and_never_moves() -> None:
    same(algebra.source(3.0), magnitude=3, growth=1, error=0, depth=0, ceiling=0)
    assert algebra.source().magnitude == 1


def test_an_atom_multiplies_the_magnitude_and_adds_its_mass_to_the_depth() -> None:
    result = algebra.atom(X, size=5.0, step=0.2, mass=2.0, gain=3.0)
    same(result, magnitude=30, growth=1.8, error=0.1 + 0.2 * 0.5, depth=5, ceiling=6)


def test_a_bias_adds_its_size_and_averages_growth_and_depth() -> None:
    result = algebra.bias(X, size=0.5, step=0.2, mass=2.0)
    same(
        result,
        magnitude=2.5,
        growth=(2 * 1.5 + 0.5 * 1.2) / 2.5,
        error=2 * 0.1 / 2.5,
        depth=(2 * 3 + 0.5 * 2) / 2.5,
        ceiling=4,
    )
    assert algebra.bias(X, size=0.5, step=0.2, mass=9.0).ceiling == 9


def test_a_homogeneous_bond_scales_the_magnitude_alone() -> None:
    same(algebra.bond(X, gain=0.5, limit=1.0, curvature=0.0), magnitude=1, growth=1.5, error=0.1, depth=3, ceiling=4)


def test_a_bond_with_another_limit_scales_relative_changes_by_the_ratio() -> None:
    # c·a/m = 0.5·2/4
    result = algebra.bond(X, gain=0.5, limit=4.0, curvature=0.25)
    same(result, magnitude=4, growth=1 + 0.25 * 0.5, error=0.25 * 0.1 + 0.25 * 1.0 / 4, depth=0.75, ceiling=4)
    # a saturating one has a ratio above 1, and then it multiplies the ceiling too
    same(algebra.bond(X, gain=1.0, limit=0.5), growth=3, depth=12, ceiling=16)


@pytest.mark.parametrize("bond", [{"curvature": None}, {"curvature": 0.5}])
def test_the_error_is_unknown_once_it_is_unknown(bond: dict[str, float | None]) -> None:
    unknown = algebra.bond(X, gain=1.0, limit=2.0)
    assert unknown.error is None
    assert algebra.bond(unknown, gain=1.0, limit=2.0, **bond).error is None
    assert algebra.atom(unknown, 1.0, 0.1, 1.0).error is None
    assert algebra.total([X, unknown]).error is None
    assert algebra.product(unknown, X, 1.0).error is None
    assert algebra.bias(unknown, 1.0, 0.1, 1.0).error is None


def test_a_scalar_multiplies_the_magnitude_by_its_size() -> None:
    same(algebra.scaled(X, -3.0), magnitude=6, growth=1.5, error=0.1, depth=3, ceiling=4)


def test_a_sum_averages_by_magnitude_and_takes_the_largest_ceiling() -> None:
    result = algebra.total([X, Y])
    same(result, magnitude=8, growth=(3 + 7.2) / 8, error=(0.2 + 1.2) / 8, depth=(6 + 6) / 8, ceiling=5)


def test_a_product_multiplies_magnitudes_and_growths_and_adds_depths() -> None:
    same(algebra.product(X, Y, 3.0), magnitude=36, growth=1.8, error=0.3 + 0.5 * 0.2, depth=4, ceiling=9)


def ball(x: Bound) -> Bound:
    """The projection to the unit ball, which is 1-Lipschitz in an RMS norm."""
    return algebra.bond(x, 1.0, algebra.smaller(x.magnitude, 1.0))


def test_the_ball_caps_the_magnitude_and_charges_for_it() -> None:
    same(ball(X), magnitude=1, growth=2, error=None, depth=6, ceiling=8)
    small = Bound(magnitude=0.5, growth=1.5, error=0.1, depth=3.0, ceiling=4.0)
    same(ball(small), magnitude=0.5, growth=1.5, depth=3, ceiling=4)


# -- what every composition satisfies ----------------------------------------------------------------------------------------


def chain(count: int) -> Callable[[object], Bound]:
    def build(t: object) -> Bound:
        x = algebra.source()
        for index in range(count):
            x = algebra.atom(x, 1.0 + index, t, 1.0)
        return x

    return build


def residual(blocks: int, block_depth: int = 2, convex: bool = True) -> Callable[[object], Bound]:
    def build(t: object) -> Bound:
        x = algebra.source()
        for _ in range(blocks):
            y = x
            for _ in range(block_depth):
                y = algebra.atom(y, 1.0, t, 1.0)
            keep = algebra.scaled(x, 1 - 1 / blocks) if convex and blocks > 1 else x
            branch = algebra.scaled(y, 1 / blocks)
            x = branch if convex and blocks == 1 else algebra.total([keep, branch])
        return x

    return build


def mixed(t: object) -> Bound:
    """Every linear rule: masses of 0 and 3, biases, sums of unlike branches, products, scalars."""
    x = algebra.bias(algebra.atom(algebra.source(0.7), 2.0, 3 * t, 3.0), 0.1, t, 1.0)  # pyright: ignore
    y = algebra.scaled(algebra.bond(algebra.atom(x, 0.5, t, 1.0, gain=3.0), 1.0, 2.13, 0.0), -0.3)
    z = algebra.total([x, y, algebra.atom(algebra.source(), 4.0, 0 * t, 0.0)])  # pyright: ignore
    return algebra.atom(algebra.product(z, y, 2.0), 1.0, t, 1.0)


def bounded(t: object) -> Bound:
    """Bonds that cap the magnitude: ratios below and above 1, and the ball."""
    x = algebra.bond(algebra.atom(algebra.source(3.0), 1.0, t, 1.0), 0.25, 1.0)
    x = ball(algebra.bond(algebra.atom(x, 2.0, t, 1.0), 1.0, 0.5))
    return ball(algebra.atom(algebra.bias(x, 1.0, t, 1.0), 5.0, t, 1.0))


LINEAR = {"chain": chain(4), "residual": residual(5), "not convex": residual(5, convex=False), "mixed": mixed}
NETWORKS = {**LINEAR, "bounded": bounded}
each = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


@each
def test_the_depth_is_the_derivative_of_the_growth_at_zero(network: Callable[[object], Bound]) -> None:
    step = 1e-5
    slope = (network(step).growth - network(-step).growth) / (2 * step)
    assert network(0.0).depth == pytest.approx(slope, rel=1e-8)
    assert network(0.0).growth == 1


@each
def test_magnitude_depth_and_ceiling_do_not_depend_on_the_step(network: Callable[[object], Bound]) -> None:
    at_0, at_1 = network(0.0), network(1.0)
    assert (at_0.magnitude, at_0.depth, at_0.ceiling) == (at_1.magnitude, at_1.depth, at_1.ceiling)
    assert at_0.depth <= at_0.ceiling


@each
def test_each_coefficient_of_the_growth_is_at_most_that_of_the_exponential(network: Callable[[object], Bound]) -> None:
    # the rules are arithmetic only, so a polynomial in t passes through them as a number does
    growth = network(Polynomial([0.0, 1.0])).growth
    ceiling = network(0.0).ceiling
    assert growth.coef[0] == pytest.approx(1.0)
    assert growth.coef[1] == pytest.approx(network(0.0).depth)
    assert (growth.coef >= 0).all()
    for power, coefficient in enumerate(growth.coef):
        assert coefficient <= ceiling**power / math.factorial(power) * (1 + 1e-12)


@each
def test_the_growth_is_at_most_the_exponential_of_the_ceiling_depth(network: Callable[[object], Bound]) -> None:
    for t in (1e-6, 1e-3, 0.1, 0.5, 1.0, 3.0):
        assert network(t).growth <= math.exp(network(t).ceiling * t) * (1 + 1e-12)


@pytest.mark.parametrize("network", LINEAR.values(), ids=LINEAR)
def test_without_curvature_the_error_is_the_growth_beyond_its_tangent(network: Callable[[object], Bound]) -> None:
    for t in (0.01, 0.3, 2.0):
        bound = network(t)
        assert bound.error == pytest.approx(bound.growth - 1 - bound.depth * t)


def test_curvature_adds_to_the_error_beyond_the_tangent() -> None:
    def network(t: float) -> Bound:
        return algebra.bond(chain(2)(t), 1.0, 2.0, curvature=0.25)

    bound = network(0.1)
    moved = 2 * (bound.growth - 1)
    assert bound.error == pytest.approx(bound.growth - 1 - bound.depth * 0.1 + 0.25 * moved**2 / 2)


@each
def test_a_tensor_of_steps_gives_what_each_number_gives(network: Callable[[object], Bound]) -> None:
    steps = torch.tensor([0.0, 1e-3, 0.2, 1.0, 5.0], dtype=torch.float64)
    together = network(steps)
    for index, t in enumerate(steps.tolist()):
        apart = network(t)
        assert together.growth[index].item() == pytest.approx(apart.growth, rel=1e-13)
        if apart.error is None:
            assert together.error is None
        else:
            assert together.error[index].item() == pytest.approx(apart.error, rel=1e-12, abs=1e-15)


def test_tracked_sizes_may_be_tensors() -> None:
    size = torch.tensor(2.0, dtype=torch.float64)
    bound = ball(algebra.bias(algebra.atom(algebra.source(), size, 0.1, 1.0), size, 0.1, 1.0))
    plain = ball(algebra.bias(algebra.atom(algebra.source(), 2.0, 0.1, 1.0), 2.0, 0.1, 1.0))
    for name in ("magnitude", "growth", "depth", "ceiling"):
        assert float(getattr(bound, name)) == pytest.approx(getattr(plain, name))


# -- the theorems by name ----------------------------------------------------------------------------------------------------


def test_a_chain_has_deep_relative_trust() -> None:
    steps = [0.1, 0.02, 0.5, 0.0]
    x = algebra.source(0.3)
    for step in steps:
        x = algebra.atom(x, 1.7, step, 1.0)
    assert x.growth == pytest.approx(math.prod(1 + step for step in steps))
    assert x.magnitude == pytest.approx(0.3 * 1.7**4)
    assert x.depth == x.ceiling == 4


@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 64])
def test_a_convex_residual_stack_has_the_depth_of_one_block(blocks: int) -> None:
    bound = residual(blocks)(0.3)
    assert bound.magnitude == pytest.approx(1)
    assert bound.depth == pytest.approx(2)
    assert bound.ceiling == 2 * blocks
    # (1 + ((1+t)² − 1)/B)^B rises with B towards this limit and never passes it
    assert 1.3**2 <= bound.growth * (1 + 1e-12) <= math.exp(1.3**2 - 1)


@pytest.mark.parametrize("blocks", [1, 2, 8, 64])
def test_a_stack_of_x_plus_a_share_is_at_most_one_block_deep_but_its_magnitude_tends_to_e(blocks: int) -> None:
    bound = residual(blocks, convex=False)(0.3)
    assert bound.magnitude == pytest.approx((1 + 1 / blocks) ** blocks)
    assert bound.magnitude <= math.e
    assert bound.depth <= 2


# -- grades ----------------------------------------------------------------------------------------------------------------


def test_the_grade_of_a_composition_is_the_worst_of_its_parts() -> None:
    proved = Constant(1.0, Grade.PROVED, "proof")
    typical = Constant(0.5, Grade.TYPICAL, "mean field")
    assumed = Constant(0.5, Grade.ASSUMED, "hope")
    x, y = X.graded(proved, "a"), X.graded(typical, "b")
    assert x.grade == Grade.PROVED
    assert y.grade == Grade.TYPICAL
    assert y.graded(assumed, "c").grade == Grade.ASSUMED
    assert y.graded(assumed, "c").graded(proved, "d").grade == Grade.ASSUMED
    assert algebra.total([x, y]).grade == Grade.TYPICAL
    assert algebra.product(y, x, 1.0).grade == Grade.TYPICAL
    assert algebra.atom(algebra.bond(y, 1.0, 2.0), 1.0, 0.1, 1.0).grade == Grade.TYPICAL
    assert algebra.bias(y, 1.0, 0.1, 1.0).grade == Grade.TYPICAL


def test_what_is_not_proved_is_named_once_with_value_grade_and_source() -> None:
    typical = Constant(0.5, Grade.TYPICAL, "mean field")
    x = X.graded(typical, "slope of f")
    assert x.assumptions == ("slope of f: 0.5, typical (mean field)",)
    assert x.graded(typical, "slope of f").assumptions == x.assumptions
    assert x.graded(Constant(1.0, Grade.PROVED, "proof"), "slope of g").assumptions == x.assumptions
    y = X.assuming("floor").assuming("floor")
    assert y.assumptions == ("floor",)
    assert y.grade == Grade.ASSUMED
    assert X.assuming("luck", Grade.TYPICAL).grade == Grade.TYPICAL
    assert algebra.total([x, y, x]).assumptions == (*x.assumptions, "floor")


def test_an_exact_gain_is_proved_in_both_readings_and_another_in_one() -> None:
    exact = Gain.exact(2.0, "proof", witness="x")
    assert exact.proved == exact.typical == Constant(2.0, Grade.PROVED, "proof", "x")
    pair = Gain.of(2.0, 1.0, "proof", "x", "mean field")
    assert pair.proved == Constant(2.0, Grade.PROVED, "proof", "x")
    assert pair.typical == Constant(1.0, Grade.TYPICAL, "mean field")
    assert [str(grade) for grade in sorted(Grade)] == ["assumed", "typical", "proved"]


# -- minimum and maximum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "y"), [(1.0, 2.0), (2.0, 1.0), (3.0, 3.0), (1e-20, 1.0), (1e20, 1.0), (-1.0, 0.5)])
def test_larger_and_smaller_are_exact_for_floats_and_for_tensors(x: float, y: float) -> None:
    tensor = torch.tensor([x, x], dtype=torch.float64)
    assert (algebra.larger(x, y), algebra.smaller(x, y)) == (max(x, y), min(x, y))
    assert algebra.larger(tensor, y).tolist() == algebra.larger(y, tensor).tolist() == [max(x, y)] * 2
    assert algebra.smaller(tensor, y).tolist() == algebra.smaller(y, tensor).tolist() == [min(x, y)] * 2


def test_larger_does_not_hide_nan() -> None:
    nan = torch.tensor(math.nan)
    for result in (algebra.larger(nan, 1.0), algebra.smaller(nan, 1.0), algebra.larger(1.0, nan)):
        assert result.isnan()


def test_the_algebra_imports_no_tensor_library() -> None:
    source = Path(algebra.__file__).read_text(encoding="utf-8")
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    # the errors import nothing themselves
    assert imported <= {"collections.abc", "dataclasses", "enum", "typing", "modula_agd.error"}


def test_a_bound_prints_one_fact_a_line() -> None:
    lines = str(X.assuming("inputs are small")).splitlines()
    assert [line[:20].strip() for line in lines] == [
        "depth D",
        "ceiling depth D̄",
        "output magnitude a",
        "grade",
        "rests on",
    ]
    assert [line[20:].strip() for line in lines] == ["3", "4", "2", "assumed", "inputs are small"]
