"""Measured curvature: the slope that steps use up, against what the declared bound expects."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from modula_agd import (
    AGD,
    MLP,
    CrossEntropy,
    ExactGrowth,
    Fading,
    InvalidArgument,
    Linear,
    Logits,
    Loss,
    Module,
    ReLU,
    SquareLoss,
    Tanh,
    agd,
)
from modula_agd.curvature import LEAST, MEMORY, MOST, OUTPUTS, SEEN, UNKNOWN, curvature, looked_back
from modula_agd.held_out import OUTLIER
from modula_agd.train import task
from support import batch, gradients

NET = Linear(3, 6) @ Tanh() @ Linear(6, 4)
BETA = 0.8


def moved(params: dict[str, Tensor], updates: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight + updates[name] for name, weight in params.items()}


def test_thirty_steps_equal_a_slow_reference() -> None:
    """Written from the formulas alone, with lists of all that was measured."""
    method = agd(NET, SquareLoss(), momentum=BETA, relaxation=1.5, balance="declared")
    params = NET.init(0, dtype=torch.float64)
    state, momentum, last, directions = method.init(params), {}, {}, {}
    slopes: list[float] = []
    asked: list[float] = []
    counts: list[tuple[float, float]] = []
    factor, due, clipped = 1.0, 0.0, 0
    for step in range(30):
        grads = gradients(method, params, *batch(step))
        if directions:
            left = sum(float((grads[name] * u).sum()) for name, u in directions.items())
            # the first step's expectation stands for a measurement of 1, too
            counts = counts or [(due, due)]
            if due > 0:
                counts.append((max(min(raw - left, MOST * due), -MOST * due), due))
            ages = [MEMORY ** (len(counts) - 1 - i) * (1 - MEMORY if i else 1.0) for i in range(len(counts))]
            fallen, expected = (sum(w * x for w, x in zip(ages, xs, strict=True)) for xs in zip(*counts, strict=True))
        nu = 2 * (1 - BETA)
        source = {n: (1 - nu) * m + nu * last[n] for n, m in momentum.items()} or grads
        directions = {name: atom.norm.direction(source[name]).dense() for name, atom in NET.weights().items()}
        raw = sum(float((grads[name] * u).sum()) for name, u in directions.items())
        counted = raw
        if slopes:
            weights = [BETA ** (len(slopes) - 1 - i) for i in range(len(slopes))]
            spread = math.sqrt(sum(w * s * s for w, s in zip(weights, slopes, strict=True)) / sum(weights))
            counted = max(min(raw, OUTLIER * spread), -OUTLIER * spread)
        slopes.append(counted)
        weights = [BETA ** (len(slopes) - 1 - i) for i in range(len(slopes))]
        smoothed = max(sum(w * s for w, s in zip(weights, slopes, strict=True)) / sum(weights), 0.0)
        steady = smoothed**2 / (sum(w * s * s for w, s in zip(weights, slopes, strict=True)) / sum(weights))
        if counts:
            noise = (1 - BETA) / (1 + BETA)
            least = min(max(UNKNOWN * noise / steady, LEAST), UNKNOWN) if steady else UNKNOWN
            factor = min(max(fallen / expected, least), MOST)
            clipped += factor != fallen / expected
        plan = method._plan(torch.device("cpu"))
        majorant = method._majorant(torch.tensor(smoothed, dtype=torch.float64), plan.sizes, torch.device("cpu"), None)
        asked.append(1.5 * float(ExactGrowth().minimum(majorant.curved(torch.tensor(factor, dtype=torch.float64))).t))
        # the n-th counts n-fold
        t = sum((n + 1) * x for n, x in enumerate(asked)) / sum(range(1, len(asked) + 1))
        due = t * (plan.bound.magnitude * plan.bound.depth) ** 2

        updates, state = method.update(grads, state, params)
        assert float(method.measured_curvature(state)) == pytest.approx(factor, rel=1e-9)
        assert float(state.t) == pytest.approx(t, rel=1e-9)
        for name, u in directions.items():
            torch.testing.assert_close(updates[name], -t * u, rtol=1e-8, atol=1e-12)
        momentum = {n: BETA * momentum.get(n, 0.0) + (1 - BETA) * g for n, g in grads.items()}
        last = grads
        params = moved(params, updates)
    assert clipped < 25


def test_on_a_quadratic_the_slope_used_up_is_the_second_derivative_along_the_step() -> None:
    net = Linear(3, 4)
    method = agd(net, SquareLoss())
    params, (inputs, targets) = net.init(0, dtype=torch.float64), batch(0)
    updates, state = method.update(gradients(method, params, inputs, targets), method.init(params), params)
    t, due = float(state.t), float(state.due)
    # ½·mean (u·x)², twice differentiated along u
    second = float((inputs @ state.directions["weight"].T).square().mean())
    _, after = method.update(gradients(method, moved(params, updates), inputs, targets), state, moved(params, updates))
    assert float(after.expected) == pytest.approx(due)
    assert float(after.fallen) == pytest.approx(MEMORY * due + (1 - MEMORY) * t * second)


def test_the_slope_left_is_unbiased_over_all_minibatches() -> None:
    """The mean over fresh minibatches of what is counted is the fall of the true slope along the step."""
    method = agd(NET, SquareLoss(), momentum=BETA)
    params = NET.init(0, dtype=torch.float64)
    inputs, targets = batch(0, samples=6)
    for seed in (1, 2):
        updates, state = method.update(gradients(method, params, *batch(seed)), method.init(params), params)
        params = moved(params, updates)
    whole = gradients(method, params, inputs, targets)
    truth = float(state.descent) - sum(float((whole[name] * u).sum()) for name, u in state.directions.items())
    seen = []
    for rows in combinations(range(6), 2):
        index = torch.tensor(rows)
        _, after = method.update(gradients(method, params, inputs[index], targets[index]), state, params)
        seen.append((float(after.fallen) - MEMORY * float(state.due)) / (1 - MEMORY))
    assert math.fsum(seen) / len(seen) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("scale", [1 / 4, 4.0])
def test_weights_of_other_sizes_than_declared_are_found_out(scale: float) -> None:
    """A weight of another size makes the other's steps that much more, or less, of a change, which prescribed sizes do not see."""
    net = Linear(3, 6) @ Linear(6, 4)
    method = agd(net, SquareLoss())
    params, (inputs, targets) = net.init(0, dtype=torch.float64), batch(0, samples=32)
    inputs = inputs / inputs.square().mean(1, keepdim=True).sqrt()
    params = {name: scale * weight for name, weight in params.items()}
    state = method.init(params)
    for _ in range(40):
        updates, state = method.update(gradients(method, params, inputs, targets), state, params)
        params = moved(params, updates)
    assert float(method.measured_curvature(state)) > 1 if scale > 1 else float(method.measured_curvature(state)) < 1


