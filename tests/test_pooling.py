"""Pooling against ``torch.nn``, constants attained by their witnesses, and what each layer refuses."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import modula_agd
from modula_agd import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    Bond,
    Conv2d,
    Conv3d,
    Features,
    Flatten,
    Grade,
    Image,
    InvalidArgument,
    Linear,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    Sequence,
    Space,
    SpaceMismatch,
    UnknownBound,
    Volume,
)
from support import gaussian, tolerance

SPACES: dict[str, tuple[Space, tuple[int, ...]]] = {
    "1d": (Sequence(3), (2, 7, 3)),
    "2d": (Image(3), (2, 3, 6, 7)),
    "3d": (Volume(3), (2, 3, 4, 6, 5)),
}
AVERAGES: list[Bond] = [
    AvgPool1d(2),
    AvgPool1d(3, stride=1, padding=1),
    AvgPool2d(2),
    AvgPool2d(3, stride=1, padding=1),
    AvgPool2d((2, 3), stride=(2, 1), padding=(0, 1)),
    AvgPool3d(2),
    AvgPool3d((1, 2, 3), stride=1, padding=(0, 1, 1)),
    AdaptiveAvgPool2d(1, 1),
    AdaptiveAvgPool2d(4, 3),
]
MAXIMA: list[Bond] = [
    MaxPool1d(2),
    MaxPool1d(3, stride=2, padding=1),
    MaxPool2d(2),
    MaxPool2d(3, stride=2, padding=1),
    MaxPool2d((2, 3), stride=(2, 1), padding=(0, 1)),
    MaxPool3d(2),
    MaxPool3d((1, 2, 3), stride=1, padding=(0, 1, 1)),
    AdaptiveMaxPool2d(1, 1),
    AdaptiveMaxPool2d(4, 3),
]
every = pytest.mark.parametrize("pool", AVERAGES + MAXIMA, ids=repr)


def case(pool: Bond) -> tuple[Space, tuple[int, ...]]:
    return SPACES[type(pool).__name__[-2:]]


def reference(pool) -> nn.Module:
    kind = getattr(nn, type(pool).__name__)
    if isinstance(pool, AdaptiveAvgPool2d | AdaptiveMaxPool2d):
        return kind((pool.height, pool.width))
    return kind(pool.kernel, pool.stride, pool.padding)


@every
def test_forward_is_that_of_torch(pool: Bond) -> None:
    space, shape = case(pool)
    x = gaussian(*shape)
    settled, module = pool.bind(space), reference(pool)
    expected = module(x.mT).mT if isinstance(space, Sequence) else module(x)
    out = settled({}, x)
    assert torch.equal(out, expected)
    assert settled.codomain == space
    assert space.fits(out)
    torch.testing.assert_close(settled({}, x[0]), out[0])


@every
def test_a_repr_is_the_expression_that_builds_it(pool: Bond) -> None:
    assert eval(repr(pool), dict(vars(modula_agd))) == pool


@pytest.mark.parametrize("pool", [AvgPool2d(2, stride=2), MaxPool2d(2, 2, 1), MaxPool2d((2, 2), padding=(1, 0))])
def test_a_repr_leaves_nothing_out(pool: Bond) -> None:
    assert eval(repr(pool), dict(vars(modula_agd))) == pool


@every
def test_its_own_kind_of_space_alone_is_pooled(pool: Bond) -> None:
    space, _ = case(pool)
    for other in (Features(3), *(other for other, _ in SPACES.values() if other != space)):
        with pytest.raises(SpaceMismatch, match=rf"pools the positions of {type(space).__name__}\(c\)"):
            pool.bind(other)


# -- averages --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", AVERAGES, ids=repr)
def test_an_average_is_linear_never_enlarges_the_norm_and_keeps_that_of_a_constant(pool: Bond) -> None:
    space, shape = case(pool)
    settled = pool.bind(space)
    for seed in range(10):
        x, y = gaussian(*shape, seed=seed), gaussian(*shape, seed=seed + 50)
        ratio = space.norm(settled({}, x)) / space.norm(x)
        assert ratio.max().item() <= 1 + tolerance(torch.float64, x.numel())
        torch.testing.assert_close(settled({}, x - 2 * y), settled({}, x) - 2 * settled({}, y))
    constant = torch.ones(shape, dtype=torch.float64)
    assert space.norm(settled({}, constant)).tolist() == pytest.approx([1.0] * 2)
    assert settled.curvature == 0  # pyright: ignore[reportAttributeAccessIssue]
    assert settled.gain.typical.grade == Grade.PROVED  # pyright: ignore[reportAttributeAccessIssue]


def test_averages_pass_every_bound_on() -> None:
    bound = (AdaptiveAvgPool2d(1, 1) @ AvgPool2d(2) @ Conv2d(3, 2, 1)).bound(0.1)
    assert (bound.magnitude, bound.growth, bound.error) == (pytest.approx(1.0), pytest.approx(1.1), 0)
    bound = (AvgPool3d(2) @ Conv3d(3, 2, 1)).bound(0.1)
    assert (bound.magnitude, bound.growth, bound.error) == (pytest.approx(1.0), pytest.approx(1.1), 0)


def test_adaptive_pooling_makes_images_of_every_size_fit_a_linear_layer() -> None:
    network = Linear(2, 12) @ Flatten(2, 2) @ AdaptiveAvgPool2d(2, 2) @ Conv2d(3, 1, 3, padding=1)
    for side in (2, 5, 8):
        assert network(network.init(0), torch.ones(4, 1, side, side)).shape == (4, 2)


# -- maxima ----------------------------------------------------------------------------------------------------------------


def scattered(channels: int, shape: tuple[int, ...]) -> Tensor:
    """[1, channels, *shape] with each position nonzero in channels of its own, until either runs out."""
    positions = math.prod(shape)
    count = min(positions, channels)
    x = torch.zeros(channels, positions, dtype=torch.float64)
    share = channels // count
    for index in range(count):
        x[index * share : (index + 1) * share, index] = 1
    return x.reshape(1, channels, *shape)


@pytest.mark.parametrize(
    ("pool", "space"),
    [
        *((MaxPool2d(2), Image(channels)) for channels in (1, 2, 4, 8)),
        *((MaxPool2d(3), Image(channels)) for channels in (4, 9, 18)),
        (MaxPool2d(1), Image(3)),
        (MaxPool2d((1, 3)), Image(6)),
        (MaxPool1d(3), Sequence(2)),
        (MaxPool1d(3), Sequence(6)),
        (MaxPool3d(2), Volume(5)),
        (MaxPool3d((2, 1, 3)), Volume(6)),
    ],
)
def test_max_pooling_attains_the_square_root_of_window_or_channels(pool: Bond, space: Space) -> None:
    settled, sides = pool.bind(space), pool.sides  # pyright: ignore[reportAttributeAccessIssue]
    x = scattered(space.width, sides)
    x = x.mT if isinstance(space, Sequence) else x
    count = min(math.prod(sides), space.width)
    assert (space.norm(settled({}, x)) / space.norm(x)).item() == pytest.approx(math.sqrt(count))
    assert settled.gain.proved.value == pytest.approx(math.sqrt(count))  # pyright: ignore[reportAttributeAccessIssue]
    assert settled.gain.typical.value == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("channels", [1, 3, 9])
def test_adaptive_max_pooling_attains_the_square_root_of_the_channels(channels: int) -> None:
    space = Image(channels)
    settled = AdaptiveMaxPool2d(1, 1).bind(space)
    x = scattered(channels, (3, 3))
    assert (space.norm(settled({}, x)) / space.norm(x)).item() == pytest.approx(math.sqrt(channels))
    assert settled.gain.proved.value == pytest.approx(math.sqrt(channels))  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("pool", MAXIMA, ids=repr)
def test_max_pooling_never_moves_further_than_its_constant(pool: Bond) -> None:
    space, shape = case(pool)
    settled = pool.bind(space)
    for seed in range(20):
        x = gaussian(*shape, seed=seed)
        change = gaussian(*shape, seed=seed + 50) * (gaussian(*shape, seed=seed + 70) > 1)
        ratio = space.norm(settled({}, x + change) - settled({}, x)) / space.norm(change)
        assert ratio.max().item() <= settled.gain.proved.value  # pyright: ignore[reportAttributeAccessIssue]


def test_max_pooling_before_its_domain_is_known_takes_the_worst_case() -> None:
    assert MaxPool2d(3).gain.proved.value == 3
    assert MaxPool2d((2, 3)).gain.proved.value == pytest.approx(math.sqrt(6))
    assert MaxPool1d(4).gain.proved.value == 2


def test_adaptive_max_pooling_before_its_domain_is_known_has_no_constant() -> None:
    with pytest.raises(UnknownBound, match=r"AdaptiveMaxPool2d\(1, 1\) is the root of its channels"):
        _ = AdaptiveMaxPool2d(1, 1).gain
    assert (AdaptiveMaxPool2d(1, 1) @ Conv2d(4, 2, 1)).bound(constants="proved").magnitude == 2


@pytest.mark.parametrize("pool", [MaxPool2d(1).bind(Image(4)), MaxPool2d(3).bind(Image(1)), MaxPool1d(1)])
def test_where_one_position_or_channel_is_all_the_constant_is_exact(pool) -> None:
    assert pool.gain.proved.value == 1
    assert pool.gain.typical.grade == Grade.PROVED


# -- mistakes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [AvgPool1d, AvgPool2d, AvgPool3d, MaxPool1d, MaxPool2d, MaxPool3d])
@pytest.mark.parametrize(
    "numbers",
    [
        {"kernel": 0},
        {"kernel": 2.5},
        {"kernel": (1, 2, 3, 4)},
        {"kernel": 2, "stride": 0},
        {"kernel": 2, "stride": "2"},
        {"kernel": 2, "padding": -1},
        {"kernel": 2, "padding": 2},
        {"kernel": 2, "padding": True},
    ],
)
def test_pooling_checks_its_numbers(pool: Callable[..., Bond], numbers) -> None:
    with pytest.raises(InvalidArgument):
        pool(**numbers)


@pytest.mark.parametrize("pool", [AdaptiveAvgPool2d, AdaptiveMaxPool2d])
@pytest.mark.parametrize("numbers", [(0, 1), (1, -1), (1, 2.0), (1, None)])
def test_adaptive_pooling_checks_its_numbers(pool: Callable[..., Bond], numbers) -> None:
    with pytest.raises(InvalidArgument, match=f"of {pool.__name__} must be an integer of at least 1"):  # pyright: ignore
        pool(*numbers)


def test_a_padding_of_more_than_half_the_window_says_so() -> None:
    with pytest.raises(InvalidArgument, match=r"padding=\(0, 2\); it lies between 0 and half the kernel, \(2, 3\)"):
        MaxPool2d((2, 3), padding=(0, 2))
