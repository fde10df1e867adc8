"""Stretch: weights whose way from the averaged weights still leads downhill go further, and none goes less far."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modula_agd import (
    AGD,
    Bias,
    CrossEntropy,
    Embedding,
    InvalidArgument,
    Linear,
    Logits,
    Method,
    Module,
    ReLU,
    RMSNorm,
    SquareLoss,
    agd,
    from_torch,
    published,
    residual,
)
from modula_agd.averaging import averaged
from modula_agd.bond import LinearBond
from modula_agd.bound import Gain
from modula_agd.curvature import mean_multiple
from modula_agd.state import WAYS, State
from modula_agd.stretch import FIRST, MOST, PAST, SOON, STEADY, spent, stretched
from modula_agd.stretch import PLAIN as NEAR
from support import assert_steps_of_the_pure_form, batch, gaussian, gradients, seeded

NET = Linear(3, 6) @ ReLU() @ Linear(6, 4)
NORMED = RMSNorm() @ NET
TRUE = torch.tensor(True)
PLAIN: dict[str, Any] = {"curvature": "declared", "balance": "declared", "relaxation": 1.0, "step_average": None}


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


FAR = numbers(MOST, MOST)


def before(steps: int, promise: tuple[float, float], stretch: float = 1.0) -> State:
    """A state after so many steps, of which the last foresaw all that was promised."""
    state = agd(NET, SquareLoss()).init(NET.init(0, dtype=torch.float64))
    slopes = numbers(*promise) / (1 - 5 / (max(steps, 1) + 4)) if steps > 1 else numbers(0, 0)
    return state._replace(steps=torch.tensor(steps), stretches=numbers(stretch, stretch), slopes=slopes)


def train(method: Method, grads: Any, steps: int, seed: int = 0) -> tuple[list[State], list[float]]:
    """States of a run in the pure form, and −⟨g, w − w̄⟩ of each weight after it with the last gradients."""
    params: Mapping[str, Tensor] = method.network.init(seed, dtype=torch.float64)
    state, average, found = method.init(params), None, []
    for step in range(steps):
        updates, state = method.update(grads(params, step), state, params, average=average)
        params = {name: weight + updates[name] for name, weight in params.items()}
        average = averaged(average, params, step + 1)
        found.append(state)
    assert average is not None
    last = grads(params, steps)
    left = [-float((last[name] * (weight - average[name])).sum()) for name, weight in params.items()]
    return found, left


@given(
    st.integers(0, 5000),
    st.floats(1, MOST),
    st.tuples(st.floats(-5, 5), st.floats(-5, 5)),
    st.tuples(st.floats(-5, 5), st.floats(-5, 5)),
)
def test_a_stretch_moves_by_one_over_the_steps_and_stays_within_its_bounds(
    steps: int, stretch: float, promise: tuple[float, float], left: tuple[float, float]
) -> None:
    found = stretched(before(steps, promise, stretch), numbers(*left), numbers(0, 0), TRUE, FAR)["stretches"].tolist()
    for x, e, h in zip(found, promise, left, strict=True):
        assert 1 <= x <= MOST
        if steps < FIRST or h == 0:
            assert x == stretch
            continue
        assert abs(math.log(x / stretch)) <= 1 / max(steps, SOON) + 1e-12
        assert (x - stretch) * (PAST * e - h) >= -1e-12


def test_what_lags_goes_further_and_what_is_past_its_minimiser_goes_back() -> None:
    state, heard = before(100, (1.0, 1.0), 2.0), numbers(0, 0)
    for left, factor in ((-1.0, math.exp(0.01)), (PAST, 1.0), (1.0, math.exp(-0.006))):
        found = stretched(state, numbers(left, left), heard, TRUE, FAR)["stretches"]
        assert found.tolist() == pytest.approx([2 * factor] * 2)
    back = numbers(-1.0, -1.0)
    assert stretched(state, back, heard, ~TRUE, FAR)["stretches"].tolist() == [2.0, 2.0]
    assert stretched(state, numbers(math.nan, -math.inf), heard, TRUE, FAR)["stretches"].tolist() == [2.0, 2.0]
    # one row of the second is not touched, and the first stands still
    assert stretched(state, back, numbers(0, 1), TRUE, FAR)["stretches"].tolist() == [2 * math.exp(0.01), 2.0]
    assert stretched(state._replace(rates=numbers(0, 1)), back, heard, TRUE, FAR)["stretches"][0] == 2.0


def test_on_a_slope_that_stays_what_steps_foresaw_is_what_is_left() -> None:
    """A constant gradient: −h_k = e_k, so that every weight goes further, twice as far in a run that is twice as long."""
    constant = {name: gaussian(*weight.shape, seed=7) for name, weight in NET.init(0).items()}
    method = agd(NORMED, SquareLoss(), decay=0.0, **PLAIN)
    states, left = train(method, lambda *_: constant, 120)
    last = states[-1]
    c = 5 / (120 + 4)
    made = last.t * last.stretches * last.portions * last.sizes * last.descents
    assert last.slopes.tolist() == pytest.approx(made.tolist())
    assert ((1 - c) * (last.foreseen + last.slopes)).tolist() == pytest.approx(left, rel=1e-9)
    wanted = math.exp(sum(1 / max(n, SOON) for n in range(FIRST, 120)))
    assert last.stretches.tolist() == pytest.approx([wanted] * 2, rel=1e-9)
    far, _ = train(method, lambda *_: constant, 700)
    assert far[-1].stretches.tolist() == [MOST] * 2
    near, _ = train(agd(NET, SquareLoss(), **PLAIN), lambda *_: constant, 700)
    assert near[-1].stretches.tolist() == [NEAR] * 2


class Compared(LinearBond):
    """A rule of a user's own that looks at a magnitude, and so wants numbers."""

    gain = Gain.exact(1.0, "nothing happens", "any")

    def forward(self, x: Tensor) -> Tensor:
        return x

    def propagate(self, x: Any, step: Any, path: str = "") -> Any:
        return x if x.magnitude >= 0 else None


