"""The algebra of modules: composition and its type check, sums, scalars, tuples, powers, names, masses, the table."""

import math
import re

import pytest
import torch
from torch import nn

import modula_agd
from modula_agd import (
    GELU,
    AvgPool2d,
    Bias,
    Conv2d,
    Embedding,
    Features,
    Flatten,
    Grade,
    Identity,
    Image,
    InvalidArgument,
    LeakyReLU,
    Linear,
    Logits,
    Mask,
    MaxPool2d,
    Mean,
    Module,
    Multiply,
    ReLU,
    RMSNorm,
    Scale,
    Sequence,
    SpaceMismatch,
    SquareLoss,
    Take,
    Tanh,
    Tokens,
    Tuple,
    UnitBall,
    UnknownBound,
    agd,
)
from modula_agd.module import Branches, Compose, Scaled, Sum
from support import gaussian, seeded

F64 = {"dtype": torch.float64}


# -- composition -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        (Linear(2, 3), ReLU(), Linear(3, 4)),
        (Linear(2, 3), Linear(3, 4) @ Tanh(), Linear(4, 5) @ Linear(5, 6)),
        (Linear(2, 8) @ Flatten(2, 2), ReLU() @ MaxPool2d(2), Conv2d(2, 3, padding=1)),
        (Flatten(2, 2), ReLU(), Identity() @ Tanh()),
        (Linear(2, 3), (2 * Tanh()) @ UnitBall(), Linear(3, 3) + Identity()),
    ],
)
def test_composition_is_associative_names_and_bounds_included(a: Module, b: Module, c: Module) -> None:
    left, right = (a @ b) @ c, a @ (b @ c)
    assert left == right
    assert list(left.init(0)) == list(right.init(0))
    assert left.bound(0.1) == right.bound(0.1)


