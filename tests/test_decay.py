"""What a weight loses of itself beside a step."""

import pytest
import torch

from modula_agd import (
    AGD,
    Certified,
    ClosedForm,
    Decay,
    Embedding,
    ExactGrowth,
    Fading,
    InvalidArgument,
    Linear,
    Relative,
    SquareLoss,
    Tanh,
    agd,
    explain,
)
from modula_agd.agd import METHODS
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


@pytest.mark.parametrize("decay", [0.5, Fading()], ids=repr)
@pytest.mark.parametrize("search", [ExactGrowth(), ClosedForm()], ids=repr)
def test_the_majorant_is_of_the_step_alone(search, decay) -> None:
    plain, decaying = agd(NET, SquareLoss(), search=search), agd(NET, SquareLoss(), search=search, decay=decay)
    params = NET.init(0, dtype=torch.float64)
    grads = gradients(plain, params)
    updates, one = plain.update(grads, plain.init(params), params)
    others, other = decaying.update(grads, decaying.init(params), params)
    assert (one.depth, one.descent, one.t, one.change) == (other.depth, other.descent, other.t, other.change)
    for name, update in others.items():
        assert not torch.equal(update, updates[name])


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_norms_stay_within_size_over_decay(decay: float) -> None:
    """The step's relative length is at most 1/decay here, so that each update is a mean of a weight and a point of that ball."""
    model = NET.to_torch(0)
    # on a slope that never ends, what is measured sends steps beyond 1/decay
    declared = dict.fromkeys(("curvature", "balance", "stretch"), "declared")
    optimizer = AGD(model, SquareLoss(), decay=decay, **declared)
    optimizer.param_groups[0]["lr"] = 0.2
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        for parameter in model.parameters():
            # one direction for ever, the worst case
            parameter.grad = torch.ones_like(parameter) + 0.1 * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        assert float(optimizer.current.t) <= 1 / (0.2 * decay)
        for name, atom in NET.weights().items():
            assert float(atom.norm.size(model.get_parameter(name).detach())) <= max(1.0, 1 / decay) + 1e-4
    sizes = [float(atom.norm.size(model.get_parameter(n).detach())) for n, atom in NET.weights().items()]
    assert max(sizes) == pytest.approx(1 / decay, rel=0.1)


def test_a_number_is_a_relative_decay() -> None:
    assert agd(NET, SquareLoss(), decay=0.3) == agd(NET, SquareLoss(), decay=Relative(0.3))
    assert agd(NET, SquareLoss()).decay is agd(NET, SquareLoss(), decay=Relative(0.0)).decay is None
    assert METHODS["fading"](NET, SquareLoss()).decay == Fading()


def test_what_a_step_did_fades_by_the_power_of_its_share_of_the_run() -> None:
    """Of a weight that every step moves by the same, none of them cut short: the mean of ((i + 50)/(n + 50))^c."""
    for power in (0.5, 1.0, 2.0):
        fading, weight = Fading(power, most=1e3), torch.zeros(1, dtype=torch.float64)
        ones = torch.ones_like(weight)
        for step in range(1, 4001):
            weight = (1 - fading.shares(ones, ones, torch.tensor(step))) * weight + 1
        # sums of ((i + 50)/(n + 50))^c
        wanted = (4050 - 4050 * (50 / 4050) ** (power + 1)) / (power + 1)
        assert float(weight) == pytest.approx(wanted, rel=1e-3)


def test_fading_takes_no_more_than_a_share_of_the_step() -> None:
    fading, lengths, one = Fading(0.5, most=0.2), torch.tensor([0.0, 0.01, 10.0]).double(), torch.ones(3).double()
    assert fading.shares(lengths, one, torch.tensor(10)).tolist() == pytest.approx([0, 0.002, 0.5 / 60])
    assert fading.shares(lengths, 8 * one, torch.tensor(1000)).tolist() == pytest.approx([0] + [0.5 / 1050] * 2)
    assert Relative(0.2).shares(lengths, 4 * one, torch.tensor(10)).tolist() == pytest.approx([0, 0.008, 8])


