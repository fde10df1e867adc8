"""Micro-batches: gradients that make the direction, and gradients held out from them that measure the descent."""

import pytest
import torch
from torch import Tensor

from modula_agd import AGD, Certified, InvalidArgument, Linear, NonFiniteGradient, SquareLoss, Tanh, agd
from support import gaussian

NET = Linear(3, 6) @ Tanh() @ Linear(6, 4)
LOSS = SquareLoss()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return gaussian(4, 4, seed=seed).float(), gaussian(4, 3, seed=seed + 500).float()


def backward(model, seed: int) -> None:
    inputs, targets = batch(seed)
    LOSS(model(inputs), targets).backward()


def gradient(params: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    return torch.func.grad(agd(NET, LOSS).objective)(params, *batch(seed))


def weights(model) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def mean(grads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([g[name] for g in grads]).mean(0) for name in grads[0]}


def test_one_micro_batch_is_a_step_as_usual() -> None:
    plain, micro = (NET.to_torch(0) for _ in range(2))
    one, other = AGD(plain, LOSS), AGD(micro, LOSS)
    for step in range(4):
        one.zero_grad()
        backward(plain, step)
        one.step()
        backward(micro, step)
        other.accumulate()
        other.step()
    assert all(torch.equal(w, weights(micro)[name]) for name, w in weights(plain).items())


@pytest.mark.parametrize("count", [2, 3, 5])
def test_micro_batches_equal_the_functional_form(count: int) -> None:
    """Every second gradient is absorbed, and the others, 1st, 3rd, ..., measure the descent along what they have not seen."""
    model = NET.to_torch(0)
    optimizer, method = AGD(model, LOSS), agd(NET, LOSS)
    params = weights(model)
    state = method.init(params)
    for step in range(4):
        seeds = [100 * step + i for i in range(count)]
        for seed in seeds:
            backward(model, seed)
            optimizer.accumulate()
        optimizer.step()
        grads = [gradient(params, seed) for seed in seeds]
        part = len(grads[::2]) / count
        state = method.absorb(mean(grads[1::2]), state, params, 1 - part)
        updates, state = method.update(mean(grads[::2]), state, params, part=part)
        params = {name: weight + updates[name] for name, weight in params.items()}
        for name, weight in weights(model).items():
            torch.testing.assert_close(weight, params[name])


def test_the_direction_has_seen_what_was_absorbed_and_nothing_of_what_measures() -> None:
    method = agd(NET, LOSS)
    params = NET.init(0)
    first, second = gradient(params, 0), gradient(params, 1)
    state = method.absorb(first, method.init(params), params, 0.5)
    _, after = method.update(second, state, params, part=0.5)
    seen = {name: value.float() for name, value in state.lead.items()}
    for name, value in seen.items():
        # in eight bits, at another scale
        assert float(torch.cosine_similarity(value.flatten(), first[name].flatten(), dim=0)) > 0.9999
    along = {name: atom.norm.direction(seen[name]).dense() for name, atom in NET.weights().items()}
    expected = [float((second[name] * along[name]).sum()) for name in params]
    assert after.descents.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_first_step_is_measured_without_bias() -> None:
    """Over all pairs of different micro-batches the mean of what is measured is the descent along the directions used."""
    method = agd(NET, LOSS)
    params = NET.init(0)
    grads = [gradient(params, seed) for seed in range(5)]
    for making in range(5):
        others = [grads[i] for i in range(5) if i != making]
        state = method.absorb(grads[making], method.init(params), params, 0.5)
        seen = [float(method.update(g, state, params, part=0.5)[1].descent) for g in others]
        whole = float(method.update(mean(others), state, params, part=0.5)[1].descent)
        assert sum(seen) / 4 == pytest.approx(whole, rel=1e-4)
        # made of itself it would claim more
        own = float(method.update(grads[making], method.init(params), params)[1].descent)
        assert own > whole


def test_each_micro_batch_counts_for_its_share_of_the_momentum() -> None:
    method = agd(NET, LOSS, momentum=0.9)
    params = NET.init(0)
    _, state = method.update(gradient(params, 0), method.init(params), params)
    first, second = gradient(params, 1), gradient(params, 2)
    before = {name: value.clone() for name, value in state.momentum.items()}
    absorbed = method.absorb(first, state, params, 0.75)
    _, after = method.update(second, absorbed, params, part=0.25)
    for name, value in after.momentum.items():
        middle = before[name].lerp(first[name], 0.75 * 0.1)
        torch.testing.assert_close(value, middle.lerp(second[name], 0.25 * 0.1))
        assert torch.equal(state.momentum[name], before[name])


def test_without_momentum_micro_batches_are_one_batch() -> None:
    model = NET.to_torch(0)
    optimizer, method = AGD(model, LOSS, momentum=None), agd(NET, LOSS, momentum=None)
    params = weights(model)
    for seed in range(3):
        backward(model, seed)
        optimizer.accumulate()
    optimizer.step()
    whole = mean([gradient(params, seed) for seed in range(3)])
    updates, _ = method.update(whole, method.init(params), params)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, params[name] + updates[name])
    with pytest.raises(InvalidArgument, match="without momentum"):
        method.absorb(whole, method.init(params), params, 0.5)
    smooth = agd(NET, LOSS, search=Certified())
    with pytest.raises(InvalidArgument, match="without momentum"):
        smooth.absorb(whole, smooth.init(params), params, 0.5)


def test_accumulate_clears_the_gradient_and_a_step_forgets_the_micro_batches() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, LOSS)
    backward(model, 0)
    optimizer.accumulate()
    assert all(parameter.grad is None for parameter in model.parameters())
    backward(model, 1)
    with pytest.raises(InvalidArgument, match=r"after every backward"):
        optimizer.step()
    optimizer.zero_grad()
    before = weights(model)
    optimizer.step()
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())