def test_weights_go_far_where_the_declared_output_does_not_grow_with_them() -> None:
    def reaches(net: Module, **options: Any) -> list[float]:
        method = agd(net, SquareLoss(), **options)
        return method._plan(torch.device("cpu")).reaches.tolist()

    assert reaches(NET) == [NEAR] * 2
    assert reaches(NORMED) == [MOST] * 2
    # outputs that grow with one weight alone compound nothing, a bias beside it or not
    head = Linear(4, 3)
    assert reaches(head @ NORMED) == reaches(head) + [MOST] * 2 == [MOST] * 3
    assert reaches(Bias(4) @ head @ NORMED) == [MOST] * 4
    assert reaches(Linear(5, 4) @ ReLU() @ head @ NORMED) == [MOST, MOST, NEAR, NEAR]
    stack = residual(Linear(4, 4) @ ReLU() @ Linear(4, 4), 2)
    assert reaches(Linear(5, 4) @ RMSNorm() @ stack) == [MOST] * 5
    assert reaches(Linear(5, 4) @ stack) == [NEAR] * 5
    assert reaches(NORMED, stretch="declared") == []
    assert reaches(RMSNorm() @ Linear(4, 6) @ Compared() @ Linear(6, 3)) == [MOST] * 2


def test_of_a_captured_model_weights_go_far_where_it_normalises() -> None:
    def reaches(*layers: torch.nn.Module, shape: tuple[int, ...] = (16, 4)) -> set[float]:
        network = from_torch(torch.nn.Sequential(*layers), gaussian(*shape).float(), scores=True)
        return set(agd(network, CrossEntropy())._plan(torch.device("cpu")).reaches.tolist())

    first, last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
    assert reaches(first, torch.nn.ReLU(), last) == {1.0}
    assert reaches(first, torch.nn.LayerNorm(8), torch.nn.ReLU(), last) == {NEAR}
    assert reaches(first, torch.nn.BatchNorm1d(8), torch.nn.ReLU(), last) == {NEAR}
    assert reaches(first, torch.nn.Tanh(), last) == {1.0}
    # one weight alone compounds nothing
    assert reaches(torch.nn.Linear(4, 3)) == {NEAR}
    deep = [layer for _ in range(260) for layer in (torch.nn.Linear(4, 4), torch.nn.ReLU())]
    assert reaches(*deep, torch.nn.Linear(4, 3)) == {1.0}
    kernels = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(128, 3)]
    assert reaches(*kernels, shape=(16, 3, 6, 6)) == {1.0}
    with torch.no_grad():
        last.weight.zero_()
    assert reaches(first, torch.nn.LayerNorm(8), last) == {NEAR}


