"""Rows by their signal: how far each row of an embedding, or of a matrix into logits, goes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modula_agd import (
    AGD,
    CrossEntropy,
    Embedding,
    InvalidArgument,
    Linear,
    Logits,
    Mean,
    Method,
    ReLU,
    SquareLoss,
    agd,
    explain,
    from_torch,
)
from modula_agd.norm import Direction
from modula_agd.row_signal import MEMORY, power_renewed, row_squares, signal
from support import gaussian

BETA = 0.9
NET = Linear(Logits(5), 4) @ ReLU() @ Linear(4, 3)
HEAD = "2.weight"
OPTIONS = {"momentum": BETA, "balance": "declared", "curvature": "declared", "relaxation": 1.0, "step_average": None}


def method(**options: object) -> Method:
    return agd(NET, CrossEntropy(), **{**OPTIONS, **options})


def noisy(step: int, drift: float = 1.0, noise: float = 0.3) -> dict[str, torch.Tensor]:
    """Gradients of one sign in the mean, each row of the head with more noise than the one before."""
    found = {}
    for index, (name, atom) in enumerate(NET.weights().items()):
        scale = noise * torch.arange(atom.shape[0], dtype=torch.float64)[:, None] if name == HEAD else noise
        found[name] = drift + scale * gaussian(*atom.shape, seed=100 * step + index)
    return found


def weighted(values: list[torch.Tensor], past: float) -> torch.Tensor:
    """The mean of all values, the last counting most, each before it ``past`` times as much as the next."""
    weights = [past ** (len(values) - 1 - i) for i in range(len(values))]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)  # type: ignore[return-value]


def test_each_row_goes_by_the_signal_of_its_past_gradients() -> None:
    """Against the two means written out, over 60 noisy steps."""
    made = method()
    params, before = NET.init(0, dtype=torch.float64), []
    state = made.init(params)
    for step in range(60):
        grads = noisy(step)
        updates, state = made.update(grads, state, params)
        lengths = NET.weights()[HEAD].norm.scale * updates[HEAD].norm(dim=1) / float(state.t)  # type: ignore[attr-defined]
        if before:
            share = weighted(before, BETA).norm(dim=1) / weighted([g.square().sum(1) for g in before], MEMORY).sqrt()
            expected = share.clamp(max=1.0)
        else:
            expected = torch.ones(5, dtype=torch.float64)
        torch.testing.assert_close(lengths, math.sqrt(4) * expected, rtol=1e-6, atol=1e-9)
        before.append(grads[HEAD])
    assert expected[0] > 0.99
    assert expected[-1] < 0.8 < expected[1]


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.5, 0.95]),
)
def test_no_row_goes_further_than_its_unit(gradients: list[list[float]], beta: float) -> None:
    """So that a direction stays of unit norm, whatever came before."""
    mean, power = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for n, values in enumerate(gradients):
        share = signal(row_squares(mean), power, beta, torch.tensor(float(n), dtype=torch.float64))
        assert 0 <= float(share) <= 1
        gradient = torch.tensor([values], dtype=torch.float64)
        mean = beta * mean + (1 - beta) * gradient
        power = power_renewed(power, row_squares(gradient), torch.tensor(True))


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 1.0, 1.0), (1.0, 0.1, 0.25)])
def test_rows_of_signal_go_all_the_way_and_rows_of_noise_a_sixth(noise: float, low: float, high: float) -> None:
    beta, n = 0.95, 400
    gradients = torch.where(torch.tensor(noise > 0), gaussian(n, 200, 30), torch.ones(n, 200, 30))
    mean, power = torch.zeros(200, 30, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
    for gradient in gradients:
        mean = beta * mean + (1 - beta) * gradient
        power = power_renewed(power, row_squares(gradient), torch.tensor(True))
    share = signal(row_squares(mean), power, beta, torch.tensor(float(n), dtype=torch.float64))
    assert low - 1e-9 <= float(share.mean()) <= high + 1e-9
    if noise:
        assert float(share.square().mean().sqrt()) == pytest.approx(math.sqrt((1 - beta) / (1 + beta)), rel=0.05)


def test_a_row_that_is_not_touched_goes_less_far_when_it_is_touched_again() -> None:
    net = Linear(2, 4) @ Mean() @ Embedding(4, 6)
    made = agd(net, SquareLoss(), **OPTIONS)  # type: ignore[arg-type]
    params = net.init(0, dtype=torch.float64)
    state, lengths = made.init(params), []
    name = next(iter(net.weights()))
    for step in range(40):
        grads = {n: torch.ones_like(p) for n, p in params.items()}
        if 10 <= step < 30:
            grads[name][2:] = 0
        updates, state = made.update(grads, state, params)
        lengths.append(updates[name].norm(dim=1) / float(state.t))
    # at step 20 only what is touched moves; at step 30 the others are back, but far from full length
    assert lengths[20][0] > 0
    assert (lengths[20][2:] == 0).all()
    assert (lengths[30][2:] < 0.2 * lengths[30][0]).all()
    assert (lengths[39][2:] > 2 * lengths[30][2:]).all()


def test_the_fresh_gradient_does_not_make_its_own_direction() -> None:
    made = method()
    params = NET.init(0, dtype=torch.float64)
    state = made.init(params)
    for step in range(5):
        _, state = made.update(noisy(step), state, params)
    first, second = (made.update(grads, state, params) for grads in (noisy(5), noisy(6, noise=3.0)))
    for name, update in first[0].items():
        torch.testing.assert_close(update / float(first[1].t), second[0][name] / float(second[1].t))


def test_what_is_left_out_is_not_heard() -> None:
    made = method(nonfinite="skip")
    params = NET.init(0, dtype=torch.float64)
    state = made.init(params)
    for step in range(3):
        _, state = made.update(noisy(step), state, params)
    bad = {name: torch.full_like(g, torch.nan) for name, g in noisy(3).items()}
    _, after = made.update(bad, state, params)
    assert torch.equal(after.powers, state.powers)
    assert torch.equal(after.heard, state.heard)
    assert after.skipped == 1
    # a weight without a gradient is not heard either, the others are
    _, after = made.update({**noisy(4), HEAD: None}, state, params)
    assert torch.equal(after.powers, state.powers)
    assert (after.heard - state.heard).tolist() == [float(name != HEAD) for name in NET.weights()]


def test_rows_of_logits_go_as_far_as_incoherent_features_bear() -> None:
    stride = math.sqrt(4)
    assert method().strides == {"0.weight": 1.0, HEAD: stride}
    assert method(constants="proved").strides == {"0.weight": 1.0, HEAD: 1.0}
    assert method(sizes="tracked").strides == {"0.weight": 1.0, HEAD: 1.0}
    assert method(rows="declared").strides == {"0.weight": 1.0, HEAD: 1.0}
    assert agd(NET, CrossEntropy(), momentum=None).strides == {"0.weight": 1.0, HEAD: 1.0}
    told = [
        any("incoherent rows" in a for a in made.certificate().assumptions)
        for made in (method(), method(rows="declared"))
    ]
    assert told == [True, False]


def test_what_a_stride_adds_is_told_and_counted_in_no_descent() -> None:
    params = NET.init(0, dtype=torch.float64)
    plain, far = method(rows="declared"), method()
    (small, one), (large, other) = (made.update(noisy(0), made.init(params), params) for made in (plain, far))
    assert float(one.descent) == float(other.descent)
    assert float(one.t) == float(other.t)
    torch.testing.assert_close(large[HEAD], math.sqrt(4) * small[HEAD])
    torch.testing.assert_close(large["0.weight"], small["0.weight"])
    moved = {share.name: share.moved for share in explain(far, other).shares}
    assert moved[HEAD] == pytest.approx(math.sqrt(4) * moved["0.weight"])


def test_an_optimizer_moves_rows_as_the_pure_form_does() -> None:
    made = method()
    model = NET.to_torch(0, dtype=torch.float64)
    optimizer = AGD(model, made)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = made.init(params)
    for step in range(6):
        grads = noisy(step)
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name].clone()
        optimizer.step()
        updates, state = made.update(grads, state, params)
        params = {name: p + updates[name] for name, p in params.items()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), params[name])
    assert optimizer.scalars()[f"step/{HEAD}"] == pytest.approx(math.sqrt(4) * float(state.t))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_gradients_leave_no_share_behind(scale: float) -> None:
    made = method()
    params = NET.init(0)
    state = made.init(params)
    for step in range(4):
        updates, state = made.update({n: (scale * g).float() for n, g in noisy(step).items()}, state, params)
    assert state.powers.isfinite().all()
    assert (state.powers > 0).all()
    assert (updates[HEAD].double().norm(dim=1) > 0).all()


def test_measured_rows_take_momentum_and_a_known_word() -> None:
    with pytest.raises(InvalidArgument, match="measured rows without momentum"):
        agd(NET, CrossEntropy(), momentum=None, rows="measured")
    with pytest.raises(InvalidArgument, match="rows='long'"):
        agd(NET, CrossEntropy(), rows="long")  # type: ignore[arg-type]


def test_directions_row_by_row_keep_their_kind() -> None:
    """The engine relies on one factor for each row (``norm.Direction``)."""
    found = NET.weights()[HEAD].norm.direction(gaussian(5, 4))
    assert isinstance(found, Direction)
    assert found.factor.shape == (5, 1)


def test_a_captured_model_has_its_alignment_measured_and_moves_all_rows_alike() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    network = from_torch(model, gaussian(8, 4, dtype=torch.float32), scores=True)
    assert agd(network, CrossEntropy()).rows == "declared"
    asked = agd(network, CrossEntropy(), rows="measured")
    assert asked.strides == {"0.weight": 1.0, "0.bias": 1.0, "2.weight": math.sqrt(6), "2.bias": 1.0}