@pytest.mark.parametrize("lacking", [[0, 1], [2], [1]])
def test_other_parameters_in_another_micro_batch_are_refused_and_nothing_is_lost(lacking: list[int]) -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, LOSS)
    refused = min(seed for seed in range(3) if (seed in lacking) != (0 in lacking))
    for seed in range(refused + 1):
        backward(model, seed)
        if seed in lacking:
            model.get_parameter("0.weight").grad = None
        if seed < refused:
            optimizer.accumulate()
    before, count = {n: p.grad for n, p in model.named_parameters()}, optimizer._micro.count
    with pytest.raises(InvalidArgument, match=r"'0\.weight'"):
        optimizer.accumulate()
    assert all(p.grad is before[n] for n, p in model.named_parameters())
    assert optimizer._micro.count == count
    optimizer.discard()
    optimizer.zero_grad()
    backward(model, 0)
    optimizer.step()


def test_a_sparse_gradient_is_refused_at_once() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, LOSS)
    parameter = model.get_parameter("0.weight")
    parameter.grad = torch.ones_like(parameter).to_sparse()
    with pytest.raises(InvalidArgument, match="sparse"):
        optimizer.accumulate()


def test_a_users_own_gradient_tensor_is_left_alone() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, LOSS)
    backward(model, 0)
    mine = model.get_parameter("0.weight").grad
    assert mine is not None
    before = mine.clone()
    optimizer.accumulate()
    for seed in range(1, 4):
        backward(model, seed)
        optimizer.accumulate()
    assert torch.equal(mine, before)


def test_many_half_precision_gradients_do_not_stand_still() -> None:
    model = NET.to_torch(0, dtype=torch.bfloat16)
    optimizer = AGD(model, LOSS)
    for _ in range(600):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.accumulate()
    assert optimizer._micro.sums[0]["0.weight"].unique().tolist() == [300.0]
    optimizer.step()
    assert optimizer.current.momentum["0.weight"].unique().tolist() == pytest.approx([1 - (1 - 0.5 * 0.05) ** 2])


def test_the_halves_of_a_first_step_count_as_those_of_any_other() -> None:
    method = agd(NET, LOSS)
    params = NET.init(0)
    first, second = gradient(params, 0), gradient(params, 1)
    _, after = method.update(second, method.absorb(first, method.init(params), params, 0.5), params, part=0.5)
    for name, value in after.momentum.items():
        half = 0.05 / 2
        torch.testing.assert_close(value, half * (1 - half) * first[name] + half * second[name])


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_where_bad_batches_are_skipped_one_micro_batch_leaves_the_whole_step_out(bad: int) -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, LOSS, nonfinite="skip")
    backward(model, 9)
    optimizer.step()
    optimizer.zero_grad()
    before = weights(model)
    momentum = {name: value.clone() for name, value in optimizer.current.momentum.items()}
    for seed in range(3):
        backward(model, seed)
        if seed == bad:
            parameter = model.get_parameter("2.weight")
            assert parameter.grad is not None
            parameter.grad[0, 0] = torch.inf
        optimizer.accumulate()
    optimizer.step()
    assert int(optimizer.current.skipped) == 1
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())
    assert all(torch.equal(m, momentum[name]) for name, m in optimizer.current.momentum.items())


def test_a_step_left_out_leaves_directions_that_serve_on_as_they_were() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, LOSS, nonfinite="skip", refresh=4)
    for seed in range(5):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    before = {name: value.clone() for name, value in optimizer.current.directions.items()}
    for seed in (5, 6):
        backward(model, seed)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(torch.nan)
        optimizer.accumulate()
    optimizer.step()
    assert int(optimizer.current.skipped) == 1
    assert all(torch.equal(u, before[name]) for name, u in optimizer.current.directions.items())
    start = weights(model)
    backward(model, 7)
    optimizer.step()
    assert not any(torch.equal(w, start[name]) for name, w in weights(model).items())


def test_accumulating_the_average_by_mistake_is_refused() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, LOSS)
    backward(model, 0)
    with optimizer.averaged(), pytest.raises(InvalidArgument, match="inside averaged"):
        optimizer.accumulate()


def test_a_loaded_state_takes_no_pending_micro_batch_along() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, LOSS)
    saved = optimizer.state_dict()
    backward(model, 0)
    optimizer.accumulate()
    optimizer.load_state_dict(saved)
    before = weights(model)
    optimizer.step()
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())


def test_a_bad_micro_batch_touches_no_weight() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, LOSS)
    before = weights(model)
    for seed in range(2):
        backward(model, seed)
        if seed == 1:
            parameter = model.get_parameter("2.weight")
            assert parameter.grad is not None
            parameter.grad[0, 0] = torch.nan
        optimizer.accumulate()
    with pytest.raises(NonFiniteGradient, match=r"2\.weight"):
        optimizer.step()
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())
    # and the next step is free of it
    backward(model, 2)
    optimizer.step()


@pytest.mark.parametrize("part", [0, 1, -0.5, float("nan"), "half"])
def test_a_share_that_cannot_be_is_refused(part) -> None:
    method = agd(NET, LOSS)
    params = NET.init(0)
    with pytest.raises(InvalidArgument, match="between 0 and 1"):
        method.absorb(gradient(params, 0), method.init(params), params, part)


@pytest.mark.parametrize("part", [0.0, 1.5, float("nan"), "h"])
def test_a_part_of_an_update_that_cannot_be_is_refused(part) -> None:
    method = agd(NET, SquareLoss())
    params = NET.init(0)
    with pytest.raises(InvalidArgument, match="part"):
        method.update({}, method.init(params), params, part=part)