def plain(depth: int, steps: int, net: Module | None = None, **options: Any) -> list[float]:
    source = task("digits", flat=True)
    net = MLP(Logits(10), 64, 64, depth) if net is None else net
    method, params = agd(net, CrossEntropy(), **options), net.init(0)
    state, values = method.init(params), []
    gradient = torch.func.grad_and_value(method.objective)
    for _, (inputs, labels) in zip(range(steps), source.batches(64, 0), strict=False):
        grads, value = gradient(params, inputs, labels)
        updates, state = method.update(grads, state, params)
        params = moved(params, updates)
        values.append(float(value))
    return values


def test_deep_plain_networks_get_the_steps_that_they_bear() -> None:
    """At twice the minimiser the declared bound lets weights outgrow their sizes: it stands at the tenfold loss, or more."""
    measured, declared = (plain(12, 200, curvature=kind, relaxation=2.0) for kind in ("measured", "declared"))
    assert sum(measured[-20:]) < sum(declared[-20:]) / 4


def unscaled(depth: int) -> Module:
    """Layers that nothing scales, as anyone would compose them: each ReLU takes three tenths of the signal."""
    net: Module = Linear(64, 64)
    for _ in range(depth - 2):
        net = Linear(64, 64) @ ReLU() @ net
    return Linear(Logits(10), 64) @ ReLU() @ net