@pytest.mark.parametrize(
    ("stretch", "size"), [("measured", 1.0), ("declared", 1.0), ("measured", 0.25), ("measured", 4.0)]
)
def test_a_fading_weight_loses_the_stated_share_of_itself(stretch, size) -> None:
    """Of one of declared size below 1 that part of it."""
    net = Linear(3, 6, size=size) @ Tanh() @ Linear(6, 4, size=size)
    method = agd(net, SquareLoss(), decay=Fading(2.0, 0.5), stretch=stretch)
    params = net.init(0, dtype=torch.float64)
    state = method.init(params)
    for step in range(1, 60):
        grads = gradients(method, params, step)
        updates, after = method.update(grads, state, params)
        for name, portion in zip(params, after.portions, strict=True):
            share = min(size, 1.0) * min(2.0 / (step + 50), 0.5 * float(after.t * portion))
            moved = updates[name] + share * params[name]
            along = net.weights()[name].norm.size(moved) / size
            assert float(along) == pytest.approx(float(after.t * portion), rel=5e-3)
        params, state = {name: w + updates[name] for name, w in params.items()}, after


class Halving(Decay):
    """A rule of one's own, half of a weight with every step."""

    def shares(self, lengths, stretches, steps):
        return 0.5 * torch.ones_like(lengths)


class BySize(Halving):
    by_size = True


def test_other_rules_take_no_less_of_small_weights_unless_they_say_so() -> None:
    net = Linear(3, 6, size=0.25) @ Tanh() @ Linear(6, 4, size=0.25)
    params = net.init(0, dtype=torch.float64)
    grads = torch.func.grad(agd(net, SquareLoss()).objective)(params, gaussian(8, 4), gaussian(8, 3, seed=1))

    def updates(decay):
        method = agd(net, SquareLoss(), decay=decay)
        return method.update(grads, method.init(params), params)

    plain, state = updates(0.0)
    for decay, share in ((Relative(0.3), 0.3 * float(state.t)), (Halving(), 0.5), (BySize(), 0.125)):
        for name, update in updates(decay)[0].items():
            torch.testing.assert_close(update, plain[name] - share * params[name])


def drifted(decay) -> float:
    """The size of a weight after 400 steps of one direction."""
    model = NET.to_torch(0)
    optimizer = AGD(model, SquareLoss(), decay=decay)
    for _ in range(400):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return float(NET.weights()["0.weight"].norm.size(model.get_parameter("0.weight").detach()))


def test_norms_drift_without_decay_and_less_where_weights_fade() -> None:
    without, fading = drifted(0.0), drifted(Fading())
    assert without > 10
    assert fading < 0.8 * without


def test_rows_of_an_embedding_fade_whether_seen_or_not() -> None:
    net, decay = Embedding(4, 6), Fading()
    (name,), method = net.weights(), agd(net, SquareLoss(), decay=decay)
    params = net.init(0, dtype=torch.float64)
    grads = {name: gaussian(6, 4, seed=7) * (torch.arange(6) < 3)[:, None]}
    updates, state = method.update(grads, method.init(params), params)
    share = min(1 / 51, float(state.t * state.portions))
    torch.testing.assert_close(updates[name][3:], -share * params[name][3:])


def test_a_multiplier_multiplies_what_is_lost() -> None:
    lost = {}
    for multiplier in (1.0, 0.1):
        optimizer = AGD(model := NET.to_torch(0), SquareLoss(), decay=Fading())
        optimizer.param_groups[0]["lr"] = multiplier
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        lost[multiplier] = [share.decayed for share in optimizer.explain().shares]
    assert lost[0.1] == pytest.approx([0.1 * share for share in lost[1.0]])


@pytest.mark.parametrize("decay", [0.2, Fading(most=0.5)], ids=repr)
def test_the_optimizer_decays_as_the_functional_form_does(decay) -> None:
    model = NET.to_torch(0, dtype=torch.float64)
    optimizer, method = AGD(model, SquareLoss(), decay=decay), agd(NET, SquareLoss(), decay=decay)
    assert_steps_of_the_pure_form(optimizer, model, method, lambda params, step: gradients(method, params, step), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": -0.1}, "decay"),
        ({"decay": float("inf")}, "decay"),
        ({"decay": "some"}, "decay"),
        ({"decay": None}, "decay"),
        ({"decay": True}, "decay"),
        ({"decay": Fading}, "instance"),
        ({"decay": Fading(), "search": Certified()}, "decay"),
        ({"decay": 0.1, "search": Certified()}, "decay"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        agd(NET, SquareLoss(), **options)


def test_the_certificate_names_decay() -> None:
    def told(**options) -> str:
        return " ".join(agd(NET, SquareLoss(), **options).certificate().assumptions)

    assert "decay sees to" in told(decay=1.0)
    assert "decay sees to" not in told(decay=0.5) + told(decay=Fading(most=2.0))
    assert all("decay: the loss bears" in told(decay=decay) for decay in (0.5, Fading()))
    assert "decay" not in told()


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (lambda lengths: 0.01, "0.01"),
        (lambda lengths: None, "None"),
        (lambda lengths: lengths.sum(), r"shape \(\)"),
        (lambda lengths: lengths[:1], r"shape \(1,\)"),
        (lambda lengths: -lengths, "at least 0"),
        (lambda lengths: lengths * float("nan"), "at least 0"),
    ],
)
def test_a_rule_that_returns_no_shares_is_refused_and_nothing_moves(shares, message: str) -> None:
    class Odd(Decay):
        def shares(self, lengths, stretches, steps):
            return shares(lengths)

    model = NET.to_torch(0)
    optimizer = AGD(model, SquareLoss(), decay=Odd())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(InvalidArgument, match=message):
        optimizer.step()
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())