def test_steps_are_stretched_and_nothing_else_is() -> None:
    constant = {name: gaussian(*weight.shape, seed=7) for name, weight in NET.init(0).items()}
    method = agd(NET, SquareLoss(), **PLAIN)
    params = NET.init(0, dtype=torch.float64)
    state = train(method, lambda *_: constant, 60)[0][-1]
    short, plain = method.update(constant, state._replace(stretches=torch.ones(2).double()), params)
    far, after = method.update(constant, state._replace(stretches=numbers(2.0, 3.0)), params)
    for (name, update), x in zip(far.items(), (2.0, 3.0), strict=True):
        torch.testing.assert_close(update, x * short[name])
    assert after.t == plain.t
    assert after.change == plain.change
    gains = method.gains(after)
    assert float(after.due / plain.due) == pytest.approx(float(gains @ numbers(2.0, 3.0) / gains.sum()))


def test_weights_that_swing_about_a_minimum_are_not_stretched() -> None:
    """A square loss of the weights alone with noise on its gradients: at rest the slope of the way is past its minimum."""

    def noisy(params: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        return {
            name: weight + 2 * gaussian(*weight.shape, seed=100 * step + at)
            for at, (name, weight) in enumerate(params.items())
        }

    states, _ = train(agd(NET, SquareLoss(), **PLAIN), noisy, 400)
    assert states[-1].stretches.max() < 1.5


def valley(params: Mapping[str, Tensor], _step: int) -> dict[str, Tensor]:
    """Gradients of a quadratic of each weight alone, without noise, a hundred times as curved along its last entry as along its first."""
    return {
        name: torch.logspace(0, 2, weight.numel(), dtype=weight.dtype).reshape(weight.shape) * (weight - 1)
        for name, weight in params.items()
    }


def test_what_a_step_brought_is_the_fall_of_a_quadratic() -> None:
    method = agd(NORMED, SquareLoss(), refresh=1)
    params: Mapping[str, Tensor] = NORMED.init(0, dtype=torch.float64)
    state = method.init(params)
    for step in range(30):
        before, grads = params, valley(params, step)
        updates, state = method.update(grads, state, params)
        params = {name: weight + updates[name] for name, weight in params.items()}
    after = valley(params, 30)
    left = torch.stack([(after[name] * u).sum() for name, u in state.directions.items()])
    brought = [0.5 * float(((before[n] - 1) * grads[n] - (params[n] - 1) * after[n]).sum()) for n in params]
    reach = state.sizes * numbers(*method.masses.values()) * state.stretches
    one = torch.ones((), dtype=torch.float64)
    assert spent(state, left, reach, one).tolist() == pytest.approx(brought, rel=1e-9)
    # noise leaves a slope as it was foreseen
    assert torch.equal(spent(state, left, reach, 0 * one), state.slopes)
    half = state.slopes - spent(state, left, reach, one / 2)
    torch.testing.assert_close(half * 2**STEADY, state.slopes - spent(state, left, reach, one))
    # nothing is known of a weight without a gradient, nor of one that did not move
    assert torch.equal(spent(state, 0 * left, reach, one), state.slopes)
    assert torch.equal(spent(state._replace(descents=0 * left), left, reach, one), state.slopes)
    still = state._replace(slopes=0 * left)
    assert torch.equal(spent(still, left, reach, one), still.slopes)


def test_what_steady_steps_use_up_is_no_reason_to_go_further(monkeypatch) -> None:
    """They cross a valley and come back: by slopes alone each seems to have brought much, and weights are stretched ever further."""

    def stretch() -> float:
        return float(train(agd(NORMED, SquareLoss()), valley, 400)[0][-1].stretches.max())

    assert stretch() < 1.1
    monkeypatch.setattr("modula_agd.directed.spent", lambda state, *_: state.slopes)
    assert stretch() > 1.6


def test_the_optimizer_stretches_as_the_pure_form_does() -> None:
    for averaging in (True, False):
        model = NET.to_torch(0)
        optimizer = AGD(model, SquareLoss(), averaging=averaging)
        method = optimizer.method

        def grads(params: dict[str, Tensor], step: int) -> dict[str, Tensor]:
            return {name: gaussian(*weight.shape, seed=7, dtype=weight.dtype) for name, weight in params.items()}

        state = assert_steps_of_the_pure_form(optimizer, model, method, grads, 60)
        torch.testing.assert_close(optimizer.current.stretches, state.stretches, rtol=1e-3, atol=0)
        assert (state.stretches.max() > 1.01) == averaging


def test_a_weight_that_stands_still_foresees_nothing_and_keeps_its_stretch() -> None:
    model = NET.to_torch(0)
    first, *others = model.parameters()
    optimizer = AGD(model, SquareLoss(), groups=[{"params": [first], "lr": 0.0}, {"params": others}])
    x, y = (z.float() for z in batch(0, 64))
    for _ in range(40):
        optimizer.zero_grad()
        SquareLoss()(model(x), y).backward()
        optimizer.step()
    assert optimizer.current.foreseen[0] == 0
    assert optimizer.current.stretches[0] == 1
    assert optimizer.current.foreseen[1] != 0
    optimizer.param_groups[1]["lr"] = 0.0
    still = optimizer.current.stretches.clone()
    for _ in range(40):
        optimizer.zero_grad()
        SquareLoss()(model(x), y).backward()
        optimizer.step()
    # the first of these steps was told of one that moved
    assert (optimizer.current.stretches / still).log().abs().max() <= 1 / SOON


@pytest.mark.parametrize("spoilt_by", [math.nan, math.inf, -math.inf])
def test_a_skipped_step_stretches_nothing(spoilt_by: float) -> None:
    method = agd(NET, SquareLoss(), nonfinite="skip")
    params = NET.init(0, dtype=torch.float64)
    state, average = method.init(params), None
    for step in range(50):
        grads = gradients(method, params, *batch(step % 2, 32))
        if step == 45:
            spoilt = {name: torch.full_like(gradient, spoilt_by) for name, gradient in grads.items()}
            _, odd = method.update(spoilt, state, params, average=average)
            assert torch.equal(odd.stretches, state.stretches)
            assert odd.foreseen.isfinite().all()
            assert odd.due == 0
            assert odd.slopes.tolist() == [0.0, 0.0]
            state = odd
            average = averaged(average, params, step + 1)
            continue
        updates, state = method.update(grads, state, params, average=average)
        params = {name: weight + updates[name] for name, weight in params.items()}
        average = averaged(average, params, step + 1)
    assert state.stretches.isfinite().all()
    assert state.foreseen.isfinite().all()


def test_a_compiled_update_stretches_alike() -> None:
    method = agd(NET, SquareLoss(), refresh=1)
    torch.compiler.reset()
    compiled = torch.compile(method.update, backend="eager", fullgraph=True)
    params = NET.init(0, dtype=torch.float64)
    state, average = method.init(params), None
    for step in range(40):
        grads = {name: gaussian(*weight.shape, seed=7) for name, weight in params.items()}
        updates, after = method.update(grads, state, params, average=average)
        same, other = compiled(grads, state, params, average=average)
        for name, update in updates.items():
            torch.testing.assert_close(same[name], update)
        for field in ("stretches", *WAYS):
            torch.testing.assert_close(getattr(other, field), getattr(after, field))
        params = {name: weight + updates[name] for name, weight in params.items()}
        state, average = after, averaged(average, params, step + 1)
    assert state.stretches.max() > 1


def test_decay_is_foreseen() -> None:
    """What decay takes is of the way: on a slope that stays, what steps foresaw is what is left with decay, too."""
    constant = {name: gaussian(*weight.shape, seed=7) for name, weight in NET.init(0).items()}
    states, left = train(agd(NET, SquareLoss(), decay=1.0, **PLAIN), lambda *_: constant, 120)
    last = states[-1]
    assert ((1 - 5 / 124) * (last.foreseen + last.slopes)).tolist() == pytest.approx(left, rel=1e-9)
    made = last.t * last.stretches * last.portions * last.sizes * last.descents
    assert all(last.slopes < 0.95 * made)


def test_rows_that_are_seldom_touched_are_not_stretched() -> None:
    net = Embedding(4, 30)
    (name,), constant = net.weights(), gaussian(30, 4, seed=7)
    for density, grows in ((0.1, False), (1.0, True)):
        method = agd(net, SquareLoss(), **PLAIN)
        params, average = net.init(0, dtype=torch.float64), None
        state = method.init(params)
        for step in range(100):
            touched = torch.rand(30, generator=seeded(step)) < density
            updates, state = method.update({name: constant * touched[:, None]}, state, params, average=average)
            params = {name: params[name] + updates[name]}
            average = averaged(average, params, step + 1)
        assert (state.stretches.item() > 3) == grows
        assert state.stretches.item() == 1 or grows


def test_an_average_that_starts_anew_has_no_way_behind_it() -> None:
    """An average that another optimizer kept is let go by one that keeps none, and a state that is put in place begins one."""
    model = NET.to_torch(0)
    optimizer = AGD(model, SquareLoss())
    x, y = (z.float() for z in batch(0, 64))
    for _ in range(30):
        optimizer.zero_grad()
        SquareLoss()(model(x), y).backward()
        optimizer.step()
    assert optimizer.current.foreseen.abs().min() > 0
    plain = AGD(model, SquareLoss(), averaging=False)
    plain.load_state_dict(optimizer.state_dict())
    assert not any("average" in entry for entry in plain.state.values())
    optimizer.zero_grad()
    SquareLoss()(model(x), y).backward()
    plain.step()
    assert plain.current.foreseen.tolist() == [0.0, 0.0]
    fresh = AGD(model, SquareLoss())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    fresh.current = optimizer.current
    for field in WAYS:
        assert getattr(fresh.current, field).tolist() == [0.0, 0.0]
    for name, value in fresh.averaged_state().items():
        assert torch.equal(value, dict(model.named_parameters())[name])


def test_a_mean_multiple_weighs_by_what_descends() -> None:
    assert float(mean_multiple(numbers(2.0, 4.0), numbers(1.0, 1.0))) == 3
    assert float(mean_multiple(numbers(2.0, 4.0), numbers(1.0, -5.0))) == 2
    assert float(mean_multiple(numbers(2.0, 4.0), numbers(0.0, -5.0))) == 1
    assert float(mean_multiple(numbers(2.0, 4.0), numbers(math.inf, 1.0))) == 1


def test_which_methods_stretch() -> None:
    assert agd(NET, SquareLoss()).stretch == "measured"
    assert agd(NET, SquareLoss(), momentum=None).stretch == "declared"
    assert published(NET, SquareLoss()).stretch == "declared"
    assert any("stretched" in x for x in agd(NET, SquareLoss()).certificate().assumptions)
    assert not any("stretched" in x for x in agd(NET, SquareLoss(), stretch="declared").certificate().assumptions)
    method = agd(NET, SquareLoss(), stretch="declared")
    states, _ = train(method, lambda params, step: gradients(method, params, *batch(step % 2, 32)), 60)
    assert states[-1].stretches.tolist() == [1.0, 1.0]


def test_bad_options_and_averages_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="stretch"):
        agd(NET, SquareLoss(), stretch="far")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="measured stretch without momentum"):
        agd(NET, SquareLoss(), momentum=None, stretch="measured")
    with pytest.raises(InvalidArgument, match="averaging=False"):
        AGD(NET.to_torch(0), SquareLoss(), stretch="measured", averaging=False)
    method = agd(NET, SquareLoss())
    params = NET.init(0, dtype=torch.float64)
    grads, state = gradients(method, params, *batch(0)), method.init(params)
    for odd, told in (
        ({"0.weight": torch.zeros(2, 2)}, r"\(2, 2\), where the parameter has \(6, 4\)"),
        ({"0.weight": 3.0}, "float"),
        ([params], "dictionary"),
        ({"module.0.weight": torch.zeros(6, 4)}, "none is a parameter"),
    ):
        with pytest.raises(InvalidArgument, match=f"averaged weights.*{told}"):
            method.update(grads, state, params, average=odd)  # type: ignore[arg-type]


