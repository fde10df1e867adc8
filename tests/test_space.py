"""Norms of activations by loops, dual norms by Hölder's inequality, and what a space refuses."""

import math

import pytest
import torch
from torch import Tensor

from modula_agd import (
    Features,
    Image,
    InvalidArgument,
    Logits,
    ModulaError,
    Sequence,
    Space,
    SpaceMismatch,
    Tokens,
    Volume,
)
from modula_agd.space import Tuple, per_dimension
from support import gaussian, tolerance

CASES: dict[str, tuple[Space, tuple[int, ...]]] = {
    "Features": (Features(5), (3, 5)),
    "Features of one": (Features(1), (3, 1)),
    "Sequence": (Sequence(4), (3, 6, 4)),
    "Image": (Image(4), (3, 4, 2, 5)),
    "Volume": (Volume(4), (3, 4, 2, 5, 3)),
    "Logits": (Logits(5), (3, 5)),
    "Logits over time": (Logits(4), (3, 6, 4)),
}
each = pytest.mark.parametrize(("space", "shape"), CASES.values(), ids=CASES)


def rms(values: Tensor) -> float:
    return math.sqrt(sum(value.item() ** 2 for value in values) / len(values))


def norm_by_loop(space: Space, sample: Tensor) -> float:
    match space:
        case Features():
            return rms(sample)
        case Sequence():
            return max(rms(sample[time]) for time in range(sample.shape[0]))
        case Image():
            return max(rms(sample[:, i, j]) for i in range(sample.shape[1]) for j in range(sample.shape[2]))
        case Volume():
            return max(rms(voxel) for voxel in sample.flatten(1).unbind(1))
        case _:
            return max(abs(value.item()) for value in sample.flatten())


def maximiser(space: Space, gradient: Tensor) -> Tensor:
    """x of norm 1 at every position with ⟨gradient, x⟩ largest: gradient/RMS, or signs in the max norm."""
    if space.max_norm:
        return gradient.sign()
    dim = 1 if isinstance(space, Image | Volume) else -1
    return gradient / gradient.square().mean(dim, keepdim=True).sqrt()


def pairings(gradient: Tensor, x: Tensor) -> Tensor:
    return (gradient * x).flatten(1).sum(1)


@each
def test_the_norm_is_that_of_a_loop_over_positions(space: Space, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    expected = [norm_by_loop(space, sample) for sample in x]
    assert space.norm(x).tolist() == pytest.approx(expected, rel=tolerance(torch.float64, x.numel()))


@each
def test_the_dual_norm_is_never_exceeded(space: Space, shape: tuple[int, ...]) -> None:
    gradient = gaussian(*shape)
    for seed in range(1, 50):
        # even seeds stay near the maximiser, where a dual norm that is too small would be exceeded first
        x = gaussian(*shape, seed=seed) if seed % 2 else maximiser(space, gradient) + 0.05 * gaussian(*shape, seed=seed)
        excess = pairings(gradient, x) / (space.dual(gradient) * space.norm(x))
        assert excess.max().item() <= 1 + tolerance(torch.float64, x.numel())


@each
def test_the_dual_norm_is_attained(space: Space, shape: tuple[int, ...]) -> None:
    gradient = gaussian(*shape)
    x = maximiser(space, gradient)
    slack = tolerance(torch.float64, x.numel())
    assert space.norm(x).tolist() == pytest.approx([1.0] * 3, rel=slack)
    assert pairings(gradient, x).tolist() == pytest.approx(space.dual(gradient).tolist(), rel=slack)


def test_a_tuple_takes_the_largest_norm_and_adds_the_dual_norms() -> None:
    space = Tuple((Features(2), Logits(2)))
    pair = (torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -2.0]]))
    assert space.norm(pair).item() == pytest.approx(5 / math.sqrt(2))
    assert space.dual(pair).item() == pytest.approx(5 * math.sqrt(2) + 3)
    assert space.width == 4
    assert str(space) == "(Features(2), Logits(2))"
    assert repr(space) == "Tuple((Features(2), Logits(2)))"


def test_tokens_have_norm_1_and_no_dual_norm() -> None:
    ids = torch.tensor([[3, 1], [0, 0]])
    assert Tokens(4).norm(ids).tolist() == [1.0, 1.0]
    with pytest.raises(SpaceMismatch, match="integer ids have none"):
        Tokens(4).dual(ids)


