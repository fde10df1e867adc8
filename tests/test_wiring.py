"""Tuples and shared weights: who gets which part, and what one weight in several places counts."""

from typing import Any

import pytest
import torch

import modula_agd
from modula_agd import (
    AGD,
    BatchNorm,
    Bias,
    CrossEntropy,
    Embedding,
    Features,
    Identity,
    Image,
    InvalidArgument,
    Linear,
    Logits,
    Module,
    Multiply,
    ReLU,
    Scale,
    Sequence,
    Shared,
    SpaceMismatch,
    SquareLoss,
    Take,
    Tanh,
    Tokens,
    Unembedding,
    UnknownBound,
    agd,
    each,
)
from modula_agd.space import Tuple
from support import gaussian, trained

F64 = {"dtype": torch.float64}
PAIR = Tuple((Features(3), Features(4)))
TIED = Shared("table", Unembedding(5, 4)) @ Linear(Sequence(4), Sequence(4)) @ Shared("table", Embedding(4, 5))


# -- tuples ----------------------------------------------------------------------------------------------------------------


def test_each_part_goes_through_a_module_of_its_own() -> None:
    net = each(Linear(2, 3), Tanh()) @ (Linear(3, 4), Linear(5, 4))
    assert (net.domain, net.codomain) == (Features(4), Tuple((Features(2), Features(5))))
    params, x = net.init(0, **F64), gaussian(6, 4)
    assert list(params) == ["0.0.weight", "0.1.weight", "1.0.weight"]
    left, right = net(params, x)
    torch.testing.assert_close(left, x @ params["0.0.weight"].mT @ params["1.0.weight"].mT)
    torch.testing.assert_close(right, torch.tanh(x @ params["0.1.weight"].mT))


def test_the_bound_of_each_part_is_its_own() -> None:
    first = (Take(0) @ each(Linear(2, 3), Scale(4) @ Linear(4, 4)) @ (Linear(3, 5), Linear(4, 5))).bound(0.1)
    second = (Take(1) @ each(Linear(2, 3), Scale(4) @ Linear(4, 4)) @ (Linear(3, 5), Linear(4, 5))).bound(0.1)
    assert (first.growth, first.depth) == (pytest.approx(1.1**2), pytest.approx(2))
    assert (second.growth, second.depth) == (pytest.approx(1.1**3), pytest.approx(3))


def test_open_parts_are_settled_from_both_sides() -> None:
    assert each(ReLU(), Identity()).domain is None
    assert each(ReLU(), Identity()).bind(PAIR).codomain == PAIR
    net = each(Linear(2, 3), Scale(4)) @ each(ReLU(), Tanh())
    assert (net.domain, net.codomain) == (PAIR, Tuple((Features(2), Features(4))))


def test_a_part_is_taken_by_its_index() -> None:
    x = gaussian(6, 3), gaussian(6, 4)
    for index in (0, 1):
        assert Take(index).bind(PAIR).codomain == PAIR.parts[index]
        assert Take(index).bind(PAIR)({}, x) is x[index]


def test_taking_costs_a_certified_step_nothing() -> None:
    assert (Take(0) @ (Linear(2, 3), Linear(2, 3))).bound(0.1).error is not None


@pytest.mark.parametrize("index", [-1, 1.0, True, None, "0", [0]])
def test_an_index_is_an_integer_of_at_least_0(index: Any) -> None:
    with pytest.raises(InvalidArgument, match="at least 0"):
        Take(index)


@pytest.mark.parametrize("wrong", [3, "a", None, torch.relu, Linear])
def test_each_takes_modules(wrong: Any) -> None:
    with pytest.raises(SpaceMismatch, match="not a module"):
        each(Identity(), wrong)
    with pytest.raises(SpaceMismatch, match="no module"):
        each()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: each(ReLU(), Tanh()).bind(Features(3)), "tuple of 2"),
        (lambda: each(ReLU(), Tanh(), ReLU()).bind(PAIR), "tuple of 3"),
        (lambda: each(ReLU(), Linear(2, 3)).bind(PAIR), r"takes Features\(3\)"),
        (lambda: each(ReLU(), Tanh()) @ Linear(3, 4), r"gives Features\(3\)"),
        (lambda: Take(2).bind(PAIR), "part of a tuple"),
        (lambda: Take(0) @ Linear(3, 4), r"gives Features\(3\)"),
    ],
)
def test_branches_that_do_not_fit_are_an_error(build: Any, message: str) -> None:
    with pytest.raises(SpaceMismatch, match=message):
        build()