def test_explain_tells_what_went_further() -> None:
    network = Linear(Logits(3), 6) @ ReLU() @ Linear(6, 4)
    model = network.to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    x, labels = gaussian(64, 4, seed=3).float(), torch.arange(64) % 3
    for step in range(80):
        if step == 10:
            assert "stretch" not in str(optimizer.explain())
        optimizer.zero_grad()
        CrossEntropy()(model(x), labels).backward()
        optimizer.step()
    found = optimizer.explain()
    assert [share.stretch for share in found.shares] == optimizer.current.stretches.tolist()
    assert max(share.stretch for share in found.shares) > 1.01
    assert "stretch" in str(found)


def test_a_multiplier_that_is_no_number_leaves_no_trace() -> None:
    model, rate = NET.to_torch(0), torch.tensor(1.0)
    optimizer = AGD(model, SquareLoss(), refresh=1, capturable=True)
    optimizer.param_groups[0]["lr"] = rate
    x, y = (z.float() for z in batch(0, 64))
    for step in range(60):
        rate.fill_({30: math.nan, 40: math.inf, 45: -1.0}.get(step, 1.0))
        optimizer.zero_grad()
        SquareLoss()(model(x), y).backward()
        optimizer.step()
        if step in (30, 40, 45):
            assert optimizer.current.due == 0
            assert optimizer.current.rates.tolist() == [0.0, 0.0]
    assert optimizer.current.foreseen.isfinite().all()
    AGD(NET.to_torch(0), SquareLoss(), refresh=1, capturable=True).load_state_dict(optimizer.state_dict())