def test_the_right_module_acts_first() -> None:
    net = Linear(2, 3) @ Tanh() @ Linear(3, 4)
    params, x = net.init(0, **F64), gaussian(5, 4)
    assert torch.equal(net(params, x), torch.tanh(x @ params["0.weight"].mT) @ params["2.weight"].mT)
    assert (net.domain, net.codomain) == (Features(4), Features(2))


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: Linear(4, 3) @ Linear(5, 2), ["Linear(4, 3)", "Features(3)", "Features(5)", "Flatten"]),
        (lambda: Linear(4, 3) @ (ReLU() @ Linear(5, 2)), ["Linear(4, 3)", "Features(3)", "Features(5)"]),
        (lambda: Linear(4, 3) @ Conv2d(3, 1), ["Linear(4, 3)", "Features(3)", "Image(3)"]),
        (lambda: Linear(4, 3) @ Linear(Logits(3), 2), ["Linear(4, 3)", "Features(3)", "Logits(3)"]),
        (lambda: Flatten(2, 2) @ Linear(4, 3), ["Flatten(2, 2)", "Image", "Features(4)"]),
        (lambda: MaxPool2d(2) @ Linear(4, 3), ["MaxPool2d(2)", "Image", "Features(4)"]),
        (lambda: Mean() @ Linear(4, 3), ["Mean()", "Features(4)"]),
        (lambda: UnitBall() @ Linear(Logits(4), 3), ["UnitBall()", "Logits(4)"]),
        (lambda: Linear(4, 3) @ Flatten(2, 2) @ Conv2d(2, 1), ["Linear(4, 3)", "Features(3)", "Features(8)"]),
        (lambda: Multiply() @ Linear(4, 3), ["Multiply()", "pair", "Features(4)"]),
        (lambda: Multiply() @ (Linear(4, 3), Linear(5, 3)), ["Multiply()", "Features(4)", "Features(5)"]),
        (lambda: Multiply() @ (Identity(), Mean()) @ Conv2d(2, 1), ["Multiply()", "Image(2)", "Features(2)"]),
        (
            lambda: Linear(4, 3) @ (Linear(3, 2), Linear(3, 2)),
            ["Linear(4, 3)", "Features(3)", "(Features(3), ", "Multiply"],
        ),
        (lambda: Linear(4, 3) + Linear(5, 3), ["Linear(4, 3)", "Linear(5, 3)", "Features(4)", "Features(5)"]),
        (lambda: Linear(4, 3) + Linear(4, 5), ["Linear(4, 3)", "Linear(4, 5)", "Features(3)", "Features(5)"]),
        (lambda: Identity() + Linear(4, 3), ["Identity()", "Linear(4, 3)", "Features(3)", "Features(4)"]),
        (lambda: (Linear(4, 3), Linear(4, 5)) @ Identity(), ["Features(3)", "Features(5)"]),
        (lambda: Linear(4, 3) @ torch.relu, ["Wrap a function as a Bond"]),
        (lambda: torch.relu @ Linear(4, 3), ["Wrap a function as a Bond"]),
        (lambda: Linear(4, 3) ** 2, ["Linear(4, 3)", "Features(3)", "Features(4)"]),
    ],
)
def test_a_mismatch_names_both_sides(build: object, parts: list[str]) -> None:
    with pytest.raises(SpaceMismatch) as caught:
        build()  # pyright: ignore[reportCallIssue]
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("net", "domain", "codomain"),
    [
        (Linear(2, 3) @ ReLU(), Features(3), Features(2)),
        (ReLU() @ Linear(2, 3), Features(3), Features(2)),
        (Linear(2, 8) @ Flatten(2, 2) @ ReLU(), Image(2), Features(2)),
        (Linear(2, 8) @ (Flatten(2, 2) @ (ReLU() @ Tanh())), Image(2), Features(2)),
        (Tanh() @ MaxPool2d(2) @ Conv2d(3, 2), Image(2), Image(3)),
        (Conv2d(3, 2) @ AvgPool2d(2) @ Tanh(), Image(2), Image(3)),
        (Mean() @ Tanh() @ Embedding(4, 7), Tokens(7), Features(4)),
        (Linear(2, 3) @ (2 * ReLU() + Identity()), Features(3), Features(2)),
        ((2 * ReLU() + Identity()) @ Linear(2, 3), Features(3), Features(2)),
        (Linear(2, 3) @ (2 * (Tanh() @ ReLU())), Features(3), Features(2)),
        (Identity() + Conv2d(2, 2, padding=1), Image(2), Image(2)),
        (Conv2d(2, 2, padding=1) + Identity(), Image(2), Image(2)),
        (Multiply() @ (Identity(), Tanh()) @ Linear(2, 3), Features(3), Features(2)),
        (Multiply() @ (Tanh(), Linear(3, 3)), Features(3), Features(3)),
        (Multiply() @ (Linear(Logits(4), 3), Linear(4, 3)), Features(3), Features(4)),
        (Multiply() @ (Linear(4, 3), Linear(Logits(4), 3)), Features(3), Features(4)),
        (Bias(Logits(2)) @ Linear(Logits(2), Sequence(3)), Sequence(3), Logits(2)),
        (UnitBall() @ Scale(3) @ UnitBall(), Features(3), Features(3)),
    ],
)
def test_untyped_neighbours_are_settled_from_both_sides(net: Module, domain: object, codomain: object) -> None:
    assert (net.domain, net.codomain) == (domain, codomain)
    assert net.bound().error is None or net.bound().error == 0


def test_what_does_not_settle_a_domain_leaves_it_open() -> None:
    # a mean over positions may have been one of an image or of a sequence
    assert (Linear(2, 3) @ Mean()).domain is None
    assert (ReLU() @ Tanh()).domain is None
    assert (Linear(2, 7) @ Flatten(2, 2)).domain is None


def test_an_open_module_settles_when_it_is_composed_further() -> None:
    tail = Linear(2, 3) @ Mean()
    net = tail @ Conv2d(3, 1)
    assert (net.domain, net.codomain) == (Image(1), Features(2))
    x, params = gaussian(4, 1, 5, 5), net.init(0, **F64)
    images = nn.functional.conv2d(x, params["0.weight"])
    assert torch.allclose(net(params, x), images.mean((2, 3)) @ params["2.weight"].mT)


# -- the other operators -----------------------------------------------------------------------------------------------------