def test_where_nothing_is_asked_what_is_no_share_is_none() -> None:
    """A step that must not wait cannot raise, and a rule's NaN must not be a weight's."""

    class Odd(Decay):
        def shares(self, lengths, stretches, steps):
            return torch.stack((lengths[0] * torch.nan, -lengths[1]))

    params = NET.init(0, dtype=torch.float64)
    odd, plain = (agd(NET, SquareLoss(), decay=decay, nonfinite="skip") for decay in (Odd(), 0.0))
    grads = gradients(plain, params)
    made = [method.update(grads, method.init(params), params)[0].values() for method in (odd, plain)]
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other)


def test_a_rule_may_take_all_of_a_weight_but_nothing_of_one_that_stands_still() -> None:
    class Whole(Decay):
        def shares(self, lengths, stretches, steps):
            return torch.full_like(lengths, torch.inf)

    model = NET.to_torch(0)
    optimizer = AGD(model, SquareLoss(), decay=Whole())
    still, moves = model.parameters()
    before = still.detach().clone()
    still.grad, moves.grad = torch.zeros_like(still), torch.ones_like(moves)
    optimizer.step()
    assert torch.equal(still.detach(), before)
    norm = NET.weights()["2.weight"].norm
    assert float(norm.size(moves.detach())) == pytest.approx(float(optimizer.current.t), rel=1e-2)
    assert [share.decayed for share in optimizer.explain().shares] == [0, 1]


def test_steps_that_are_left_out_do_not_count_in_the_run() -> None:
    method = agd(NET, SquareLoss(), decay=Fading(most=1e6), nonfinite="skip")
    params = NET.init(0, dtype=torch.float64)
    grads = gradients(method, params)
    state = method.init(params)
    for _ in range(3):
        updates, state = method.update({name: g * torch.nan for name, g in grads.items()}, state, params)
        assert not any(update.any() for update in updates.values())
    updates, state = method.update(grads, state, params)
    shares = method.lost(state.t, state.portions, state.stretches, state.steps - state.skipped, state.descents != 0)
    assert shares.tolist() == pytest.approx([1 / 51] * 2)
    assert [share.decayed for share in explain(method, state).shares] == pytest.approx([1 / 51] * 2)


def test_half_precision_fades_like_full() -> None:
    """A share below 1/512 of a weight, rounded by itself, would be nothing."""
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        for decay in (0.0, Fading()):
            model = NET.to_torch(0).to(dtype)
            optimizer = AGD(model, SquareLoss(), decay=decay)
            generator = torch.Generator().manual_seed(0)
            for _ in range(1000):
                for parameter in model.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
                optimizer.step()
            sizes[dtype, decay] = sum(float(p.detach().float().norm()) for p in model.parameters())
    kept = {dtype: sizes[dtype, Fading()] / sizes[dtype, 0.0] for dtype in (torch.float32, torch.bfloat16)}
    assert kept[torch.float32] < 0.7
    assert kept[torch.bfloat16] == pytest.approx(kept[torch.float32], rel=0.15)


@pytest.mark.parametrize(
    "options",
    [{"power": 0}, {"power": -1.0}, {"most": 0.0}, {"most": float("inf")}, {"power": "half"}, {"power": 10**400}],
    ids=str,
)
def test_a_fading_decay_that_cannot_be_is_refused(options) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        Fading(**options)


def test_a_rule_of_ones_own_is_taken() -> None:
    class Constant(Decay):
        def shares(self, lengths, stretches, steps):
            return (lengths * stretches).clamp(max=1e-3)

    method = agd(NET, SquareLoss(), decay=Constant())
    params = NET.init(0, dtype=torch.float64)
    updates, state = method.update(gradients(method, params), method.init(params), params)
    for name, atom in NET.weights().items():
        direction = atom.norm.direction(gradients(method, params)[name]).dense()
        torch.testing.assert_close(updates[name], -state.t * direction - 1e-3 * params[name])


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
