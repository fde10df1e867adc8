"""Directions of all weights at once, and directions that serve several steps."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from modula_agd import (
    AGD,
    GPT,
    MLP,
    RMS,
    InvalidArgument,
    Linear,
    Logits,
    ResNet8,
    RowBlocks,
    RowNorm,
    Spectral,
    SquareLoss,
    Unfolded,
    agd,
)
from modula_agd.directions import LONGEST, SIDE, directions, due, period
from modula_agd.norm import BlockNorm, Frobenius
from modula_agd.polar import polar, polar_of_each
from support import gaussian

NETWORKS = {
    "fully connected": MLP(Logits(5), 7, 4, 4, bias=True),
    "convolutions": ResNet8(Logits(3), 1, width=4, bias=True, affine=True),
    "transformer": GPT(11, 8, 2, 2, 6, bias=True, affine=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polar_factors_taken_together_are_those_taken_apart(dtype: torch.dtype) -> None:
    shapes = [(3, 5), (5, 3), (2, 3, 5), (4, 4), (3, 5), (2, 2, 5, 3), (1, 7)]
    matrices = [gaussian(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    for matrix, together in zip(matrices, polar_of_each(matrices), strict=True):
        assert together.shape == matrix.shape
        torch.testing.assert_close(together, polar(matrix), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_directions_taken_together_are_those_of_each_norm(name: str) -> None:
    atoms = NETWORKS[name].weights()
    norms = {key: atom.norm for key, atom in atoms.items()}
    sources = {key: gaussian(*atom.shape, seed=seed) for seed, (key, atom) in enumerate(atoms.items())}
    found = directions(norms, sources)
    assert list(found) == list(sources)
    for key, source in sources.items():
        torch.testing.assert_close(found[key].dense(), norms[key].direction(source).dense(), rtol=0, atol=1e-12)


def test_a_norm_of_a_users_own_needs_to_know_nothing_of_polar_factors() -> None:
    class Half(BlockNorm):
        def factor(self, shape: torch.Size) -> float:
            return 0.5

        def dims(self, shape: torch.Size) -> tuple[int, ...]:
            return (-1,)

    source = gaussian(3, 4)
    found = directions({"w": Half(), "v": Spectral()}, {"w": source, "v": source})
    assert torch.equal(found["w"].dense(), Half().direction(source).dense())
    assert period(Half(), (3, 4), None) == 1


def test_periods_follow_the_short_side() -> None:
    assert [period(Spectral(), (side, 999), None) for side in (1, 64, 127, 128, 256)] == [1, 1, 1, 2, 4]
    assert period(Spectral(), (10_000, 10_000), None) == LONGEST
    assert period(RowBlocks(Spectral(), 3), (3 * 2 * SIDE, 999), None) == 2
    assert period(Unfolded(Spectral()), (2 * SIDE, 40, 3, 3), None) == 2
    # where no polar factor is taken there is nothing to save
    for norm in (RowNorm(1.0), RMS(), Frobenius()):
        assert period(norm, (512, 512), 5) == period(norm, (512, 512), None) == 1
    assert period(Spectral(), (2, 2), 5) == 5


@pytest.mark.parametrize("every", [1, 2, 3, 8])
def test_each_weight_is_renewed_at_first_and_then_every_so_many_steps(every: int) -> None:
    for index in range(5):
        renewed = [clock for clock in range(40) if due(clock, index, every)]
        assert renewed[:every] == list(range(every))
        later = [clock for clock in renewed if clock >= every]
        assert all(second - first == every for first, second in pairwise(later))
    # at no step are all of many weights renewed
    assert every == 1 or all(not all(due(clock, i, every) for i in range(8)) for clock in range(every, 40))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return gaussian(8, 4, seed=seed), gaussian(8, 3, seed=seed + 1000)


NET = Linear(3, 6) @ Linear(6, 4)


def test_kept_directions_equal_a_slow_reference() -> None:
    method = agd(NET, SquareLoss(), refresh=3, balance="declared")
    params = NET.init(0, dtype=torch.float64)
    state = method.init(params)
    kept: dict[str, Tensor] = {}
    momentum = {name: torch.zeros_like(weight) for name, weight in params.items()}
    lead: dict[str, Tensor] = {}
    # of a direction that serves three steps
    nu = 2 * 0.05 * 3**0.5
    for step in range(12):
        grads = torch.func.grad(method.objective)(params, *batch(step))
        for index, name in enumerate(params):
            if step < 3 or (step + index) % 3 == 0:
                kept[name] = NET.weights()[name].norm.direction(lead.get(name, grads[name])).dense()
        updates, state = method.update(grads, state, params)
        for name in params:
            torch.testing.assert_close(updates[name], -state.t * kept[name], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(state.directions[name], kept[name], rtol=0, atol=1e-9)
        momentum = {name: 0.95 * momentum[name] + 0.05 * g for name, g in grads.items()}
        lead = {name: (1 - nu) * momentum[name] + nu * g for name, g in grads.items()}
        params = {name: weight + updates[name] for name, weight in params.items()}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_lead_is_of_the_steps_that_a_direction_serves(compiled: bool) -> None:
    """Compiled code renews every direction at each step."""
    net = Linear(200, 128)
    method, params = agd(net, SquareLoss(), precision="full"), net.init(0)
    torch.compiler.reset()
    update = torch.compile(method.update, backend="eager", fullgraph=True) if compiled else method.update
    first, second = ({"weight": gaussian(200, 128, seed=seed).float()} for seed in (0, 1))
    _, state = update(first, method.init(params), params)
    _, state = update(second, state, params)
    nu = 0.1 if compiled else 0.1 * 2**0.5
    expected = torch.lerp(state.momentum["weight"], second["weight"], nu)
    torch.testing.assert_close(state.lead["weight"], expected)


def test_a_direction_that_was_kept_to_measure_alone_is_made_anew_where_it_shall_serve() -> None:
    params = {name: value.detach() for name, value in NET.init(0).items()}
    once, often = (agd(NET, SquareLoss(), refresh=refresh) for refresh in (1, 4))
    state = once.init(params)
    for seed in range(6):
        grads = torch.func.grad(once.objective)(params, *[x.float() for x in batch(seed)])
        _, state = once.update(grads, state, params)
    assert {u.dtype for u in state.directions.values()} == {torch.bfloat16}
    _, state = often.update(grads, state, params)
    assert {u.dtype for u in state.directions.values()} == {torch.float32}


def test_directions_keep_their_precision_where_steps_are_masked() -> None:
    params = {name: value.detach() for name, value in NET.init(0).items()}
    grads = torch.func.grad(agd(NET, SquareLoss()).objective)(params, *[x.float() for x in batch(0)])
    state = agd(NET, SquareLoss()).init(params)
    for refresh, dtype in ((4, torch.float32), (1, torch.bfloat16), (4, torch.float32)):
        method = agd(NET, SquareLoss(), refresh=refresh, nonfinite="skip")
        _, state = method.update(grads, state, params)
        assert {u.dtype for u in state.directions.values()} == {dtype}


def test_small_matrices_keep_no_direction_and_large_ones_one() -> None:
    net = Linear(8, 130) @ Linear(130, 200) @ Linear(200, 4)
    method = agd(net, SquareLoss(), curvature="declared")
    params = net.init(0)
    grads = {name: torch.randn_like(w) for name, w in params.items()}
    _, state = method.update(grads, method.init(params), params)
    assert set(state.directions) == {"1.weight"}
    _, alone = agd(net, SquareLoss(), refresh=1, curvature="declared").update(grads, method.init(params), params)
    assert alone.directions == {}
    _, direct = agd(net, SquareLoss(), momentum=None).update(grads, method.init(params), params)
    assert direct.directions == {}


def test_a_kept_direction_survives_a_step_without_a_gradient_and_moves_nothing() -> None:
    method = agd(NET, SquareLoss(), refresh=4)
    params = NET.init(0, dtype=torch.float64)
    state = method.init(params)
    for step in range(6):
        grads = torch.func.grad(method.objective)(params, *batch(step))
        updates, state = method.update(grads, state, params)
    before = state.directions["0.weight"]
    some = {**grads, "0.weight": None}
    updates, state = method.update(some, state, params)
    assert "0.weight" not in updates
    assert torch.equal(state.directions["0.weight"], before)
    zero = {**grads, "0.weight": torch.zeros_like(grads["0.weight"])}
    updates, state = method.update(zero, state, params)
    assert not updates["0.weight"].any()


def test_a_run_with_kept_directions_resumes_bit_for_bit() -> None:
    straight, first = (NET.to_torch(0) for _ in range(2))
    optimizers = [AGD(model, SquareLoss(), refresh=3) for model in (straight, first)]

    def train(model, optimizer, steps) -> None:
        for step in steps:
            optimizer.zero_grad()
            SquareLoss()(model(batch(step)[0].float()), batch(step)[1].float()).backward()
            optimizer.step()

    train(straight, optimizers[0], range(10))
    train(first, optimizers[1], range(5))
    second = NET.to_torch(1)
    second.load_state_dict(first.state_dict())
    resumed = AGD(second, SquareLoss(), refresh=3)
    resumed.load_state_dict(optimizers[1].state_dict())
    train(second, resumed, range(5, 10))
    assert all(torch.equal(w, second.state_dict()[name]) for name, w in straight.state_dict().items())


@pytest.mark.parametrize("refresh", [0, -1, 1.5, True, None, "often"])
def test_a_period_that_cannot_be_is_refused(refresh) -> None:
    with pytest.raises(InvalidArgument, match="refresh"):
        agd(NET, SquareLoss(), refresh=refresh)


def test_directions_in_bfloat16_are_measured_as_they_are() -> None:
    """Half precision moves a direction a little; its norm stays at most 1, and the descent is that of the direction used."""
    net = Linear(3, 32) @ Linear(32, 64) @ Linear(64, 4)
    params = net.init(0)
    grads = torch.func.grad(agd(net, SquareLoss()).objective)(params, gaussian(8, 4).float(), gaussian(8, 3).float())
    half, full = agd(net, SquareLoss(), precision="half"), agd(net, SquareLoss(), precision="full")
    updates, state = half.update(grads, half.init(params), params)
    _, exact = full.update(grads, full.init(params), params)
    assert not torch.equal(state.descents, exact.descents)
    torch.testing.assert_close(state.descents, exact.descents, rtol=0.05, atol=0)
    for name, atom in net.weights().items():
        assert atom.norm.size(updates[name]) <= float(state.t) * (1 + 1e-5)
    descent = -sum(float((grads[name] * updates[name]).sum()) for name in params)
    assert descent == pytest.approx(float(state.t * state.descent), rel=1e-5)
    with pytest.raises(InvalidArgument, match="precision"):
        agd(net, SquareLoss(), precision="bf16")
