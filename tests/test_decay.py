"""Relative weight decay, and the multiple of the minimiser that a step goes."""

import pytest
import torch

from modula_agd import AGD, Certified, ClosedForm, ExactGrowth, InvalidArgument, Linear, SquareLoss, Tanh, agd
from support import assert_steps_of_the_pure_form, gaussian

NET = Linear(3, 6) @ Tanh() @ Linear(6, 4)


def gradients(method, params, seed: int = 0):
    return torch.func.grad(method.objective)(params, gaussian(8, 4, seed=seed), gaussian(8, 3, seed=seed + 99))


def test_a_weight_loses_the_stated_share_of_itself() -> None:
    method = agd(NET, SquareLoss(), decay=0.3)
    params = NET.init(0, dtype=torch.float64)
    updates, state = method.update(gradients(method, params), method.init(params), params)
    for name, atom in NET.weights().items():
        direction = atom.norm.direction(gradients(method, params)[name]).dense()
        torch.testing.assert_close(updates[name], -state.t * (direction + 0.3 * params[name]))


@pytest.mark.parametrize("search", [ExactGrowth(), ClosedForm()], ids=repr)
def test_the_growth_and_the_descent_count_the_decay(search) -> None:
    plain, decaying = agd(NET, SquareLoss(), search=search), agd(NET, SquareLoss(), search=search, decay=0.5)
    params = NET.init(0, dtype=torch.float64)
    grads = gradients(plain, params)
    _, one = plain.update(grads, plain.init(params), params)
    _, other = decaying.update(grads, decaying.init(params), params)
    assert float(other.depth) == pytest.approx(1.5 * float(one.depth))
    pulled = sum(float((grads[name] * params[name]).sum()) for name in params)
    assert float(other.descent) == pytest.approx(float(one.descent) + 0.5 * pulled)


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_norms_stay_within_size_over_decay(decay: float) -> None:
    """The step's relative length is at most 1/decay here, so that each update is a mean of a weight and a point of that ball."""
    model = NET.to_torch(0)
    optimizer = AGD(model, SquareLoss(), decay=decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        for parameter in model.parameters():
            # one direction for ever, the worst case
            parameter.grad = torch.ones_like(parameter) + 0.1 * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        assert float(optimizer.current.t) <= 1 / decay
        for name, atom in NET.weights().items():
            assert float(atom.norm.size(model.get_parameter(name).detach())) <= max(1.0, 1 / decay) + 1e-4
    sizes = [float(atom.norm.size(model.get_parameter(n).detach())) for n, atom in NET.weights().items()]
    assert max(sizes) == pytest.approx(1 / decay, rel=0.1)


def test_without_decay_norms_drift() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, SquareLoss())
    for _ in range(400):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert float(NET.weights()["0.weight"].norm.size(model.get_parameter("0.weight").detach())) > 10


def test_the_optimizer_decays_as_the_functional_form_does() -> None:
    model = NET.to_torch(0, dtype=torch.float64)
    optimizer, method = AGD(model, SquareLoss(), decay=0.2), agd(NET, SquareLoss(), decay=0.2)
    assert_steps_of_the_pure_form(optimizer, model, method, lambda params, step: gradients(method, params, step), 5)


def test_a_step_goes_the_stated_multiple_of_the_minimiser() -> None:
    params = NET.init(0, dtype=torch.float64)
    steps = {}
    for relaxation in (1.0, 2.0):
        method = agd(NET, SquareLoss(), relaxation=relaxation)
        updates, state = method.update(gradients(method, params), method.init(params), params)
        steps[relaxation] = float(state.t)
        assert float(updates["0.weight"].norm()) > 0
    assert steps[2.0] == pytest.approx(2 * steps[1.0])
    assert agd(NET, SquareLoss()).relaxation is None
    assert (
        agd(NET, SquareLoss(), momentum=None).relaxation == agd(NET, SquareLoss(), curvature="declared").relaxation == 1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": -0.1}, "decay"),
        ({"decay": float("inf")}, "decay"),
        ({"decay": "some"}, "decay"),
        ({"relaxation": 0}, "relaxation"),
        ({"relaxation": float("nan")}, "relaxation"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"smoothing": 0.9, "momentum": None}, "without momentum"),
        ({"decay": 0.1, "search": Certified()}, "decay"),
        ({"relaxation": 2.0, "search": Certified()}, "relaxation"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        agd(NET, SquareLoss(), **options)


def test_the_certificate_names_what_both_rest_on() -> None:
    def told(**options) -> str:
        return " ".join(agd(NET, SquareLoss(), **options).certificate().assumptions)

    assert "2 times the majorant's minimiser" in told(relaxation=2.0, curvature="declared")
    assert "up to 2 times the majorant's minimiser" in told()
    assert "relaxation" not in told(curvature="declared")
    assert "decay sees to" in told(decay=1.0)
    assert "decay" not in told(decay=0.5)


@pytest.mark.parametrize("multiplier", [1e3, 1e6])
def test_no_decay_carries_a_weight_through_zero(multiplier: float) -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, SquareLoss(), decay=1.0)
    optimizer.param_groups[0]["lr"] = multiplier
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[0, 0] = 1.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        # where the direction is next to nothing, nothing but a share of the weight can be left
        far = parameter.detach()[1:, 1:].sign() * before[name][1:, 1:].sign()
        assert (far >= 0).all()


def test_a_multiplier_that_takes_a_step_to_infinity_is_refused() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, SquareLoss())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for multiplier in (1e308 * 10, 10**400):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.param_groups[0]["lr"] = multiplier
        with pytest.raises(InvalidArgument, match="multiplier"):
            optimizer.step()
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())
    with pytest.raises(InvalidArgument):
        agd(NET, SquareLoss(), relaxation=1e300).update(
            {name: torch.ones_like(w) for name, w in before.items()}, agd(NET, SquareLoss()).init(before), before
        )


@pytest.mark.parametrize("part", [0.0, 1.5, float("nan"), "h"])
def test_a_part_of_an_update_that_cannot_be_is_refused(part) -> None:
    method = agd(NET, SquareLoss())
    params = NET.init(0)
    with pytest.raises(InvalidArgument, match="part"):
        method.update({}, method.init(params), params, part=part)
