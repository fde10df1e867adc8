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
    Method,
    ReLU,
    SquareLoss,
    agd,
    explain,
    from_torch,
)
from modula_agd.exchange import ALONE
from modula_agd.norm import Direction
from modula_agd.row_signal import MEMORY, in_momentum, in_powers, row_squares, signal
from support import assert_steps_of_the_pure_form, gaussian

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


def shares(gradients: torch.Tensor, beta: float) -> list[torch.Tensor]:
    """c of each row before each of the gradients and after the last, [gradients, rows, cols]."""
    rows = gradients.shape[1]
    mean, counts = torch.zeros(gradients.shape[1:], dtype=torch.float64), torch.ones(rows, dtype=torch.bool)
    nothing = torch.zeros(rows, dtype=torch.float64)
    state, found = method().init(NET.init(0))._replace(powers=nothing, power_weights=nothing, mean_weights=nothing), []
    for gradient in gradients:
        means, squares = row_squares(mean), row_squares(gradient)
        found.append(signal(state, means))
        told = in_momentum(state, squares, 1 - beta, counts) | in_powers(state, squares, means, 1.0, counts)
        state, mean = state._replace(**told), beta * mean + (1 - beta) * gradient
    return [*found, signal(state, row_squares(mean))]


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.5, 0.95]),
)
def test_no_row_goes_further_than_its_unit(gradients: list[list[float]], beta: float) -> None:
    """So that a direction stays of unit norm, whatever came before."""
    for share in shares(torch.tensor(gradients, dtype=torch.float64)[:, None], beta):
        assert 0 <= float(share) <= 1


def test_rows_of_signal_go_all_the_way_and_rows_of_noise_a_sixth() -> None:
    beta = 0.95
    assert torch.stack(shares(torch.ones(100, 4, 3, dtype=torch.float64), beta)).min() > 1 - 1e-9
    noise = shares(gaussian(400, 200, 30), beta)[-1]
    assert float(noise.square().mean().sqrt()) == pytest.approx(math.sqrt((1 - beta) / (1 + beta)), rel=0.05)


@pytest.mark.parametrize("period", [1, 7, 100, 3000])
def test_a_row_of_signal_goes_all_the_way_however_seldom_it_is_touched(period: int) -> None:
    gradients = torch.zeros(3 * period + 1, 2, 3, dtype=torch.float64)
    gradients[::period, 0], gradients[:, 1] = 2.0, 1.0
    assert torch.stack(shares(gradients, 0.95)).min() > 1 - 1e-9


def test_a_row_that_is_touched_again_after_a_hundred_steps_moves_at_full_length() -> None:
    net = Embedding(4, 6)
    made = agd(net, SquareLoss(), **OPTIONS)  # type: ignore[arg-type]
    (name,), params = net.weights(), net.init(0, dtype=torch.float64)
    state = made.init(params)
    for step in range(202):
        grads = {name: torch.ones_like(params[name])}
        if step % 100:
            grads[name][2:] = 0
        updates, state = made.update(grads, state, params)
        lengths = updates[name].norm(dim=1) / 2 / float(state.t)
        assert lengths[:2].tolist() == pytest.approx([1, 1])
        # a row moves where its gradient says something, and nowhere else
        assert lengths[2:].tolist() == pytest.approx([0 if step % 100 else 1] * 4)


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_micro_batches_make_rows_as_long_as_one_batch_of_their_samples(drift: float) -> None:
    made, lengths = method(momentum=0.95), {}
    params = NET.init(0, dtype=torch.float64)
    for parts in (1, 2):
        state, told = made.init(params), []
        for step in range(400):
            halves = [
                {n: drift + gaussian(*p.shape, seed=8 * step + 4 * half + i) for i, (n, p) in enumerate(params.items())}
                for half in (0, 1)
            ]
            if parts == 2:
                state = made.absorb(halves[0], state, params, 0.5)
                grads = halves[1]
            else:
                grads = {n: (halves[0][n] + halves[1][n]) / 2 for n in params}
            _, state = made.update(grads, state, params, part=1 / parts)
            told.append(signal(state, made.row_means(state, ALONE)))
        lengths[parts] = float(torch.stack(told[100:]).mean())
    assert lengths[2] == pytest.approx(lengths[1], rel=0.05)


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
    rows = ("powers", "power_weights", "mean_weights")
    assert all(torch.equal(getattr(after, what), getattr(state, what)) for what in rows)
    assert after.skipped == 1
    # nor is a weight without a gradient
    _, after = made.update({**noisy(4), HEAD: None}, state, params)
    assert all(torch.equal(getattr(after, what), getattr(state, what)) for what in rows)
    # and of a row that is not touched the past counts less, but is not forgotten
    touched = noisy(4)
    touched[HEAD][1] = 0
    _, after = made.update(touched, state, params)
    assert float(after.powers[1] / after.power_weights[1]) == pytest.approx(
        float(state.powers[1] / state.power_weights[1])
    )
    assert float(after.mean_weights[1]) == pytest.approx(BETA * float(state.mean_weights[1]))


def test_a_state_of_declared_rows_is_refused_with_the_reason() -> None:
    plain, measured = method(rows="declared"), method()
    params = NET.init(0, dtype=torch.float64)
    for one, other in ((plain, measured), (measured, plain)):
        with pytest.raises(InvalidArgument, match=r"signal of .* rows"):
            one.update(noisy(0), other.init(params), params)


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
    state = assert_steps_of_the_pure_form(optimizer, model, made, lambda params, step: noisy(step), 6)
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


def test_what_is_known_of_a_row_is_three_numbers() -> None:
    made = method()
    _, state = made.update(noisy(0), made.init(NET.init(0)), NET.init(0))
    assert sum(x.nbytes for x in (state.powers, state.power_weights, state.mean_weights)) == 24 * 5
    assert made.row_count == 5


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
