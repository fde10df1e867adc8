"""Normalisation against torch's own, its three grounds, and the running statistics of a batch norm."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import modula_agd
from modula_agd import (
    BatchNorm,
    Bias,
    Bound,
    Conv2d,
    CrossEntropy,
    Features,
    Grade,
    GroupNorm,
    Heads,
    Image,
    InvalidArgument,
    LayerNorm,
    Linear,
    Logits,
    Mean,
    Module,
    ReLU,
    RMSNorm,
    Scale,
    Sequence,
    Space,
    SpaceMismatch,
    SquareLoss,
    Tokens,
    UnitBall,
    UnknownBound,
    Volume,
    agd,
)
from modula_agd.normalisation import CURVED, Normalisation
from modula_agd.run import Step
from modula_agd.space import Tuple
from support import central, gaussian, trained

F64 = {"dtype": torch.float64}
SPACES: dict[str, tuple[Space, tuple[int, ...]]] = {
    "Features": (Features(6), (5, 6)),
    "Sequence": (Sequence(6), (5, 3, 6)),
    "Image": (Image(6), (5, 6, 2, 3)),
    "Volume": (Volume(6), (5, 6, 2, 3, 2)),
    "Heads": (Heads(2, 6), (5, 2, 3, 6)),
}
LAYERS = [RMSNorm(), LayerNorm(), GroupNorm(2, 6), BatchNorm(30)]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=repr)
each_space = pytest.mark.parametrize(("space", "shape"), list(SPACES.values()), ids=list(SPACES))


IMAGE = Image(6)


def settled(layer: Normalisation, space: Space = IMAGE) -> Any:
    return layer.bind(space)


# -- against torch ---------------------------------------------------------------------------------------------------------


@each_space
def test_rms_and_layer_norm_are_those_of_torch_at_each_position(space: Space, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    last = x.movedim(space.axis, -1)
    for layer, reference in (
        (RMSNorm(), functional.rms_norm(last, (6,), eps=1e-6)),
        (RMSNorm(eps=0.1), functional.rms_norm(last, (6,), eps=0.1)),
        (LayerNorm(), functional.layer_norm(last, (6,), eps=1e-6)),
        (LayerNorm(eps=1e-3), nn.LayerNorm(6, eps=1e-3, elementwise_affine=False)(last)),
    ):
        bound = settled(layer, space)
        torch.testing.assert_close(bound({}, x), reference.movedim(-1, space.axis))
        torch.testing.assert_close(bound({}, x[0]), bound({}, x)[0])


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kind", ["Image", "Volume"])
def test_group_norm_is_that_of_torch(kind: str, groups: int) -> None:
    space, shape = SPACES[kind]
    x, theirs = gaussian(*shape), nn.GroupNorm(groups, 6, eps=1e-6, affine=False)
    ours = GroupNorm(groups).bind(space)
    torch.testing.assert_close(ours({}, x), theirs(x))
    # one image without a batch has its channels in front, where torch takes them for samples
    torch.testing.assert_close(ours({}, x[0]), theirs(x)[0])
    torch.testing.assert_close(torch.func.vmap(lambda y: ours({}, y))(x), theirs(x))


def theirs_of(space: Space) -> Any:
    kind = {Features: nn.BatchNorm1d, Sequence: nn.BatchNorm1d, Image: nn.BatchNorm2d, Volume: nn.BatchNorm3d}[
        type(space)
    ]
    return kind(6, affine=False, **F64)


@pytest.mark.parametrize("kind", ["Features", "Sequence", "Image", "Volume"])
def test_batch_norm_is_that_of_torch_over_several_steps_in_training_and_evaluation(kind: str) -> None:
    space, shape = SPACES[kind]
    ours, theirs = BatchNorm().bind(space), theirs_of(space)
    buffers = ours.buffers(**F64)

    def of_theirs(x: Tensor) -> Tensor:
        # torch has the channels of a sequence in front of its times
        return theirs(x.movedim(-1, 1)).movedim(1, -1) if kind == "Sequence" else theirs(x)

    for step in range(4):
        x = 3 * gaussian(*shape, seed=step) + step
        theirs.train()
        out, buffers = ours.run({}, x, buffers)
        torch.testing.assert_close(out, of_theirs(x))
        torch.testing.assert_close(buffers["running_mean"], theirs.running_mean)
        torch.testing.assert_close(buffers["running_var"], theirs.running_var)
        theirs.eval()
        torch.testing.assert_close(ours({}, x, buffers), of_theirs(x))
        torch.testing.assert_close(ours({}, x[0], buffers), of_theirs(x)[0])


def test_momentum_is_the_share_of_the_new_batch() -> None:
    x = gaussian(7, 6)
    for share in (0, 0.25, 1):
        _, after = BatchNorm(momentum=share).bind(Features(6)).run({}, x)
        torch.testing.assert_close(after["running_mean"], share * x.mean(0))
        torch.testing.assert_close(after["running_var"], (1 - share) + share * x.var(0))


def test_a_constant_channel_has_a_variance_of_0_and_never_less() -> None:
    for value in (0.0, 0.3, 1e3):
        _, after = BatchNorm(momentum=1.0).bind(Features(3)).run({}, torch.full((8, 3), value))
        assert bool((after["running_var"] >= 0).all())
        torch.testing.assert_close(after["running_var"], torch.zeros(3), atol=1e-8, rtol=0)


@each_layer
def test_divisors_are_what_a_layer_divides_by(layer: Normalisation) -> None:
    bound, x = settled(layer), gaussian(5, 6, 2, 3)
    exact = replace(bound, eps=1e-12).run({}, x)[0]
    # the layer's outputs have divisors 1
    torch.testing.assert_close(bound.divisors(exact), torch.ones_like(bound.divisors(exact)), rtol=1e-6, atol=0)
    torch.testing.assert_close(bound.divisors(3 * x), 3 * bound.divisors(x))


@each_layer
def test_gradients_are_those_of_finite_differences(layer: Normalisation) -> None:
    bound, x, along, aim = (
        settled(layer),
        gaussian(5, 6, 2, 3),
        gaussian(5, 6, 2, 3, seed=1),
        gaussian(5, 6, 2, 3, seed=2),
    )

    def value(y: Tensor) -> Tensor:
        return (bound.run({}, y)[0] * aim).sum()

    slope = torch.func.grad(value)(x)
    assert float((slope * along).sum()) == pytest.approx(central(value, x, along), rel=1e-6)
    assert float(torch.func.jvp(value, (x,), (along,))[1]) == pytest.approx(float((slope * along).sum()))
    leaf = x.clone().requires_grad_()
    value(leaf).backward()
    torch.testing.assert_close(leaf.grad, slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_layer
def test_lower_precision_comes_near(layer: Normalisation, dtype: torch.dtype) -> None:
    bound, x = settled(layer), gaussian(5, 6, 2, 3)
    out, buffers = bound.run({}, x.to(dtype))
    assert out.dtype == dtype
    assert all(value.dtype == dtype for value in buffers.values())
    assert float((out.double() - bound.run({}, x)[0]).abs().amax()) < 16 * torch.finfo(dtype).eps


# -- the constant of curvature ---------------------------------------------------------------------------------------------


def test_the_most_curved_point_is_found_by_search() -> None:
    # φ(x) = x/sqrt(‖x‖² + 1) in the plane of x and h: all there is, as φ commutes with rotations
    radius, angle = torch.meshgrid(
        torch.linspace(0, 3, 1501, **F64), torch.linspace(0, math.pi, 181, **F64), indexing="ij"
    )
    x = torch.stack([radius, torch.zeros_like(radius)], -1)
    h = torch.stack([angle.cos(), angle.sin()], -1)

    def turned(time: Tensor) -> Tensor:
        y = x + time * h
        return y / (y.square().sum(-1, keepdim=True) + 1).sqrt()

    def velocity(time: Tensor) -> Tensor:
        return torch.func.jvp(turned, (time,), (torch.ones_like(time),))[1]

    zero = torch.zeros((), **F64)
    curvature = torch.linalg.vector_norm(torch.func.jvp(velocity, (zero,), (torch.ones_like(zero),))[1], dim=-1)
    found = float(curvature.amax())
    assert found <= CURVED <= found * (1 + 1e-4)
    at = int(curvature.flatten().argmax())
    assert float(radius.flatten()[at]) ** 2 == pytest.approx(1 / 4, abs=1e-2)
    assert abs(math.cos(float(angle.flatten()[at]))) == pytest.approx(1)


@pytest.mark.parametrize("layer", [RMSNorm(eps=0.04), LayerNorm(eps=0.04)], ids=repr)
def test_what_linearising_leaves_out_is_within_the_curvature_and_attains_it(layer: Normalisation) -> None:
    space, ratios = Features(4), []
    bound = settled(layer, space)
    sign = torch.tensor([[1.0, -1.0, 1.0, -1.0]], **F64)
    cases = [(0.1 * sign, 1e-3 * sign)]
    cases += [(0.3 * gaussian(1, 4, seed=s), 0.1 * gaussian(1, 4, seed=s + 99)) for s in range(50)]
    for x, change in cases:
        before, linear = torch.func.jvp(lambda y: bound({}, y), (x,), (change,))
        left = space.norm(bound({}, x + change) - before - linear) / space.norm(change).square()
        ratios.append(float(left) / bound.curvature)
    assert ratios[0] > 0.99
    assert max(ratios) <= 1


# -- three grounds ---------------------------------------------------------------------------------------------------------


@each_layer
def test_by_default_inputs_are_typical_and_the_bound_says_so(layer: Normalisation) -> None:
    net = layer @ Conv2d(6, 2, 1)
    bound = (2 * net).bound(0.1, magnitude=7.0)
    assert (bound.magnitude, bound.growth, bound.depth) == (2, pytest.approx(1.1), pytest.approx(1))
    assert bound.grade == Grade.TYPICAL
    assert any(repr(layer) in text and "typical" in text for text in bound.assumptions)
    certificate = agd(Linear(3, 6) @ Mean() @ net, SquareLoss()).certificate()
    assert any(repr(layer) in text for text in certificate.assumptions)


@each_layer
def test_a_floor_is_assumed_and_named(layer: Normalisation) -> None:
    floored = replace(layer, floor=0.5)
    net = floored @ Conv2d(6, 2, 1)
    for constants, spread in (("typical", 1.0), ("proved", settled(layer).spread)):
        bound = net.bound(0.1, magnitude=1.5, constants=constants)
        assert bound.magnitude == pytest.approx(spread)
        # 1 + (a/f)·(γ − 1)
        assert bound.growth == pytest.approx(1 + 1.5 / 0.5 * 0.1)
        assert bound.depth == pytest.approx(3)
        assert bound.grade == Grade.ASSUMED
    certificate = agd(Linear(3, 6) @ Mean() @ net, SquareLoss()).certificate()
    assert certificate.grade == Grade.ASSUMED
    assert any("floor=0.5" in text and "≥ 0.5 before and after" in text for text in certificate.assumptions)


@each_layer
def test_inputs_below_the_floor_leave_outputs_small(layer: Normalisation) -> None:
    bound = (replace(layer, floor=2.0) @ Conv2d(6, 2, 1)).bound(0.1)
    assert (bound.magnitude, bound.growth) == (pytest.approx(0.5), pytest.approx(1.1))


@each_layer
def test_without_assumptions_the_slope_at_zero_is_what_is_proved(layer: Normalisation) -> None:
    net = replace(layer, eps=0.04) @ Conv2d(6, 2, 1)
    bound = net.bound(0.1, magnitude=1.5, constants="proved")
    assert bound.magnitude == pytest.approx(settled(layer).spread)
    assert bound.growth == pytest.approx(1 + 1.5 / 0.2 * 0.1)
    assert (bound.grade, bound.assumptions) == (Grade.PROVED, ())
    small = net.bound(0.1, magnitude=0.01, constants="proved")
    assert small.magnitude == pytest.approx(settled(layer).spread * 0.01 / 0.2)
    assert small.growth == pytest.approx(1.1)


@pytest.mark.parametrize("layer", [RMSNorm(), LayerNorm()], ids=repr)
def test_a_smooth_normalisation_is_bounded_in_the_second_order(layer: Normalisation) -> None:
    start = Bound(1.0, 1.1, 0.02, 0.0, 0.0)
    for given in (settled(layer), settled(replace(layer, floor=0.5))):
        after = given.propagate(start, Step(constants="proved"))
        slope = 1e3 if given.floor is None else 2.0
        assert after.error == pytest.approx(slope * 0.02 + CURVED / (2 * 1e-6) * 0.1**2)
    assert settled(layer).propagate(start, Step()).error is None


@pytest.mark.parametrize(("layer", "name"), [(GroupNorm(2), "positions"), (BatchNorm(), "count")])
def test_proved_constants_need_the_number_that_they_depend_on(layer: Normalisation, name: str) -> None:
    for given in (layer, replace(layer, floor=0.5)):
        net = given @ Conv2d(6, 2, 1)
        assert net.bound().growth == 1
        with pytest.raises(UnknownBound, match=rf"Pass \w+\({name}=\.\.\.\)"):
            net.bound(constants="proved")


def test_what_one_sample_and_one_position_can_concentrate_is_attained() -> None:
    # all deviation in one entry of each channel's n = 30
    x = torch.zeros(5, 6, 2, 3, **F64)
    x[0, :, 0, 0] = 1e6
    assert settled(BatchNorm(30)).spread == pytest.approx(math.sqrt(29))
    assert float(Image(6).norm(settled(BatchNorm(30)).run({}, x)[0]).amax()) == pytest.approx(math.sqrt(29))
    # all square of a group in one of its 6 positions, where its channels have mean 0
    x[0, :, 0, 0] *= torch.tensor([1.0, -1.0, 0.0] * 2, **F64)
    assert settled(GroupNorm(2, 6)).spread == pytest.approx(math.sqrt(6))
    assert float(Image(6).norm(settled(GroupNorm(2, 6)).run({}, x)[0]).amax()) == pytest.approx(math.sqrt(6))


@each_layer
def test_no_step_moves_outputs_further_than_a_true_floor_allows(layer: Normalisation) -> None:
    bound, space, worst = settled(layer), Image(6), 0.0
    for seed in range(60):
        x = gaussian(5, 6, 2, 3, seed=seed)
        change = (
            0.3 * gaussian(5, 6, 2, 3, seed=seed + 500) * (gaussian(5, 6, 2, 3, seed=seed + 900) > (seed % 3) - 0.5)
        )
        after = x + change
        floor = float(torch.minimum(bound.divisors(x).amin(), bound.divisors(after).amin()))
        moved = space.norm(bound.run({}, after)[0] - bound.run({}, x)[0]).amax()
        worst = max(worst, float(moved) * floor / (bound.spread * float(space.norm(change).amax())))
    assert 0.02 < worst <= 1


def test_the_unit_ball_needs_no_assumption() -> None:
    assert (UnitBall() @ Linear(3, 3)).bound(constants="proved").grade == Grade.PROVED


# -- running statistics ----------------------------------------------------------------------------------------------------


NETWORK = Linear(Logits(3), 4) @ Mean() @ ReLU() @ BatchNorm() @ Conv2d(4, 2, 3, padding=1)


def test_buffers_pass_purely() -> None:
    params, x = NETWORK.init(0), gaussian(5, 2, 4, 4, dtype=torch.float32)
    start = NETWORK.buffers()
    assert {name: tuple(value.shape) for name, value in start.items()} == {
        "1.running_mean": (4,),
        "1.running_var": (4,),
    }
    copy = {name: value.clone() for name, value in start.items()}
    first, after = NETWORK.run(params, x, start)
    again, after_again = NETWORK.run(params, x, start)
    assert all(torch.equal(start[name], copy[name]) for name in start)
    assert torch.equal(first, again)
    assert all(
        torch.equal(after[name], after_again[name]) and not torch.equal(after[name], start[name]) for name in start
    )
    assert NETWORK.run(params, x)[1].keys() == start.keys()
    assert all(torch.equal(NETWORK.run(params, x)[1][name], after[name]) for name in start)
    assert not any(value.requires_grad for value in after.values())


def test_statistics_carry_no_gradient_out_of_a_transform() -> None:
    params, x = NETWORK.init(0, **F64), gaussian(5, 2, 4, 4)

    def value(w: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        out, buffers = NETWORK.run(w, x)
        return CrossEntropy()(out, torch.arange(5) % 3), buffers

    grads, (_, buffers) = torch.func.grad_and_value(value, has_aux=True)(params)
    torch.testing.assert_close(buffers, NETWORK.run(params, x)[1])
    along = gaussian(*params["0.weight"].shape, seed=3)
    slope = central(lambda w: value({**params, "0.weight": w})[0], params["0.weight"], along)
    assert float((grads["0.weight"] * along).sum()) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.95}])
@pytest.mark.parametrize("affine", [False, True])
def test_the_objective_trains_a_network_with_batch_norm(affine: bool, options: dict[str, Any]) -> None:
    net = NETWORK
    if affine:
        norm = Bias(Image(4)) @ Scale(Image(4)) @ BatchNorm()
        net = Linear(Logits(3), 4) @ Mean() @ ReLU() @ norm @ Conv2d(4, 2, 3, padding=1)
    before, after = trained(net, CrossEntropy(), gaussian(6, 2, 4, 4), torch.arange(6) % 3, **options)
    assert after < 0.95 * before


def test_a_layer_norm_couples_no_samples_and_a_batch_norm_does() -> None:
    x = gaussian(5, 6)
    other = torch.cat([x[:4], 9 * x[4:]])
    same = [
        torch.equal(settled(layer, Features(6)).run({}, y)[0][0], settled(layer, Features(6)).run({}, x)[0][0])
        for layer in (LayerNorm(), BatchNorm())
        for y in (other,)
    ]
    assert same == [True, False]


# -- what it refuses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm, GroupNorm, BatchNorm])
@pytest.mark.parametrize("wrong", [0, -1.0, True, "1", float("nan"), float("inf"), (1,)])
def test_floor_and_epsilon_are_finite_numbers_above_0(kind: type[Normalisation], wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="floor"):
        kind(floor=wrong)
    with pytest.raises(InvalidArgument, match="eps"):
        kind(eps=wrong)
    with pytest.raises(InvalidArgument, match="eps"):
        kind(eps=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "2", (2,)])
def test_groups_positions_and_counts_are_positive_integers(wrong: Any) -> None:
    for build in (lambda: GroupNorm(wrong), lambda: GroupNorm(2, wrong), lambda: BatchNorm(wrong)):
        with pytest.raises(InvalidArgument, match="integer of at least 1"):
            build()


@pytest.mark.parametrize("wrong", [-0.1, 1.1, True, None, "0.1", float("nan")])
def test_a_momentum_is_a_share(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="between 0 and 1"):
        BatchNorm(momentum=wrong)


def test_one_number_has_no_deviation() -> None:
    with pytest.raises(InvalidArgument, match="count=1"):
        BatchNorm(1)
    with pytest.raises(InvalidArgument, match="larger batches"):
        BatchNorm().bind(Features(3)).run({}, torch.ones(1, 3))
    with pytest.raises(InvalidArgument, match="batch of 0 samples"):
        BatchNorm().bind(Features(3)).run({}, torch.ones(0, 3))


@pytest.mark.parametrize(
    ("layer", "space"),
    [
        (RMSNorm(), Logits(6)),
        (LayerNorm(), Tokens(6)),
        (LayerNorm(), Tuple((Features(6), Features(6)))),
        (GroupNorm(4), Image(6)),
        (GroupNorm(), Features(6)),
        (BatchNorm(), Heads(2, 3)),
        (BatchNorm(), Logits(6)),
    ],
    ids=str,
)
def test_a_space_that_does_not_fit_is_named_with_the_layer(layer: Module, space: Space) -> None:
    with pytest.raises(SpaceMismatch) as caught:
        layer.bind(space)
    assert repr(layer) in str(caught.value)
    assert str(space) in str(caught.value)


def test_evaluating_without_statistics_is_an_error_that_says_where_they_come_from() -> None:
    params, x = NETWORK.init(0), torch.ones(2, 2, 4, 4)
    with pytest.raises(InvalidArgument, match=r"network\.run returned"):
        NETWORK(params, x)
    with pytest.raises(UnknownBound, match="Conv2d"):
        BatchNorm().buffers()


@pytest.mark.parametrize(
    "buffers",
    [
        {"1.running_mean": torch.zeros(4)},
        {"1.running_mean": torch.zeros(3), "1.running_var": torch.ones(3)},
        {"1.running_mean": torch.zeros(4), "1.running_var": torch.ones(1)},
    ],
    ids=["one of both", "another width", "a number"],
)
def test_statistics_of_another_layer_are_refused(buffers: dict[str, Tensor]) -> None:
    for use in (NETWORK, NETWORK.run):
        with pytest.raises(InvalidArgument, match="mean and a variance of 4 channels"):
            use(NETWORK.init(0), torch.ones(2, 2, 4, 4), buffers)


@pytest.mark.parametrize("wrong", [(torch.zeros(4), torch.ones(4)), 3, "running"])
def test_statistics_are_a_dictionary(wrong: Any) -> None:
    for use in (NETWORK, NETWORK.run):
        with pytest.raises(InvalidArgument, match="dictionary"):
            use(NETWORK.init(0), torch.ones(2, 2, 4, 4), wrong)


@pytest.mark.parametrize(
    "layer",
    [
        *LAYERS,
        RMSNorm(floor=0.5, eps=1e-3),
        GroupNorm(3),
        BatchNorm(),
        BatchNorm(8, momentum=0.5, floor=2.0, eps=1e-3),
        BatchNorm(eps=1e-6),
    ],
    ids=repr,
)
def test_a_repr_is_the_expression_that_builds_it(layer: Normalisation) -> None:
    assert eval(repr(layer), dict(vars(modula_agd))) == layer