@pytest.mark.parametrize("x", [gaussian(2, 3), (gaussian(2, 3),), [gaussian(2, 3)] * 2, None])
def test_open_wiring_refuses_what_is_no_such_tuple(x: Any) -> None:
    with pytest.raises(SpaceMismatch, match="tuple"):
        each(ReLU(), Tanh())({}, x)
    with pytest.raises(SpaceMismatch, match="tuple"):
        Take(1)({}, x)
    with pytest.raises(SpaceMismatch, match="tuple"):
        Multiply()({}, x)


@pytest.mark.parametrize("module", [each(ReLU(), Tanh()), Take(1), Multiply()], ids=repr)
def test_open_wiring_has_no_bound_by_itself_and_still_prints(module: Module) -> None:
    with pytest.raises(UnknownBound, match="by itself"):
        module.bound()
    assert str(module) == repr(module)


# -- shared weights --------------------------------------------------------------------------------------------------------


def test_a_shared_weight_is_one_parameter_drawn_once() -> None:
    params = TIED.init(0, **F64)
    assert {name: tuple(value.shape) for name, value in params.items()} == {"table.weight": (5, 4), "1.weight": (4, 4)}
    torch.testing.assert_close(params["table.weight"], Embedding(4, 5).init(0, **F64)["weight"])
    ids = torch.tensor([[0, 3, 1]])
    h = params["table.weight"][ids] @ params["1.weight"].mT
    torch.testing.assert_close(TIED(params, ids), h @ params["table.weight"].mT / 4)


def test_a_shared_weight_counts_once_per_use() -> None:
    bound = TIED.bound(0.1)
    assert (bound.depth, bound.ceiling, bound.growth) == (3, 3, pytest.approx(1.1**3))
    layer = Shared("layer", Linear(4, 4))
    net = Linear(3, 4) @ (Tanh() @ layer) ** 5
    assert len(net.init(0)) == 2
    assert [name for name, _ in net.atoms()] == ["layer.weight"] * 5 + ["10.weight"]
    assert net.bound(constants="proved").depth == 6
    assert net.bound(0.1, sizes={"layer.weight": 2.0}, constants="proved").magnitude == pytest.approx(1)
    assert (layer**5).bound(sizes={"layer.weight": 2.0}).magnitude == pytest.approx(2**5)


def test_the_gradient_of_a_shared_weight_sums_over_its_uses() -> None:
    net, x = Shared("w", Linear(3, 3)) @ Tanh() @ Shared("w", Linear(3, 3)), gaussian(5, 3)
    weight = net.init(0, **F64)["w.weight"]
    apart = Linear(3, 3) @ Tanh() @ Linear(3, 3)
    both = torch.func.grad(lambda p: net(p, x).square().sum())({"w.weight": weight})["w.weight"]
    each_one = torch.func.grad(lambda p: apart(p, x).square().sum())({"0.weight": weight, "2.weight": weight})
    torch.testing.assert_close(both, each_one["0.weight"] + each_one["2.weight"])


def test_one_name_holds_several_parameters_of_a_part() -> None:
    layer = Shared("layer", Bias(4) @ Linear(4, 4))
    assert set((layer @ Tanh() @ layer).init(0)) == {"layer.0.weight", "layer.1.bias"}


def test_a_mass_on_the_whole_reaches_every_use() -> None:
    assert TIED.with_mass(0.5).bound().depth == pytest.approx(1.5)


@pytest.mark.parametrize(
    "other",
    [
        Linear(4, 4, size=2.0),
        Linear(4, 4, mass=0.5),
        Linear(4, 4).with_mass(0),
        Shared("w", Linear(Logits(4), 4)).inner,
    ],
    ids=["size", "mass", "frozen", "norm"],
)
def test_uses_that_declare_one_weight_differently_are_an_error(other: Module) -> None:
    net = Shared("w", other) @ Shared("w", Linear(4, 4))
    for use in (net.weights, lambda: net.init(0), lambda: agd(net, SquareLoss())):
        with pytest.raises(InvalidArgument, match=r"share the weight 'w\.weight'.*agree"):
            use()