def test_a_power_has_independent_weights() -> None:
    net = (Tanh() @ Linear(3, 3)) ** 3
    params, x = net.init(0, **F64), gaussian(5, 3)
    assert list(params) == ["0.weight", "2.weight", "4.weight"]
    assert not torch.equal(params["0.weight"], params["2.weight"])
    assert not torch.equal(params["2.weight"], params["4.weight"])
    expected = x
    for name in params:
        expected = torch.tanh(expected @ params[name].mT)
    assert torch.equal(net(params, x), expected)
    assert Linear(3, 3) ** 1 == Linear(3, 3)


@pytest.mark.parametrize("copies", [0, -1, 2.0, True])
def test_a_power_is_a_positive_integer(copies: object) -> None:
    with pytest.raises(InvalidArgument, match="the exponent of a module must be an integer of at least 1"):
        Linear(3, 3) ** copies  # pyright: ignore[reportOperatorIssue]


def test_a_sum_adds_outputs_and_flattens() -> None:
    net = Linear(2, 3) + Linear(2, 3) + (Linear(2, 3) + Linear(2, 3))
    params, x = net.init(0, **F64), gaussian(5, 3)
    assert list(params) == ["0.weight", "1.weight", "2.weight", "3.weight"]
    assert torch.allclose(net(params, x), x @ sum(params.values()).mT)  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(net, Sum)
    assert len(net.parts) == 4


def test_a_sum_in_a_chain_adds_its_own_level_to_the_names() -> None:
    net = Linear(2, 3) @ (Identity() + Linear(3, 3))
    assert list(net.init(0)) == ["0.1.weight", "1.weight"]


def test_only_modules_can_be_added() -> None:
    with pytest.raises(TypeError):
        Linear(3, 3) + 1  # pyright: ignore[reportOperatorIssue]


def test_a_scalar_multiplies_the_output_and_adds_nothing_to_the_names() -> None:
    net = (-2 * Tanh()) @ (0.5 * Linear(2, 3))
    params, x = net.init(0, **F64), gaussian(5, 3)
    assert list(params) == ["0.weight"]
    assert torch.allclose(net(params, x), -2 * torch.tanh(0.5 * x @ params["0.weight"].mT))
    assert (2 * Linear(2, 3)).bound().magnitude == 2
    assert (-2 * Linear(2, 3)).bound().magnitude == 2


@pytest.mark.parametrize("factor", [0, math.inf, math.nan, "2", None])
def test_a_factor_is_a_finite_number_other_than_0(factor: object) -> None:
    with pytest.raises(InvalidArgument, match="finite number other than 0"):
        factor * Linear(2, 3)  # pyright: ignore[reportOperatorIssue]


def test_a_factor_at_the_right_is_an_error_with_the_remedy() -> None:
    with pytest.raises(InvalidArgument, match="write the number at the left"):
        Linear(2, 3) * 2


def test_a_tuple_gives_outputs_side_by_side() -> None:
    net = Branches((Linear(2, 3), Linear(4, 3)))
    params, x = net.init(0, **F64), gaussian(5, 3)
    left, right = net(params, x)
    assert torch.equal(left, x @ params["0.weight"].mT)
    assert torch.equal(right, x @ params["1.weight"].mT)
    assert str(net.codomain) == "(Features(2), Features(4))"


def test_multiply_takes_the_product_of_two_branches() -> None:
    net = Multiply() @ (Linear(4, 3), Tanh() @ Linear(4, 3))
    params, x = net.init(0, **F64), gaussian(5, 3)
    assert list(params) == ["0.0.weight", "0.1.0.weight"]
    left, right = params.values()
    assert torch.allclose(net(params, x), (x @ left.mT) * torch.tanh(x @ right.mT))


def test_a_tuple_may_stand_left_of_a_module() -> None:
    net = Multiply() @ ((Linear(2, 3), Tanh() @ Linear(2, 3)) @ Linear(3, 4))
    assert list(net.init(0)) == ["0.weight", "1.0.weight", "1.1.0.weight"]
    assert (net.domain, net.codomain) == (Features(4), Features(2))


