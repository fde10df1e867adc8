"""Averaged steps: the mean of what majorants asked for, and at most twice the mean of the recent ones."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modula_agd import (
    AGD,
    CrossEntropy,
    InvalidArgument,
    Linear,
    Logits,
    Method,
    ReLU,
    SquareLoss,
    agd,
    explain,
    published,
)
from modula_agd.step_average import MEMORY, MOST, averaged
from support import batch, gaussian, gradients

NET = Linear(3, 6) @ ReLU() @ Linear(6, 4)
BETA = 0.9
TRUE = torch.tensor(True)


def reference(steps: list[float], power: float, *, recent: bool = False) -> float:
    """The mean by its recursion, from the number of steps alone; of the recent ones, of the last fifty or the last fifth."""
    mean = 0.0
    for n, step in enumerate(steps, start=1):
        least = min(1 - MEMORY, 5 / (n + 4)) if recent else 0.0
        mean += max((power + 1) / (n + power), least) * (step - mean)
    return mean


def run(steps: list[float], power: float) -> tuple[list[float], list[float], list[float]]:
    """t, and the two means, after each step."""
    state = agd(NET, SquareLoss()).init(NET.init(0, dtype=torch.float64))
    told: list[tuple[float, float, float]] = []
    for step in steps:
        t, means = averaged(torch.tensor(step, dtype=torch.float64), state, power, TRUE)
        state = state._replace(**means)
        told.append((float(t), float(state.asked), float(state.recent)))
    first, second, third = zip(*told, strict=True)
    return list(first), list(second), list(third)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.integers(0, 8))
def test_the_mean_is_the_polynomial_average_of_all_steps(steps: list[float], power: int) -> None:
    _, asked, _ = run(steps, power)
    # of integer ρ, the weights of the recursion are the products i·(i + 1)…(i + ρ − 1)
    weights = [math.prod(range(i, i + power)) for i in range(1, len(steps) + 1)]
    whole = sum(w * x for w, x in zip(weights, steps, strict=True)) / sum(weights)
    assert asked[-1] == pytest.approx(whole, rel=1e-9, abs=1e-12)
    assert min(steps) * (1 - 1e-12) <= asked[-1] <= max(steps) * (1 + 1e-12)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=200), st.floats(0, 8))
def test_a_step_is_at_most_twice_the_mean_of_recent_ones(steps: list[float], power: float) -> None:
    found, asked, recent = run(steps, power)
    for t, mean, last in zip(found, asked, recent, strict=True):
        assert t == min(mean, MOST * last)
    assert recent[-1] == pytest.approx(reference(steps, power, recent=True), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [(200, 100, 2 * 0.98**46 * (246 / 300) ** 5), (2000, 1200, 2 * (2000 / 3200) ** 5)],
)
def test_where_steps_that_majorants_ask_for_collapse_the_step_follows(before: int, after: int, left: float) -> None:
    """Steps of 1, then of 0: within a hundred in a short run, within half as many again in a long one. The mean alone takes far longer."""
    found, asked, _ = run([1.0] * before + [0.0] * after, 1.0)
    assert asked[-1] == pytest.approx((before / (before + after)) ** 2, rel=0.01)
    assert found[-1] == pytest.approx(left, rel=0.02)
    assert found[-1] < 0.7 * asked[-1]


def test_fifty_majorants_that_ask_for_nothing_do_not_stop_a_long_run() -> None:
    """As noise alone makes them do; with a mean of the last fifty for a limit the step would come to 0.73 of itself, and on."""
    found, asked, _ = run([1.0] * 3000 + [0.0] * 50, 1.0)
    assert found[-1] == asked[-1] > 0.96


def test_a_step_grows_no_faster_than_its_mean() -> None:
    up, means, _ = run([1.0] * 1000 + [3.0] * 50, 1.0)
    assert up[-1] == means[-1] < 1.3


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_every_step_is_the_mean_of_what_the_majorants_asked_for(power: float) -> None:
    """Against the same updates without averaging, from the same states."""
    method = agd(NET, SquareLoss(), momentum=BETA, step_average=power)
    newest = agd(NET, SquareLoss(), momentum=BETA, step_average=None)
    params, asked = NET.init(0, dtype=torch.float64), []
    state = method.init(params)
    for step in range(25):
        grads = gradients(method, params, *batch(step))
        single, alone = newest.update(grads, state, params)
        updates, state = method.update(grads, state, params)
        asked.append(float(alone.t))
        mean = min(reference(asked, power), MOST * reference(asked, power, recent=True))
        assert float(state.t) == pytest.approx(mean, rel=1e-9)
        assert float(state.eta) == pytest.approx(mean * float(state.depth), rel=1e-9)
        for name, update in updates.items():
            if alone.t > 0:
                torch.testing.assert_close(update, single[name] * (mean / asked[-1]), rtol=1e-8, atol=1e-12)
        params = {name: weight + updates[name] for name, weight in params.items()}
    assert len(set(asked)) == 25


@pytest.mark.parametrize("relaxation", [1.0, 2.0])
@pytest.mark.parametrize("power", [None, 1.0])
def test_what_is_predicted_is_the_majorant_at_the_step_that_is_made(power: float | None, relaxation: float) -> None:
    method = agd(NET, SquareLoss(), momentum=BETA, curvature="declared", relaxation=relaxation, step_average=power)
    params, rises = NET.init(0, dtype=torch.float64), 0
    state = method.init(params)
    for step in range(60):
        updates, state = method.update(gradients(method, params, *batch(step)), state, params)
        mean = max(float(state.smoothed / state.weight), 0.0) if float(state.weight) else 0.0
        bound = NET.bound(float(state.t), constants="typical")
        rise = SquareLoss().bound(bound.magnitude * (bound.growth - 1))
        assert float(state.change) == pytest.approx(-float(state.t) * mean + rise, rel=2e-4, abs=1e-4 * rise + 1e-12)
        rises += int(state.change > 0)
        params = {name: weight + updates[name] for name, weight in params.items()}
    # a step longer than twice the newest minimiser is not promised to descend, and the minimiser itself always is
    assert (rises > 0) == (power is not None or relaxation > 1)


def pure(method: Method, noise: float, steps: int, drift: float) -> list[float]:
    """t of each step on weights that stay, of gradients of noise about ``drift``·W."""
    params = NET.init(0, dtype=torch.float64)
    state, lengths = method.init(params), []
    for step in range(steps):
        grads = {
            n: drift * p + noise * gaussian(*p.shape, seed=1000 * step + i) for i, (n, p) in enumerate(params.items())
        }
        _, state = method.update(grads, state, params)
        lengths.append(float(state.t))
    return lengths


def test_where_descents_are_mostly_noise_averaged_steps_are_evener_and_as_long() -> None:
    settings = {"curvature": "declared", "relaxation": 1.0}
    even = pure(agd(NET, SquareLoss(), **settings), 1.0, 400, drift=0.3)[200:]
    newest = pure(agd(NET, SquareLoss(), step_average=None, **settings), 1.0, 400, drift=0.3)[200:]

    def spread(steps: list[float]) -> float:
        mean = math.fsum(steps) / len(steps)
        return math.sqrt(math.fsum((t - mean) ** 2 for t in steps) / len(steps)) / mean

    assert spread(even) < 0.1 < 0.3 < spread(newest)
    assert sum(even) == pytest.approx(sum(newest), rel=0.1)


def test_left_out_steps_leave_the_means_as_they_were() -> None:
    method = agd(NET, SquareLoss(), nonfinite="skip", curvature="declared")
    params = NET.init(0, dtype=torch.float64)
    bad = {name: torch.full_like(value, math.nan) for name, value in params.items()}
    _, first = method.update(bad, method.init(params), params)
    assert first.asked == first.recent == 0
    _, state = method.update(gradients(method, params, *batch(0)), first, params)
    _, alone = method.update(gradients(method, params, *batch(0)), method.init(params), params)
    assert state.t == alone.t > 0
    _, skipped = method.update(bad, state, params)
    assert (skipped.asked, skipped.recent, int(skipped.skipped)) == (state.asked, state.recent, 2)
    _, after = method.update(gradients(method, params, *batch(1)), skipped, params)
    _, expected = method.update(gradients(method, params, *batch(1)), alone, params)
    assert float(after.t) == pytest.approx(float(expected.t), rel=1e-12)


def test_steps_without_a_gradient_do_not_count_as_steps_of_0() -> None:
    method = agd(NET, SquareLoss())
    params = NET.init(0, dtype=torch.float64)
    state = method.init(params)
    for _ in range(5):
        _, state = method.update({}, state, params)
    assert (state.t, state.majorants) == (0, 0)
    _, after = method.update(gradients(method, params, *batch(0)), state, params)
    assert after.t == after.asked > 0
    assert after.majorants == 1


def test_a_state_of_steps_that_were_not_averaged_begins_its_means_anew() -> None:
    single, method = agd(NET, SquareLoss(), step_average=None), agd(NET, SquareLoss())
    params = NET.init(0, dtype=torch.float64)
    state = single.init(params)
    for step in range(50):
        _, state = single.update(gradients(single, params, *batch(step)), state, params)
    wanted = single.update(gradients(single, params, *batch(99)), state, params)[1].t
    assert method.update(gradients(method, params, *batch(99)), state, params)[1].t == wanted > 0


def test_where_descents_vanish_the_limit_holds_the_step() -> None:
    """Through the whole update: two hundred steps of a gradient, then of a thousandth of it."""
    method = agd(NET, SquareLoss())
    params = NET.init(0, dtype=torch.float64)
    state, grads = method.init(params), gradients(method, params, *batch(0))
    faint = {name: value / 1000 for name, value in grads.items()}
    for step in range(360):
        _, state = method.update(grads if step < 200 else faint, state, params)
        assert float(state.t) == pytest.approx(min(float(state.asked), MOST * float(state.recent)), rel=1e-12)
        if step == 199:
            before = float(state.t)
    assert float(state.t) == pytest.approx(MOST * float(state.recent), rel=1e-12)
    assert float(state.t) < 0.8 * float(state.asked) < 0.8 * before


def test_an_explanation_tells_the_means() -> None:
    method = agd(NET, SquareLoss())
    params = NET.init(0, dtype=torch.float64)
    _, state = method.update(gradients(method, params, *batch(0)), method.init(params), params)
    told = explain(method, state)
    assert told.asked == told.recent == float(state.t)
    assert "asked for" in str(told)
    single = agd(NET, SquareLoss(), step_average=None)
    _, state = single.update(gradients(single, params, *batch(0)), single.init(params), params)
    assert explain(single, state).asked is None
    assert "asked for" not in str(explain(single, state))


def test_with_momentum_alone_steps_are_averaged() -> None:
    assert agd(NET, SquareLoss()).step_average == 1.0
    assert agd(NET, SquareLoss(), momentum=None).step_average is None
    assert published(NET, SquareLoss()).step_average is None
    assert any("averaged steps" in what for what in agd(NET, SquareLoss()).certificate().assumptions)
    assert not any("averaged steps" in x for x in agd(NET, SquareLoss(), step_average=None).certificate().assumptions)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True, "long"])
def test_what_is_no_power_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match="step_average"):
        agd(NET, SquareLoss(), step_average=value)  # type: ignore[arg-type]


def test_steps_are_not_averaged_without_momentum() -> None:
    with pytest.raises(InvalidArgument, match="without momentum"):
        agd(NET, SquareLoss(), momentum=None, step_average=1.0)


def test_a_multiplier_of_the_optimizer_leaves_the_mean_alone() -> None:
    network = Linear(Logits(3), 6) @ ReLU() @ Linear(6, 4)
    one, twice = network.to_torch(0), network.to_torch(0)
    loss = CrossEntropy()
    plain, longer = AGD(one, loss), AGD(twice, loss, [{"params": list(twice.parameters()), "lr": 2.0}])
    inputs, labels = gaussian(16, 4).float(), torch.arange(16) % 3
    for optimizer, model in ((plain, one), (longer, twice)):
        loss(model(inputs), labels).backward()
        optimizer.step()
    assert plain.current.t == longer.current.t == longer.current.asked
    assert float(longer.current.due) == pytest.approx(2 * float(plain.current.due))


def test_what_a_step_is_expected_to_use_up_is_the_bounds_curvature_along_it() -> None:
    """h·(a·D)²·t against the second difference of the majorant's own bound at 0."""
    method = agd(NET, SquareLoss())
    params = NET.init(0, dtype=torch.float64)
    _, state = method.update(gradients(method, params, *batch(0)), method.init(params), params)
    small = 1e-4
    bound = NET.bound(small, magnitude=1.0, constants="typical")
    second = 2 * float(SquareLoss().bound(bound.magnitude * (bound.growth - 1))) / small**2
    assert float(state.due) == pytest.approx(float(state.t) * second, rel=1e-3)
