"""Rotary and learned positions: what turns, what is looked up, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import modula_agd
from modula_agd import (
    Embedding,
    Features,
    Heads,
    Identity,
    InvalidArgument,
    Linear,
    Module,
    Positions,
    Rotary,
    Sequence,
    Space,
    SpaceMismatch,
    Tokens,
)
from support import central, gaussian

F64 = {"dtype": torch.float64}


# -- rotary ----------------------------------------------------------------------------------------------------------------


def turned(x: Tensor, base: float) -> Tensor:
    """By complex numbers: (x_j + i·x_{j + d/2})·exp(i·t·base^(−2j/d))."""
    half = x.shape[-1] // 2
    speeds = torch.tensor([base ** (-2 * j / x.shape[-1]) for j in range(half)], **F64)
    angles = torch.arange(x.shape[-2], **F64)[:, None] * speeds
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("base", [10000.0, 100, 2.5])
@pytest.mark.parametrize("width", [2, 6])
def test_pairs_of_features_turn_at_their_speeds(width: int, base: float) -> None:
    x = gaussian(3, 2, 7, width)
    torch.testing.assert_close(Rotary(base).bind(Heads(2, width))({}, x), turned(x, base))


def test_scores_depend_on_the_distance_of_positions_alone() -> None:
    query, key = gaussian(8), gaussian(8, seed=1)
    rotary = Rotary().bind(Heads(1, 8))
    q, k = (rotary({}, x.expand(1, 1, 12, 8))[0, 0] for x in (query, key))
    scores = q @ k.mT
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert float((scores[0] - scores[0, 0]).abs().amax()) > 0.1


def test_no_norm_changes() -> None:
    x, space = gaussian(3, 2, 40, 6), Heads(2, 6)
    after = Rotary().bind(space)({}, x)
    torch.testing.assert_close(after.square().sum(-1), x.square().sum(-1))
    torch.testing.assert_close(space.norm(after), space.norm(x))
    bound = (Rotary() @ Linear(space, Sequence(4))).bound(0.1)
    assert (bound.magnitude, bound.growth, bound.error) == (1, pytest.approx(1.1), 0)


def test_it_is_linear_and_its_gradient_turns_back() -> None:
    rotary = Rotary().bind(Heads(1, 4))
    x, y = gaussian(1, 1, 5, 4), gaussian(1, 1, 5, 4, seed=1)
    torch.testing.assert_close(rotary({}, 2 * x - y), 2 * rotary({}, x) - rotary({}, y))
    back = torch.func.grad(lambda z: (rotary({}, z) * rotary({}, y)).sum())(x)
    torch.testing.assert_close(back, y)


def test_distant_positions_stay_apart_in_half_precision() -> None:
    x = torch.ones(1, 1, 4096, 2)
    exact = Rotary().bind(Heads(1, 2))({}, x.double())
    half = Rotary().bind(Heads(1, 2))({}, x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert float((half.double() - exact).abs().amax()) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("base", [1, 0, -3.0, True, None, "10000", float("nan"), float("inf")])
def test_a_base_is_a_finite_number_above_1(base: Any) -> None:
    with pytest.raises(InvalidArgument, match="above 1"):
        Rotary(base)


@pytest.mark.parametrize("space", [Heads(2, 3), Sequence(4), Features(4)])
def test_only_pairs_of_features_of_heads_can_turn(space: Space) -> None:
    with pytest.raises(SpaceMismatch, match="even"):
        Rotary().bind(space)


# -- learned ---------------------------------------------------------------------------------------------------------------


def test_learned_positions_are_rows_of_a_table_whatever_comes_in() -> None:
    table = gaussian(5, 3)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    for layer, x in ((Positions(3, 5).bind(Tokens(9)), ids), (Positions(3, 5).bind(Sequence(2)), gaussian(2, 4, 2))):
        assert torch.equal(layer({"weight": table}, x), table[:4].expand(2, 4, 3))
        assert torch.equal(layer({"weight": table}, x[0]), table[:4])
        assert layer.codomain == Sequence(3)


@pytest.mark.parametrize("inner", [Embedding(3, 9), Identity().bind(Sequence(3))], ids=repr)
def test_they_average_with_what_they_are_the_positions_of(inner: Module) -> None:
    net = 0.5 * inner + 0.5 * Positions(3, 5)
    assert net.codomain == Sequence(3)
    bound = net.bound(0.2)
    rest = 1.2 if isinstance(inner, Embedding) else 1.0
    assert (bound.magnitude, bound.growth) == (pytest.approx(1), pytest.approx((rest + 1.2) / 2))
    weight = net.init(0, **F64)["1.weight"]
    torch.testing.assert_close(weight.square().mean(1), torch.ones(5, **F64))


def test_the_gradient_of_a_row_sums_over_the_batch_and_rows_never_reached_have_none() -> None:
    layer, aim = Positions(3, 5).bind(Sequence(2)), gaussian(4, 3, 3)
    table, along, x = gaussian(5, 3), gaussian(5, 3, seed=1), gaussian(4, 3, 2)

    def value(weight: Tensor) -> Tensor:
        return (layer({"weight": weight}, x) * aim).sum()

    slope = torch.func.grad(value)(table)
    torch.testing.assert_close(slope, torch.cat([aim.sum(0), torch.zeros(2, 3, **F64)]))
    assert float((slope * along).sum()) == pytest.approx(central(value, table, along), rel=1e-7)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, None, "2"])
def test_width_and_length_are_positive_integers(wrong: Any) -> None:
    for build in (lambda: Positions(wrong, 5), lambda: Positions(3, wrong)):
        with pytest.raises(InvalidArgument, match="integer of at least 1"):
            build()


@pytest.mark.parametrize("space", [Features(3), Heads(1, 3)])
def test_positions_of_what_has_no_time_are_refused(space: Space) -> None:
    with pytest.raises(SpaceMismatch, match="Tokens or a Sequence"):
        Positions(3, 5).bind(space)
    with pytest.raises(SpaceMismatch, match=r"Tokens\(9\)"):
        Positions(3, 5).bind(Tokens(9)).bind(Tokens(8))


def test_a_sequence_longer_than_the_table_is_an_error_that_says_so() -> None:
    net = 0.5 * Embedding(3, 9) + 0.5 * Positions(3, 5)
    with pytest.raises(InvalidArgument, match="sequence of 6, but has 5 positions"):
        net(net.init(0), torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(SpaceMismatch, match="no positions"):
        net(net.init(0), torch.tensor(3))


@pytest.mark.parametrize("module", [Rotary(), Rotary(100), Positions(3, 5)])
def test_a_repr_is_the_expression_that_builds_it(module: Module) -> None:
    assert eval(repr(module), dict(vars(modula_agd))) == module


def test_turning_is_what_a_full_circle_undoes() -> None:
    # at d = 2 the one speed is 1: position t has turned by t radians
    x = torch.tensor([1.0, 0.0], **F64).expand(1, 1, 4, 2)
    out = Rotary().bind(Heads(1, 2))({}, x)[0, 0]
    expected = [[math.cos(t), math.sin(t)] for t in range(4)]
    torch.testing.assert_close(out, torch.tensor(expected, **F64))