def test_a_tuple_has_no_single_bound() -> None:
    with pytest.raises(UnknownBound, match=r"tuple.*Multiply\(\)"):
        Branches((Linear(2, 3), Linear(2, 3))).bound()


# -- names and weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "reference", "shape"),
    [
        (
            Linear(3, 5) @ ReLU() @ Linear(5, 4),
            nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)),
            (4,),
        ),
        (
            Linear(3, 16) @ Flatten(2, 2) @ MaxPool2d(2) @ GELU() @ Conv2d(4, 2, padding=1),
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1, bias=False),
                nn.GELU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(16, 3, bias=False),
            ),
            (2, 4, 4),
        ),
        (Linear(3, 4), nn.Linear(4, 3, bias=False), (4,)),
    ],
)
def test_names_are_those_of_the_same_torch_network_whose_weights_run_in_it(
    net: Module, reference: nn.Module, shape: tuple[int, ...]
) -> None:
    reference = reference.double()
    assert list(net.init(0)) == list(reference.state_dict())
    x = gaussian(5, *shape)
    assert torch.equal(net(reference.state_dict(), x), reference(x))
    reference.load_state_dict(net.init(0, **F64))
    assert list(net.to_torch(0).state_dict()) == list(reference.state_dict())


def test_equal_seeds_give_equal_weights_whatever_the_dtype() -> None:
    net = Linear(3, 4) @ Bias(4) @ Linear(4, 5)
    exact = net.init(7, **F64)
    for dtype in (torch.float32, torch.bfloat16):
        other = net.init(7, dtype=dtype)
        assert all(torch.equal(other[name], exact[name].to(dtype)) for name in exact)
    by_generator = net.init(seeded(7), **F64)
    assert all(torch.equal(by_generator[name], exact[name]) for name in exact)
    assert not torch.equal(net.init(8, **F64)["0.weight"], exact["0.weight"])


def test_a_generator_moves_on_between_calls() -> None:
    generator, net = seeded(1), Linear(3, 4)
    assert not torch.equal(net.init(generator)["weight"], net.init(generator)["weight"])


def test_initial_weights_have_their_declared_norm() -> None:
    net = Bias(Logits(2)) @ Linear(Logits(2), 3) @ Scale(3, size=2.0) @ Linear(3, 4, size=0.5)
    params = net.init(0, **F64)
    sizes = {name: atom.norm.size(params[name]).item() for name, atom in net.atoms()}
    expected = {"0.weight": 0.5, "1.scale": 2.0, "2.weight": 1.0, "3.bias": 0.0}
    assert sizes == pytest.approx(expected)


def test_a_batch_that_is_not_in_the_domain_is_an_error() -> None:
    net = Linear(2, 3) @ ReLU() @ Linear(3, 4)
    with pytest.raises(SpaceMismatch, match=r"takes Features\(4\).*\(5, 3\)"):
        net(net.init(0), torch.ones(5, 3))


def test_an_unsettled_network_still_is_a_function() -> None:
    x = gaussian(3, 4)
    assert torch.equal((Tanh() @ ReLU())({}, x), torch.tanh(torch.relu(x)))


# -- masses ----------------------------------------------------------------------------------------------------------------


def test_a_mass_on_a_submodule_reaches_every_atom_in_it_and_no_other() -> None:
    inner = (Identity() + 2 * (Linear(3, 3) @ Linear(3, 3, mass=3.0))).with_mass(0.5)
    net = Multiply() @ Branches((Linear(2, 3), Linear(2, 3, mass=4.0))) @ inner
    masses = {name: atom.mass for name, atom in net.atoms()}
    assert masses == {"0.1.0.weight": 1.5, "0.1.1.weight": 0.5, "1.0.weight": 1.0, "1.1.weight": 4.0}
    assert {name: atom.mass for name, atom in net.with_mass(0).atoms()} == dict.fromkeys(masses, 0.0)


def test_a_mass_changes_no_function_no_name_and_no_weight() -> None:
    net = Linear(2, 3) @ Tanh() @ Linear(3, 4)
    heavy = net.with_mass(2.0)
    x, params = gaussian(5, 4), net.init(0, **F64)
    assert torch.equal(net(params, x), heavy(heavy.init(0, **F64), x))
    assert heavy.bound().depth == 2 * net.bound().depth