@pytest.mark.parametrize("decay", [0.0, Fading()])
def test_a_chain_that_declares_scores_near_0_learns(decay: float | Fading) -> None:
    """Counted as they are declared, eight layers' died within some steps: their loss stayed at log 10 = 2.303."""
    losses = plain(8, 400, unscaled(8), decay=decay)
    assert max(losses) < 3
    assert sum(losses[-40:]) / 40 < 0.3


def test_scores_count_as_one_at_least_where_curvature_is_measured() -> None:
    net = unscaled(8)
    a = float(net.bound().magnitude)
    assert a == pytest.approx(0.5**3.5)

    def plan(loss: Loss, net: Module = net, **options: Any) -> tuple[float, float]:
        found = agd(net, loss, **options)._plan(torch.device("cpu"))
        return float(found.bound.magnitude), found.least

    assert plan(CrossEntropy()) == (OUTPUTS, pytest.approx(SEEN**2))
    assert plan(CrossEntropy(), magnitude=5.0) == (OUTPUTS, pytest.approx((5 * a) ** 2))
    assert plan(CrossEntropy(), MLP(Logits(10), 64, 64, 8)) == (pytest.approx(1.0), 1.0)
    # nothing is known of what other outputs come to, declared curvature is as declared, and tracked sizes follow
    features = Linear(10, 64) @ ReLU() @ Linear(64, 64) @ ReLU() @ Linear(64, 64)
    assert plan(SquareLoss(), features) == (pytest.approx(0.5), 1.0)
    for options in ({"curvature": "declared"}, {"momentum": None}, {"sizes": "tracked"}):
        assert plan(CrossEntropy(), **options) == (pytest.approx(a), 1.0)


def test_a_multiplier_is_expected_to_use_up_as_much_more() -> None:
    """Else the measurement would undo it."""
    found = {}
    for multiplier in (0.5, 1.0):
        model = NET.to_torch(0, dtype=torch.float64)
        optimizer = AGD(model, SquareLoss())
        optimizer.param_groups[0]["lr"] = multiplier
        inputs, targets = batch(0)
        SquareLoss()(model(inputs), targets).backward()
        optimizer.step()
        found[multiplier] = float(optimizer.current.due)
    assert found[0.5] == pytest.approx(0.5 * found[1.0])


def test_what_cannot_be_compared_counts_for_nothing() -> None:
    method = agd(NET, SquareLoss(), nonfinite="skip")
    params = NET.init(0, dtype=torch.float64)
    grads = gradients(method, params, *batch(0))
    _, state = method.update(grads, method.init(params), params)
    _, state = method.update(grads, state, params)
    known = (state.fallen, state.expected)
    bad = {name: torch.full_like(value, math.nan) for name, value in grads.items()}
    zero = {name: torch.zeros_like(value) for name, value in grads.items()}
    for odd in ({**grads, "0.weight": None}, zero, bad):
        _, after = method.update(odd, state, params)
        assert (after.fallen, after.expected) == known
        # and the step after that, which has nothing to look back on
        _, later = method.update(grads, after, params)
        assert later.fallen.isfinite()
        if odd is zero or odd is bad:
            assert (after.due, after.t, after.eta) == (0, 0, 0)
            assert (later.fallen, later.expected) == known
            # nor has a second one in a row
            _, again = method.update(odd, after, params)
            assert (again.fallen, again.expected) == known


def test_a_first_batch_that_is_skipped_leaves_no_nan_behind() -> None:
    method = agd(NET, SquareLoss(), nonfinite="skip")
    params = NET.init(0, dtype=torch.float64)
    good = gradients(method, params, *batch(0))
    _, state = method.update({n: torch.full_like(g, math.nan) for n, g in good.items()}, method.init(params), params)
    assert all(not u.any() for u in state.directions.values())
    for _ in range(3):
        _, state = method.update(good, state, params)
    assert float(state.expected) > 0
    assert state.fallen.isfinite()


def test_a_wild_gradient_counts_for_no_more_than_the_most() -> None:
    method = agd(NET, SquareLoss())
    params = NET.init(0, dtype=torch.float64)
    grads = gradients(method, params, *batch(0))
    state = method.init(params)
    for _ in range(5):
        _, state = method.update(grads, state, params)
    for sign in (-1e9, 1e9):
        _, after = method.update({name: sign * g for name, g in grads.items()}, state, params)
        change = abs(float(after.fallen) - MEMORY * float(state.fallen))
        assert change == pytest.approx((1 - MEMORY) * MOST * float(state.due))