def test_a_method_that_does_not_stretch_undoes_what_another_stretched() -> None:
    measured, declared = agd(NET, SquareLoss()), agd(NET, SquareLoss(), stretch="declared")
    params = NET.init(0, dtype=torch.float64)
    grads = gradients(measured, params, *batch(0))
    state = measured.update(grads, measured.init(params), params)[1]._replace(stretches=numbers(3.0, 2.0))
    far, _ = measured.update(grads, state, params)
    short, after = declared.update(grads, state, params)
    for (name, update), x in zip(far.items(), (3.0, 2.0), strict=True):
        torch.testing.assert_close(update, x * short[name])
    assert after.stretches.tolist() == [1.0, 1.0]
    for field in WAYS:
        assert getattr(after, field).tolist() == [0.0, 0.0]


def test_an_average_that_a_loaded_state_lacks_starts_at_the_weights_of_the_next_step() -> None:
    """Whether the state or the weights are loaded first."""
    model = NET.to_torch(0)
    optimizer = AGD(model, SquareLoss(), averaging=False)
    x, y = (z.float() for z in batch(0, 64))

    def step(model: Any, optimizer: AGD) -> None:
        optimizer.zero_grad()
        SquareLoss()(model(x), y).backward()
        optimizer.step()

    for _ in range(50):
        step(model, optimizer)
    for put in ("load", "set"):
        other = NET.to_torch(7)
        fresh = AGD(other, SquareLoss())
        if put == "load":
            fresh.load_state_dict(optimizer.state_dict())
        else:
            fresh.current = optimizer.current
        other.load_state_dict(model.state_dict())
        for name, value in fresh.averaged_state().items():
            assert torch.equal(value, model.state_dict()[name])
        for field in WAYS:
            assert getattr(fresh.current, field).tolist() == [0.0, 0.0]
        step(other, fresh)
        for name, value in fresh.averaged_state().items():
            before, now = model.state_dict()[name], other.state_dict()[name]
            torch.testing.assert_close(value, before + 5 / (51 + 4) * (now - before))


def test_averages_that_ask_for_gradients_leave_no_graph() -> None:
    method = agd(NET, SquareLoss())
    params = NET.init(0)
    grads, state = gradients(method, params, *[z.float() for z in batch(0)]), method.init(params)
    for _ in range(25):
        average = {name: torch.nn.Parameter(weight + 1) for name, weight in params.items()}
        updates, state = method.update(grads, state, params, average=average)
    assert not any(value.requires_grad for value in (*updates.values(), state.stretches, state.due))