def test_a_negative_mass_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="a mass is a finite number"):
        (Linear(2, 3) @ ReLU()).with_mass(-1.0)


# -- bounds ----------------------------------------------------------------------------------------------------------------


def test_a_bound_takes_tracked_sizes_by_name() -> None:
    net = Linear(2, 3) @ (2 * Linear(3, 4))
    assert net.bound(sizes={"0.weight": 5.0}).magnitude == 10
    assert net.bound(sizes={"1.weight": 0.5}).magnitude == 1
    assert net.bound(magnitude=3.0).magnitude == 6


def test_tokens_have_magnitude_1_whatever_is_declared() -> None:
    assert Embedding(4, 7).bound(magnitude=5.0).magnitude == 1


def test_typical_and_proved_constants_are_the_two_choices() -> None:
    net = ReLU() @ Linear(2, 3)
    assert net.bound().magnitude == pytest.approx(math.sqrt(0.5))
    assert net.bound().grade == Grade.TYPICAL
    assert net.bound(constants="proved").magnitude == 1
    assert net.bound(constants="proved").grade == Grade.PROVED
    with pytest.raises(InvalidArgument, match="choose 'typical' or 'proved'"):
        net.bound(constants="hoped")  # pyright: ignore[reportArgumentType]


# -- classes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [Linear, Bias, Conv2d, MaxPool2d, Multiply, type(ReLU()), Compose, Sum, Scaled])
def test_a_final_class_cannot_be_subclassed(final: type[Module]) -> None:
    with pytest.raises(TypeError, match=f"Bolder subclasses {final.__name__}, which is final"):
        type("Bolder", (final,), {})


@pytest.mark.parametrize(
    "net",
    [
        Linear(2, 3) @ ReLU() @ Linear(3, 4),
        Linear(Logits(2), 3) @ (0.5 * Tanh() + 0.5 * Identity()) @ Linear(3, Features(4)),
        Multiply() @ (Linear(2, 3), GELU() @ Linear(2, 3)) @ Bias(3),
        3 * (Linear(2, 3) @ Scale(3)),
        Linear(2, 8) @ Flatten(2, 2) @ AvgPool2d(3, stride=1, padding=1) @ MaxPool2d(2) @ Conv2d(2, 4, 5, padding=2),
        Mean() @ UnitBall() @ Embedding(4, 7),
        Conv2d(4, 2, (1, 3), stride=2, dilation=3, groups=2),
    ],
)
def test_a_repr_is_the_expression_that_builds_the_module(net: Module) -> None:
    assert eval(repr(net), dict(vars(modula_agd))) == net


def test_modules_are_values() -> None:
    assert LeakyReLU(0.1) == LeakyReLU(0.1)
    assert LeakyReLU(0.1) != LeakyReLU(0.2)
    assert hash(Linear(2, 3) @ ReLU()) == hash(Linear(2, 3) @ ReLU())
    with pytest.raises(AttributeError):
        Linear(2, 3).fan_in = 5  # pyright: ignore[reportAttributeAccessIssue]


# -- the table -------------------------------------------------------------------------------------------------------------


def test_the_printed_table_has_a_row_for_each_atom_and_the_bound_of_the_whole() -> None:
    net = Linear(Logits(2), 3) @ ReLU() @ Bias(3) @ Linear(3, 4, mass=3.0)
    lines = str(net).splitlines()
    cells = [re.split(r"\s{2,}", line) for line in lines]
    assert cells[0] == ["parameter", "module", "shape", "norm", "mass", "share of η"]
    assert cells[2] == ["0.weight", "Linear(3, 4)", "3×4", "Spectral()", "3", "0.7857"]  # 3/D, D = 1 + (3 + 0.1)/1.1
    assert cells[3] == ["1.bias", "Bias(3)", "3", "RMS()", "1", "0.2619"]
    assert cells[4][:3] == ["3.weight", "Linear(Logits(2), 3)", "2×3"]
    assert cells[4][3] == "RowNorm(1.732)"
    assert lines[1] == lines[5] == "─" * len(lines[1])
    bound = net.bound()
    facts = {line[:20].strip(): line[20:] for line in lines[6:]}
    assert facts["depth D"] == f"{bound.depth:.6g}"
    assert facts["ceiling depth D̄"] == "4"
    assert facts["output magnitude a"] == f"{1.1 * math.sqrt(0.5):.6g}"
    assert facts["grade"] == "typical"
    assert facts["second order"].startswith("not bounded")
    assert "Lipschitz constant of ReLU(): 0.707107, typical" in facts["rests on"]