def test_micro_batches_measure_before_they_make_the_direction() -> None:
    method = agd(NET, SquareLoss())
    params = NET.init(0, dtype=torch.float64)
    first, second = (gradients(method, params, *batch(seed)) for seed in (0, 1))
    updates, state = method.update(first, method.init(params), params)
    params = moved(params, updates)
    making = gradients(method, params, *batch(2))
    absorbed = method.absorb(making, state, params, 0.5)
    _, usual = method.update(making, state, params)
    assert (absorbed.fallen, absorbed.expected) == (usual.fallen, usual.expected)
    _, after = method.update(second, absorbed, params, part=0.5)
    assert (after.fallen, after.expected) == (usual.fallen, usual.expected)


def test_what_needs_no_measurement_keeps_no_direction() -> None:
    params = NET.init(0)
    grads = {name: torch.ones_like(weight) for name, weight in params.items()}
    for options in ({"curvature": "declared"}, {"momentum": None}):
        method = agd(NET, SquareLoss(), **options)
        _, state = method.update(grads, method.init(params), params)
        assert state.directions == {}
        assert float(method.measured_curvature(state)) == 1
    with pytest.raises(InvalidArgument, match="without momentum"):
        agd(NET, SquareLoss(), momentum=None, curvature="measured")
    with pytest.raises(InvalidArgument, match="curvature"):
        agd(NET, SquareLoss(), curvature="guessed")


def test_the_certificate_says_what_is_measured() -> None:
    assert any("measured curvature" in line for line in agd(NET, SquareLoss()).certificate().assumptions)
    assert not any("measured curvature" in x for x in agd(NET, SquareLoss(), momentum=None).certificate().assumptions)


@pytest.mark.parametrize(
    ("steady", "least"), [(1.0, LEAST), (0.2, LEAST), (0.1, LEAST), (0.05, 1 / 4), (0.025, UNKNOWN), (0.0, UNKNOWN)]
)
def test_a_slope_that_does_not_fall_lets_steps_grow_as_far_as_descents_stand_out_of_noise(steady, least) -> None:
    method = agd(NET, SquareLoss())
    assert method.noise == pytest.approx(0.05 / 1.95)
    one = torch.ones((), dtype=torch.float64)
    state = method.init(NET.init(0))._replace(fallen=0 * one, expected=one)
    assert float(curvature(state, steady * one, 0.025)) == pytest.approx(least)
    assert float(curvature(state, steady * one, 0.025, 0.1)) == pytest.approx(0.1 * least)
    # what is found more curved is not touched
    assert float(curvature(state._replace(fallen=3 * one), steady * one, 0.025, 0.1)) == 3


@pytest.mark.parametrize("doubtful", [True, False])
def test_a_doubtful_bound_is_forgotten_in_a_few_steps(doubtful) -> None:
    """Steps that use up 1/10 of what is expected, for ever: κ is their plain mean with the bound's 1, until twenty have been made."""
    method = agd(NET, SquareLoss())
    one = torch.ones((), dtype=torch.float64)
    state = method.init(NET.init(0))
    reach, left = torch.ones_like(state.descents), 1.0
    for n in range(1, 101):
        state = state._replace(steps=torch.tensor(n), due=2 * one, descents=reach)
        state = state._replace(**looked_back(state, 0.9 * reach, reach, doubtful=doubtful))
        # what is left of the bound's 1
        left *= n / (n + 1) if doubtful and n < 20 else 0.95
        assert float(state.fallen / state.expected) == pytest.approx(0.1 + 0.9 * left)


def test_noise_alone_has_the_steadiness_that_the_method_reckons_with() -> None:
    """q of a mean with weight β of the past, over 4,000 runs of noise without any mean."""
    generator = torch.Generator().manual_seed(0)
    ages = 0.95 ** torch.arange(400, dtype=torch.float64)
    noise = torch.randn(4000, 400, generator=generator, dtype=torch.float64)
    mean, square = ((noise**power * ages).sum(1) / ages.sum() for power in (1, 2))
    assert float((mean**2 / square).mean()) == pytest.approx(agd(NET, SquareLoss()).noise, rel=0.1)
