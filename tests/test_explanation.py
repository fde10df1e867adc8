"""Why a step was as long as it was."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modula_agd import (
    AGD,
    GPT,
    MLP,
    Bias,
    ClosedForm,
    CrossEntropy,
    Explanation,
    Fading,
    Identity,
    InvalidArgument,
    Linear,
    Logits,
    Loss,
    Method,
    ReLU,
    Shared,
    SquareLoss,
    State,
    agd,
    explain,
    residual,
)
from modula_agd.forecast import forecast
from support import gaussian

NET = Linear(3, 6) @ (0.5 * Identity() + 0.5 * (Linear(6, 6) @ ReLU())) @ Linear(6, 4)


def run(
    method: Method, steps: int, *, signal: float = 1.0, noise: float = 0.0, told: bool = True
) -> tuple[dict[str, Tensor], State]:
    params = method.network.init(0, dtype=torch.float64)
    state = method.init(params)
    inputs, targets = gaussian(32, 4), gaussian(32, 3, seed=1)
    inputs = inputs / inputs.square().mean(1, keepdim=True).sqrt()
    for step in range(steps):
        grads, value = torch.func.grad_and_value(method.objective)(params, inputs, targets)
        seeds = range(100 * step, 100 * step + len(grads))
        grads = {
            n: signal * g + noise * gaussian(*g.shape, seed=s) for (n, g), s in zip(grads.items(), seeds, strict=True)
        }
        updates, state = method.update(grads, state, params, value=value if told else None)
        params = {name: weight + updates[name] if name in updates else weight for name, weight in params.items()}
    return params, state


@pytest.mark.parametrize("sizes", ["prescribed", "tracked"])
def test_shares_of_descent_and_of_growth_each_add_up_to_the_whole(sizes) -> None:
    method = agd(NET, SquareLoss(), sizes=sizes)
    _, state = run(method, 4)
    told = explain(method, state)
    assert sum(abs(share.gives) for share in told.shares) == pytest.approx(1)
    assert sum(share.costs for share in told.shares) == pytest.approx(1)
    assert sum(method.sensitivities(state).values()) == pytest.approx(float(state.depth))
    assert [share.name for share in told.shares] == list(NET.weights())


@pytest.mark.parametrize(
    "network",
    [
        NET,
        residual(Linear(4, 4) @ ReLU(), 3).with_mass(0.5) @ Linear(4, 4, mass=3.0),
        Shared("w", Linear(4, 4)) @ ReLU() @ Shared("w", Linear(4, 4)) @ Linear(4, 4),
        GPT(7, 8, 2, 2, 6, bias=True),
    ],
    ids=["residual", "masses", "shared", "gpt"],
)
def test_a_sensitivity_is_the_derivative_of_the_growth_by_the_weights_own_step(network) -> None:
    method = agd(network, CrossEntropy() if isinstance(network.codomain, Logits) else SquareLoss())
    params = network.init(0)
    found = method.sensitivities(method.init(params))
    for name, mass in method.masses.items():
        alone = network.with_masses({other: mass if other == name else 0.0 for other in found})
        slope = (float(alone.bound(1e-6).growth) - 1) / 1e-6
        assert found[name] == pytest.approx(slope, rel=1e-4)
    assert sum(found.values()) == pytest.approx(float(network.bound().depth))


def test_masses_by_name_leave_the_others_alone() -> None:
    names = list(NET.weights())
    changed = NET.with_masses({names[1]: 5.0})
    assert [atom.mass for atom in changed.weights().values()] == [1.0, 5.0, 1.0]
    assert NET.with_masses({}) == NET
    frozen = agd(NET.with_masses({names[0]: 0.0}), SquareLoss())
    _, state = run(frozen, 2)
    told = explain(frozen, state).shares[0]
    assert (told.held_back_by, told.gives, told.moved) == ("frozen: mass 0", 0.0, 0.0)


def test_without_noise_all_is_signal_and_with_noise_alone_next_to_none() -> None:
    method = agd(NET, SquareLoss(), momentum=None)
    _, state = run(method, 3)
    assert all(share.signal == pytest.approx(1) for share in explain(method, state).shares)
    # the momentum is a mean from the first gradient on; polar factors are within 0.003 of theirs
    _, first = run(agd(NET, SquareLoss()), 1)
    assert all(share.signal == pytest.approx(1, abs=3e-3) for share in explain(agd(NET, SquareLoss()), first).shares)
    held = agd(NET, SquareLoss())
    told = [explain(held, run(held, steps, signal=0.0, noise=1.0)[1]).shares for steps in range(20, 60)]
    for index in range(3):
        # of noise, measurements along the same directions point either way
        assert 8 < sum(shares[index].signal < 0 for shares in told) < 32
        assert sum(shares[index].held_back_by.startswith("noise") for shares in told) > 8


def test_a_weight_without_a_gradient_is_said_to_have_none() -> None:
    method = agd(NET, SquareLoss())
    params, state = run(method, 2)
    grads = {name: torch.zeros_like(weight) for name, weight in params.items()}
    grads["0.weight"] = torch.ones_like(grads["0.weight"])
    _, state = method.update(grads, state, params)
    told = explain(method, state).shares
    assert [share.held_back_by == "no gradient" for share in told] == [False, True, True]


def test_growth_holds_back_what_costs_more_than_it_gives() -> None:
    # the head sees all of the output's change, the branch a hundredth of it
    net = Linear(3, 4) @ (0.99 * Identity() + 0.01 * (Linear(4, 4) @ ReLU()))
    method = agd(net, SquareLoss(), momentum=None)
    params = net.init(0, dtype=torch.float64)
    grads = {name: torch.ones_like(weight) * (1e-6 if name == "1.weight" else 1.0) for name, weight in params.items()}
    _, state = method.update(grads, method.init(params), params)
    shares = {share.name: share for share in explain(method, state).shares}
    assert shares["1.weight"].costs > 0.98
    assert shares["1.weight"].held_back_by.startswith("growth")


def test_predicted_and_realised_decrease_are_means_of_what_was_told() -> None:
    """On a full batch there is no noise: the mean of what the loss fell by is known exactly."""
    method = agd(NET, SquareLoss(), momentum=None)
    params = NET.init(0, dtype=torch.float64)
    state, values, changes = method.init(params), [], []
    inputs, targets = gaussian(32, 4), gaussian(32, 3, seed=1)
    for _ in range(20):
        grads, value = torch.func.grad_and_value(method.objective)(params, inputs, targets)
        updates, state = method.update(grads, state, params, value=value)
        params = {name: weight + updates[name] for name, weight in params.items()}
        values.append(float(value))
        changes.append(float(state.change))
    weights = [0.99 ** (18 - i) for i in range(19)]
    realised = sum(w * (a - b) for w, a, b in zip(weights, values, values[1:], strict=False)) / sum(weights)
    predicted = -sum(w * c for w, c in zip(weights, changes, strict=False)) / sum(weights)
    told = explain(method, state)
    assert told.realised == pytest.approx(realised)
    assert told.predicted == pytest.approx(predicted)


def test_a_verdict_tells_loose_from_violated_from_unknown() -> None:
    # a magnitude declared ten times too large makes the majorant loose, one ten times too small violates it
    loose, violated = (agd(NET, SquareLoss(), momentum=None, magnitude=a) for a in (10.0, 0.1))
    assert explain(loose, run(loose, 30)[1]).verdict.startswith("loose")
    assert explain(violated, run(violated, 30)[1]).verdict.startswith("violated")
    unknown = explain(loose, run(loose, 3, told=False)[1])
    assert unknown.verdict.startswith("unknown")
    assert "value=loss" in unknown.verdict
    assert (unknown.predicted, unknown.realised, unknown.error) == (None, None, None)


def test_the_mean_of_differences_has_the_stated_standard_error() -> None:
    """Losses of a standing network are noise about one value: their mean difference is 0 within its own error."""
    method = agd(NET, SquareLoss())
    state = method.init(NET.init(0))
    generator, ratios = torch.Generator().manual_seed(0), []
    for _ in range(300):
        current = state
        for _ in range(150):
            current = current._replace(**forecast(current, 1 + torch.randn((), generator=generator)))
        told = explain(method, current)
        assert told.realised is not None
        assert told.error is not None
        ratios.append(told.realised / told.error)
    assert 0.7 < math.sqrt(sum(r * r for r in ratios) / len(ratios)) < 1.3


def test_what_is_printed_names_every_weight_and_the_whole() -> None:
    model = MLP(Logits(3), 8, 4, 3).to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    inputs, labels = torch.randn(16, 4), torch.randint(3, (16,))
    for _ in range(3):
        optimizer.zero_grad()
        loss = CrossEntropy()(model(inputs), labels)
        loss.backward()
        optimizer.step(value=loss)
    text = str(optimizer.explain())
    for part in ("0.weight", "2.weight", "4.weight", "signal", "costs", "held back by", "realised, mean", "majorant"):
        assert part in text


def test_a_closures_loss_is_told_by_itself() -> None:
    model = MLP(Logits(3), 8, 4, 2).to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    inputs, labels = torch.randn(16, 4), torch.randint(3, (16,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = CrossEntropy()(model(inputs), labels)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.explain().realised is not None


def test_a_step_before_any_update_can_be_explained() -> None:
    method = agd(NET, SquareLoss(), search=ClosedForm())
    told = explain(method, method.init(NET.init(0)))
    assert told.eta == 0
    assert all((share.gives, share.held_back_by) == (0, "no step was made yet") for share in told.shares)
    with pytest.raises(InvalidArgument, match="parameters"):
        explain(method, agd(Linear(3, 4), SquareLoss()).init(Linear(3, 4).init(0)))
    with pytest.raises(InvalidArgument, match="NoneType"):
        explain(method, None)


def test_a_skipped_step_is_said_to_be_one() -> None:
    method = agd(NET, SquareLoss(), nonfinite="skip")
    params = NET.init(0)
    bad = {name: torch.full_like(weight, torch.nan) for name, weight in params.items()}
    _, state = method.update(bad, method.init(params), params)
    assert all(share.held_back_by.startswith("skipped") for share in explain(method, state).shares)


@pytest.mark.parametrize("value", ["x", torch.ones(2), torch.tensor(1j), True, [1.0]])
def test_a_loss_that_is_no_number_is_refused_before_anything_moves(value) -> None:
    model = MLP(Logits(3), 8, 4, 2).to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    CrossEntropy()(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(InvalidArgument, match="value=loss"):
        optimizer.step(value=value)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_python_number_is_a_loss_too() -> None:
    method = agd(NET, SquareLoss())
    params = NET.init(0)
    grads = {name: torch.ones_like(weight) for name, weight in params.items()}
    _, state = method.update(grads, method.init(params), params, value=1.5)
    assert float(state.loss) == 1.5
    _, state = method.update(grads, state, params, value=torch.tensor([1.25]))
    assert state.loss.shape == ()


def test_a_mass_of_no_parameter_is_refused() -> None:
    for masses in ({"nope": 1.0}, None, [1.0]):
        with pytest.raises(InvalidArgument, match="by the name of a parameter"):
            NET.with_masses(masses)


def test_the_step_is_what_the_weight_moved_by_with_the_multiplier_and_beside_the_decay() -> None:
    method = agd(NET, SquareLoss(), decay=0.4, momentum=None)
    params = NET.init(0, dtype=torch.float64)
    grads = torch.func.grad(method.objective)(params, gaussian(8, 4), gaussian(8, 3, seed=1))
    grads["0.weight"] = torch.zeros_like(grads["0.weight"])
    updates, state = method.update(grads, method.init(params), params)
    shares = {share.name: share for share in explain(method, state, {"2.weight": 0.5}).shares}
    for name, multiplier in ((list(params)[1], 1.0), ("2.weight", 0.5)):
        share, norm = shares[name], NET.weights()[name].norm
        along = norm.size(multiplier * updates[name] + share.decayed * params[name])
        # singular values of a polar factor end between 0.997 and 1
        assert share.moved == pytest.approx(float(along), rel=3e-3)
        assert share.decayed == pytest.approx(multiplier * 0.4 * float(state.t))
    # a zero gradient moves nothing, by decay neither
    assert (shares["0.weight"].moved, shares["0.weight"].decayed) == (0, 0)
    assert not updates["0.weight"].any()
    text = str(explain(method, state))
    assert "decay" in text
    assert "decay" not in str(explain(agd(NET, SquareLoss()), run(agd(NET, SquareLoss()), 1)[1]))


def test_what_a_decay_spares_is_told_with_its_kind() -> None:
    net = Linear(Logits(5), 16) @ Bias(16) @ ReLU() @ Linear(16, 8)
    grads = {name: torch.ones_like(value) for name, value in net.init(0).items()}

    def told(loss: Loss, **options: Any) -> Explanation:
        method = agd(net, loss, **options)
        return explain(method, method.update(grads, method.init(net.init(0)), net.init(0))[1])

    fading = told(CrossEntropy(), decay=Fading())
    assert [share.spared for share in fading.shares] == [None, "vector", "logits"]
    assert [share.decayed > 0 for share in fading.shares] == [True, False, False]
    assert "none: logits" in str(fading)
    # to another loss outputs are features; and relative decay spares nothing
    square = Linear(5, 16) @ Bias(16) @ ReLU() @ Linear(16, 8)
    assert agd(square, SquareLoss(), decay=Fading()).spared("3.weight") is None
    for plain in (told(CrossEntropy(), decay=0.1), told(CrossEntropy())):
        assert [share.spared for share in plain.shares] == [None] * 3
        assert "none:" not in str(plain)