def test_uses_of_other_shapes_are_an_error() -> None:
    with pytest.raises(InvalidArgument, match="agree in shape"):
        (Shared("w", Linear(4, 3)) @ Shared("w", Linear(3, 4))).weights()


@pytest.mark.parametrize("name", ["", "a.b", "0", "a b", None, 3, True])
def test_a_name_is_an_identifier(name: Any) -> None:
    with pytest.raises(InvalidArgument, match="name such as"):
        Shared(name, Linear(3, 3))
    with pytest.raises(InvalidArgument, match="a module"):
        Shared("w", name)


def test_a_name_that_torch_modules_have_for_something_else_is_an_error_with_the_remedy() -> None:
    for name in ("forward", "network", "training", "parameters"):
        net = Shared(name, Linear(3, 3)) @ Tanh() @ Shared(name, Linear(3, 3))
        assert list(net.init(0)) == [f"{name}.weight"]
        with pytest.raises(InvalidArgument, match="Shared another name"):
            net.to_torch(0)


def test_spaces_pass_through() -> None:
    net = Shared("w", ReLU() @ Linear(3, 4))
    assert (net.domain, net.codomain) == (Features(4), Features(3))
    assert Shared("w", ReLU()).bind(Image(2)).codomain == Image(2)
    with pytest.raises(SpaceMismatch):
        Shared("w", Linear(3, 4)) @ Linear(3, 3)
    with pytest.raises(SpaceMismatch, match=r"Tokens\(5\)"):
        TIED.bind(Tokens(6))


def test_a_shared_batch_norm_counts_every_use_in_its_statistics() -> None:
    layer = Shared("norm", BatchNorm(momentum=0.5))
    net = layer @ (2 * layer) @ Linear(3, 3)
    params, x = net.init(0, **F64), gaussian(8, 3)
    _, buffers = net.run(params, x)
    theirs = torch.nn.BatchNorm1d(3, momentum=0.5, affine=False, **F64)
    theirs(2 * theirs(x @ params["0.weight"].mT))
    assert set(buffers) == {"norm.running_mean", "norm.running_var"}
    torch.testing.assert_close(buffers["norm.running_var"], theirs.running_var)
    torch.testing.assert_close(buffers["norm.running_mean"], theirs.running_mean)


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.95}])
def test_a_tied_network_learns(options: dict[str, Any]) -> None:
    x = torch.arange(20).reshape(4, 5) % 5
    before, after = trained(TIED, CrossEntropy(), x, (x + 1) % 5, **options)
    assert after < 0.95 * before


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.95}])
def test_the_optimizer_moves_a_tied_weight_once_and_keeps_one_state_of_it(options: dict[str, Any]) -> None:
    model = TIED.to_torch(0, **F64)
    optimizer = AGD(model, CrossEntropy(), **options)
    assert [name for name, _ in model.named_parameters()] == ["table.weight", "1.weight"]
    x = torch.arange(20).reshape(4, 5) % 5
    method = optimizer.method
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    state, values = method.init(params), []
    for _ in range(5):
        optimizer.zero_grad()
        value = CrossEntropy()(model(x), (x + 1) % 5)
        value.backward()
        optimizer.step()
        values.append(value.item())
        updates, state = method.update(torch.func.grad(method.objective)(params, x, (x + 1) % 5), state, params)
        params = {name: weight + updates[name] for name, weight in params.items()}
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), params[name])
    assert values[-1] < values[0]
    assert set(optimizer.current.momentum) == (set(params) if options["momentum"] else set())
    assert optimizer.current.sizes.shape == (2,)
    fresh = AGD(TIED.to_torch(1, **F64), CrossEntropy(), **options)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.current.steps == 5


@pytest.mark.parametrize(
    "module",
    [each(ReLU(), Linear(2, 3)), Take(1), Shared("w", Linear(3, 3)), TIED],
    ids=["each", "Take", "Shared", "tied"],
)
def test_a_repr_is_the_expression_that_builds_it(module: Module) -> None:
    assert eval(repr(module), dict(vars(modula_agd))) == module
