"""Dropout: its share, its scale, its generator, and its absence in evaluation."""

import math
from typing import Any

import pytest
import torch

import modula_agd
from modula_agd import (
    CrossEntropy,
    Dropout,
    Embedding,
    Features,
    Grade,
    Identity,
    InvalidArgument,
    Linear,
    Logits,
    Mask,
    Module,
    ReLU,
    Sequence,
    Space,
    SpaceMismatch,
    SquareLoss,
    Tokens,
    WithDropout,
    agd,
)
from modula_agd.space import Tuple
from support import central, gaussian, seeded, trained

F64 = {"dtype": torch.float64}
NETWORK = Linear(3, 8) @ Dropout(0.5) @ ReLU() @ Linear(8, 4)


def dropped(p: float, *shape: int, seed: int = 0) -> torch.Tensor:
    return Dropout(p).run({}, torch.ones(shape, **F64), generator=seeded(seed))[0]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_p_is_zero_and_the_rest_is_divided_by_what_is_kept(p: float) -> None:
    out = dropped(p, 400, 500)
    kept = out > 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)))
    # five standard deviations of a binomial share of 200,000
    assert float((~kept).double().mean()) == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 200_000))
    assert float(out.mean()) == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / 200_000))
    # entries of one sample, and samples, are dropped independently
    assert float(kept.double().mean(1).std()) == pytest.approx(math.sqrt(p * (1 - p) / 500), rel=0.2)


def test_equal_generators_give_equal_masks_and_one_generator_moves_on() -> None:
    assert torch.equal(dropped(0.5, 9, 9), dropped(0.5, 9, 9))
    assert not torch.equal(dropped(0.5, 9, 9), dropped(0.5, 9, 9, seed=1))
    generator, x = seeded(), torch.ones(9, 9)
    first, second = (Dropout(0.5).run({}, x, generator=generator)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    dropped(0.5, 9, 9)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_dropped_in_evaluation_or_with_probability_0() -> None:
    x, params = gaussian(5, 4), NETWORK.init(0, **F64)
    assert torch.equal(
        NETWORK(params, x),
        (Linear(3, 8) @ ReLU() @ ReLU() @ Linear(8, 4))(
            {"0.weight": params["0.weight"], "3.weight": params["3.weight"]}, x
        ),
    )
    assert Dropout(0).run({}, x)[0] is x
    assert Dropout(0.0).bind(Features(4)).gain.proved.value == 1


def test_the_torch_face_drops_in_training_alone_and_by_its_own_generator() -> None:
    model, x = NETWORK.to_torch(0), torch.ones(6, 4)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    model.generator = seeded()
    first = model(x)
    model.generator = seeded()
    assert torch.equal(model(x), first)
    model.generator = None
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    assert not torch.equal(model(x), first)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_its_constants_are_those_of_what_is_kept(p: float) -> None:
    gain = Dropout(p).gain
    assert (gain.proved.value, gain.proved.grade) == (pytest.approx(1 / (1 - p)), Grade.PROVED)
    assert (gain.typical.value, gain.typical.grade) == (pytest.approx(1 / math.sqrt(1 - p)), Grade.TYPICAL)
    # the typical one is the RMS that unit inputs come out with
    assert float(dropped(p, 400, 500).square().mean().sqrt()) == pytest.approx(gain.typical.value, rel=0.02)
    bound = (Dropout(p) @ Linear(4, 4)).bound(0.1, constants="proved")
    assert (bound.growth, bound.error) == (pytest.approx(1.1), 0)


def test_gradients_pass_through_the_same_mask() -> None:
    x, weight, along = gaussian(5, 4), gaussian(3, 4), gaussian(3, 4, seed=1)
    net = Dropout(0.5) @ Linear(3, 4)

    def value(w: torch.Tensor) -> torch.Tensor:
        return net.run({"0.weight": w}, x, generator=seeded())[0].square().sum()

    slope = torch.func.grad(value)(weight)
    assert float((slope * along).sum()) == pytest.approx(central(value, weight, along), rel=1e-6)
    assert torch.func.jvp(value, (weight,), (along,))[1].item() == pytest.approx(float((slope * along).sum()))


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.95}])
def test_a_network_with_dropout_learns(options: dict[str, Any]) -> None:
    net = Linear(Logits(3), 32) @ Dropout(0.2) @ ReLU() @ Linear(32, 4)
    before, after = trained(net, CrossEntropy(), gaussian(8, 4), torch.arange(8) % 3, **options)
    assert after < 0.95 * before


