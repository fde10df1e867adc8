"""The multiple of its minimiser that a majorant asks for, and multiples beyond what numbers hold."""

import pytest
import torch

from modula_agd import AGD, Certified, InvalidArgument, Linear, SquareLoss, Tanh, agd
from support import gaussian, gradients

NET = Linear(3, 6) @ Tanh() @ Linear(6, 4)


def test_a_step_goes_the_stated_multiple_of_the_minimiser() -> None:
    params = NET.init(0, dtype=torch.float64)
    steps = {}
    for relaxation in (1.0, 2.0):
        method = agd(NET, SquareLoss(), relaxation=relaxation)
        updates, state = method.update(
            gradients(method, params, gaussian(8, 4), gaussian(8, 3, seed=99)), method.init(params), params
        )
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
        ({"relaxation": 0}, "relaxation"),
        ({"relaxation": float("nan")}, "relaxation"),
        ({"relaxation": 2.0, "search": Certified()}, "relaxation"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        agd(NET, SquareLoss(), **options)


def test_the_certificate_names_relaxation() -> None:
    def told(**options) -> str:
        return " ".join(agd(NET, SquareLoss(), **options).certificate().assumptions)

    assert "2 times the majorant's minimiser" in told(relaxation=2.0, curvature="declared")
    assert "up to 2 times the majorant's minimiser" in told()
    assert "relaxation" not in told(curvature="declared")


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