@each
def test_a_batch_and_a_single_sample_of_the_right_shape_fit(space: Space, shape: tuple[int, ...]) -> None:
    space.check(gaussian(*shape), "a network")
    space.check(gaussian(*shape)[0], "a network under vmap")


@each
def test_a_wrong_width_is_an_error_that_names_taker_space_and_shape(space: Space, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    wider = torch.cat([x, x], dim=1 if isinstance(space, Image | Volume) else -1)
    with pytest.raises(SpaceMismatch) as caught:
        space.check(wider, "the taker")
    for part in ("the taker", str(space), space.shape, str(tuple(wider.shape)), "Reshape"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("space", "x"),
    [
        (Features(4), torch.zeros(2, 3, 4)),
        (Sequence(4), torch.zeros(4)),
        (Image(4), torch.zeros(2, 4)),
        (Image(4), torch.zeros(2, 4, 3, 3, 3)),
        (Volume(4), torch.zeros(4, 3, 3)),
        (Volume(4), torch.zeros(1, 2, 4, 3, 3, 3)),
        (Logits(4), torch.zeros(1, 2, 3, 4)),
        (Tokens(4), torch.zeros(2, 3)),
        (Tokens(4), torch.zeros(2, 3, dtype=torch.bool)),
        (Tokens(4), torch.zeros(2, 3, 4, dtype=torch.int64)),
        (Tuple((Features(4), Features(4))), torch.zeros(2, 4)),
        (Tuple((Features(4), Features(4))), (torch.zeros(2, 4), torch.zeros(2, 3))),
        (Tuple((Features(4), Features(4))), (torch.zeros(2, 4),)),
        (Features(4), (torch.zeros(2, 4),)),
        (Tuple((Features(4), Features(4))), (torch.zeros(2, 4), (torch.zeros(2, 4),))),
        (Features(4), [[0.0] * 4]),
        (Features(4), None),
    ],
)
def test_what_is_not_of_the_space_is_refused(space: Space, x: object) -> None:
    with pytest.raises(SpaceMismatch, match="takes"):
        space.check(x, "a network")  # pyright: ignore[reportArgumentType]


def test_tokens_take_every_integer_dtype() -> None:
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        Tokens(4).check(torch.zeros(2, 3, dtype=dtype), "a network")


def test_spaces_fit_when_kind_and_width_are_equal() -> None:
    assert Features(3) == Features(3)
    assert Features(3) != Features(4)
    assert Features(3) != Logits(3)
    assert len({Features(3), Features(3), Sequence(3), Image(3), Volume(3), Logits(3), Tokens(3)}) == 6


@pytest.mark.parametrize("kind", [Features, Sequence, Image, Volume, Logits, Tokens])
@pytest.mark.parametrize("size", [0, -1, 2.0, True, "3"])
def test_a_width_must_be_a_positive_integer(kind: type[Features], size: object) -> None:
    with pytest.raises(InvalidArgument, match=f"features of {kind.__name__} must be an integer of at least 1"):
        kind(size)  # pyright: ignore[reportArgumentType]


def test_the_library_errors_are_also_the_usual_python_ones() -> None:
    assert issubclass(SpaceMismatch, TypeError)
    assert issubclass(InvalidArgument, ValueError)
    assert issubclass(SpaceMismatch, ModulaError)
    assert issubclass(InvalidArgument, ModulaError)


@pytest.mark.parametrize(
    ("value", "dims", "least"), [(0, 2, 1), (-1, 2, 0), ((1,), 2, 1), ((1, 2.0), 2, 1), (True, 1, 0)]
)
def test_numbers_per_dimension_are_checked(value: object, dims: int, least: int) -> None:
    with pytest.raises(InvalidArgument, match=f"the stride of a layer must be an integer of at least {least}"):
        per_dimension("the stride of a layer", value, dims, least)


def test_one_number_stands_for_every_dimension() -> None:
    assert per_dimension("a stride", 2, 3) == (2, 2, 2)
    assert per_dimension("a stride", (1, 2), 2) == (1, 2)
    assert per_dimension("a padding", 0, 1, least=0) == (0,)