@pytest.mark.parametrize("wrong", [1, 1.5, -0.1, True, None, "0.5", float("nan"), [0.5]])
def test_a_probability_is_below_1(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="below 1"):
        Dropout(wrong)


def test_training_without_randomness_is_an_error_that_says_where_to_pass_it() -> None:
    method, params, x = agd(NETWORK, SquareLoss()), NETWORK.init(0), torch.ones(2, 4)
    with pytest.raises(InvalidArgument, match=r"torch\.Generator"):
        method.objective(params, x, torch.zeros(2, 3))
    assert method.objective(params, x, torch.ones(2, 3), seeded()) > 0


@pytest.mark.parametrize("wrong", [0, "seed", torch.tensor(3)])
def test_a_seed_in_the_place_of_a_generator_is_an_error(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="manual_seed"):
        NETWORK.run(NETWORK.init(0), torch.ones(2, 4), generator=wrong)


def test_a_generator_in_the_place_of_the_buffers_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="generator by name"):
        NETWORK.run(NETWORK.init(0), torch.ones(2, 4), seeded())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("space", [Tokens(5), Mask(), Tuple((Features(3), Features(3)))])
def test_what_is_no_number_cannot_be_dropped(space: Space) -> None:
    with pytest.raises(SpaceMismatch):
        Dropout(0.5).bind(space)


def test_it_follows_an_embedding() -> None:
    net = Dropout(0.5) @ Embedding(4, 5)
    assert net.codomain == Sequence(4)
    assert net.run(net.init(0), torch.tensor([[1, 2]]), generator=seeded())[0].shape == (1, 2, 4)


def test_a_module_with_dropout_is_that_and_dropout_by_the_names_of_the_first() -> None:
    inner = ReLU() @ Linear(3, 4)
    both, x = WithDropout(0.36, inner), gaussian(5, 4)
    apart, params = Dropout(0.36) @ inner, inner.init(0, **F64)
    assert both.init(0, **F64).keys() == params.keys()
    assert torch.equal(both(params, x), inner(params, x))
    assert torch.equal(both.run(params, x, generator=seeded())[0], apart.run(params, x, generator=seeded())[0])
    for constants in ("typical", "proved"):
        assert both.bound(0.1, constants=constants) == apart.bound(0.1, constants=constants)
    assert both.with_mass(0.5).bound().depth == pytest.approx(0.5 * both.bound().depth)
    # the domain may be settled later
    assert (WithDropout(0.36, ReLU()) @ Linear(3, 4)).domain == Features(4)
    with pytest.raises(InvalidArgument, match=r"Dropout\(0\.36\) was trained without"):
        both.run(params, x)


@pytest.mark.parametrize("inner", [Linear(3, 4), ReLU()])
@pytest.mark.parametrize("wrong", [1, -0.1, None, float("nan")])
def test_a_module_with_dropout_keeps_some(inner: Module, wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="below 1"):
        WithDropout(wrong, inner)


def test_a_module_of_no_numbers_cannot_have_dropout() -> None:
    with pytest.raises(SpaceMismatch, match="drops numbers"):
        WithDropout(0.1, Identity().bind(Mask()))


@pytest.mark.parametrize("module", [Dropout(0.5), Dropout(0), WithDropout(0.5, ReLU() @ Linear(3, 4))])
def test_a_repr_is_the_expression_that_builds_it(module: Module) -> None:
    assert eval(repr(module), dict(vars(modula_agd))) == module