def test_the_table_says_bounded_and_proved_where_that_is_so() -> None:
    text = str(Linear(2, 3) @ Linear(3, 4))
    assert re.search(r"second order\s+bounded\n", text)
    assert re.search(r"grade\s+proved$", text)
    assert "rests on" not in text


def test_modules_without_atoms_or_without_a_single_bound_print_too() -> None:
    assert "depth D" in str(ReLU())
    assert str(Branches((ReLU(), Tanh()))) == "(ReLU(), Tanh())"
    text = str(Branches((Linear(2, 3), Linear(2, 3))))
    assert re.match(r"\(Linear\(2, 3\), Linear\(2, 3\)\)\n\(no table: .* gives a tuple", text)


def test_a_step_moves_each_atom_by_its_share_of_eta() -> None:
    net = 0.5 * Identity() + 0.5 * (Linear(3, 3, mass=2.0) @ Linear(3, 3))
    shares = [float(line.split()[-1]) for line in str(net).splitlines()[2:4]]
    method = agd(net, SquareLoss(), momentum=None)
    params = net.init(0, **F64)
    grads = torch.func.grad(method.objective)(params, gaussian(5, 3), gaussian(5, 3))
    updates, state = method.update(grads, method.init(params), params)
    moved = [torch.linalg.matrix_norm(update, 2).item() for update in updates.values()]
    # four decimals are printed, and the polar factor falls short of norm 1 by less than 1%
    assert moved == pytest.approx([share * state.eta.item() for share in shares], rel=0.01)


def test_the_table_calls_a_second_order_bounded_where_a_certified_step_is_to_be_had() -> None:
    normalised = Linear(2, 3) @ RMSNorm(eps=1e-4) @ Linear(3, 4)
    alone = "bounded by the proved constants alone, at depth 101"  # 1/sqrt(ε) + 1
    for net, text in ((normalised, alone), (Linear(2, 3) @ ReLU(), "not bounded: ")):
        assert re.search(rf"second order\s+{text}", str(net))


def test_a_network_that_has_no_table_yet_says_why() -> None:
    net = Multiply() @ (Linear(3, 3) @ Take(0), Linear(3, 3) @ Take(1))
    assert str(net).startswith(repr(net))
    assert "no table: " in str(net)
    assert "depth D" in str(net.bind(Tuple((Features(3), Features(3)))))


def test_branches_whose_positions_differ_are_an_error_that_names_both() -> None:
    net = Identity() + Conv2d(2, 2, 3)
    with pytest.raises(SpaceMismatch, match=r"\(1, 2, 5, 5\) and \(1, 2, 3, 3\), which cannot be added"):
        net(net.init(0), torch.zeros(1, 2, 5, 5))


def test_the_network_in_an_error_is_cut_short_and_the_facts_are_not() -> None:
    net = (ReLU() @ Linear(3, 3)) ** 50
    assert len(repr(net)) > 1000
    with pytest.raises(SpaceMismatch) as caught:
        net(net.init(0), torch.zeros(2, 4))
    assert len(str(caught.value)) < 400
    assert "Features(3)" in str(caught.value)
    assert "(2, 4)" in str(caught.value)


def test_of_a_tuple_every_part_is_described() -> None:
    net = Linear(2, 3) @ Take(0).bind(Tuple((Features(3), Mask())))
    with pytest.raises(
        SpaceMismatch, match=r"booleans, but got \(\(\(2, 3\), torch.float32\), \(\(2, 3\), torch.int64\)\)"
    ):
        net(net.init(0), (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)))
