"""Measured balance: a step is divided among the weights by how much of its slope each was seen to use up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modula_agd import (
    AGD,
    MLP,
    ClosedForm,
    CrossEntropy,
    InvalidArgument,
    Linear,
    Logits,
    SquareLoss,
    State,
    Tanh,
    agd,
)
from modula_agd.balance import MEMORY, RANGE, portions, weighed
from modula_agd.bound import Gain
from modula_agd.layer import LinearBond
from support import batch, gaussian

NET = Linear(3, 6) @ Tanh() @ Linear(6, 4)
DEEP = MLP(Logits(3), 8, 4, depth=4)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def state_of(**fields: torch.Tensor) -> State:
    method = agd(NET, SquareLoss())
    return method.init(NET.init(0, dtype=torch.float64))._replace(**fields)


def test_thirty_steps_equal_a_slow_reference() -> None:
    """Written from the formulas alone, with lists of all that was measured."""
    method = agd(NET, SquareLoss(), momentum=0.8)
    params = NET.init(0, dtype=torch.float64)
    names, state, momentum, last, directions = list(params), method.init(params), {}, {}, {}
    falls: list[tuple[list[float], list[float]]] = []
    before: dict[str, float] = {}
    kept_in = 0
    for step in range(30):
        grads = torch.func.grad(method.objective)(params, *batch(step))
        # of what was known before this gradient
        ages = [(1 - MEMORY) * MEMORY ** (len(falls) - 1 - i) for i in range(len(falls))]
        sums = [
            [sum(a * fall[side][k] for a, fall in zip(ages, falls, strict=True)) for k in (0, 1)] for side in (0, 1)
        ]
        gained, used = sums
        whole = sum(gained) / sum(used) if sum(gained) > 0 and sum(used) > 0 else 1.0
        wanted = []
        for g, u in zip(gained, used, strict=True):
            ratio = 0.0 if g <= 0 else g / u / whole if u > 0 else RANGE
            kept_in += falls != [] and 1 / RANGE < ratio < RANGE
            wanted.append(min(max(ratio, 1 / RANGE), RANGE) ** sum(ages))
        # two layers of equal mass in a chain: each has the depth 1
        expected = [2 * w / sum(wanted) for w in wanted]
        if directions and float(state.due) > 0:
            left = {n: float((grads[n] * u).sum()) for n, u in directions.items()}
            falls.append(([before[n] for n in names], [before[n] - left[n] for n in names]))
        source = {n: 0.6 * m + 0.4 * last[n] for n, m in momentum.items()} or grads
        directions = {n: atom.norm.direction(source[n]).dense() for n, atom in NET.weights().items()}
        before = {n: float((grads[n] * u).sum()) for n, u in directions.items()}
        updates, state = method.update(grads, state, params)
        assert state.portions.tolist() == pytest.approx(expected, rel=1e-9)
        assert float(state.descent) == pytest.approx(sum(p * before[n] for p, n in zip(expected, names, strict=True)))
        for p, (name, u) in zip(expected, directions.items(), strict=True):
            torch.testing.assert_close(updates[name], -float(state.t) * p * u, rtol=1e-8, atol=1e-12)
        momentum = {n: 0.8 * momentum.get(n, 0.0) + 0.2 * g for n, g in grads.items()}
        last = grads
        params = {n: w + updates[n] for n, w in params.items()}
    assert kept_in > 20


finite = st.floats(-10, 10, allow_nan=False)


@settings(deadline=None)
@given(
    st.lists(finite, min_size=4, max_size=4),
    st.lists(finite, min_size=4, max_size=4),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_the_growth_stays_that_of_equal_steps_to_first_order(gained, used, counted) -> None:
    method = agd(DEEP, CrossEntropy())
    params = DEEP.init(0)
    state = method.init(params)
    depths = torch.tensor(list(method.sensitivities(state).values()), dtype=torch.float64)
    state = state._replace(gained=numbers(*gained), used=numbers(*used), counted=numbers(*counted))
    found = portions(state, depths)
    assert float((depths * found).sum()) == pytest.approx(float(DEEP.bound().depth))
    assert bool((found > 0).all())
    assert float(found.max() / found.min()) <= RANGE**2 * (1 + 1e-9)
    slopes = DEEP.with_masses(dict(zip(params, found.tolist(), strict=True))).bound(1e-6).growth - 1
    assert float(slopes) == pytest.approx(float(DEEP.bound(1e-6).growth - 1), rel=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.3, 3), min_size=2, max_size=2))
def test_weights_that_do_not_touch_each_other_come_to_the_root_of_their_curvature(curvatures) -> None:
    """f_k = c_k·r_k and equal slopes: p_k = s_k/f_k ∝ 1/(c_k·p_k), for curvatures that no limit meets."""
    c, ones = numbers(*curvatures), numbers(1.0, 1.0)
    state, p = state_of(descents=ones, due=numbers(1.0).squeeze()), ones
    for _ in range(400):
        # the share 0.37 keeps slopes from being used up to exactly 0, which stands for no gradient
        state = state._replace(**weighed(state, ones - 0.37 * c * p, ones, ones))
        p = portions(state, ones)
    ratio = float((c[1] / c[0]).sqrt())
    assert float(p[0] / p[1]) == pytest.approx(ratio, rel=1e-2)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_the_multiplicative_update_descends(seed: int, size: int) -> None:
    """The theorem that the rule is taken from: H without a negative entry, slopes and steps positive."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.rand(size, size, generator=generator, dtype=torch.float64)
    curvature, slopes, r = half @ half.T, *(torch.rand(2, size, generator=generator, dtype=torch.float64) + 0.01)

    def loss(r: torch.Tensor) -> float:
        return float(-slopes @ r + r @ curvature @ r / 2)

    assert loss(r * slopes / (curvature @ r)) <= loss(r) + 1e-12


def test_nothing_is_learnt_where_there_is_nothing_to_measure() -> None:
    ones, zero = numbers(1.0, 1.0), numbers(0.0, 0.0)
    assert portions(state_of(), ones).tolist() == [1, 1]
    for changes, left in (
        ({"due": numbers(0.0).squeeze()}, ones / 2),
        ({"descents": zero}, ones / 2),
        ({}, zero),
        ({}, numbers(torch.nan, torch.inf)),
    ):
        state = state_of(**({"descents": ones, "due": numbers(1.0).squeeze()} | changes))
        found = weighed(state, left, ones, ones)
        assert all(not value.any() for value in found.values())


def test_a_weight_without_a_gradient_keeps_what_is_known_of_it() -> None:
    state = state_of(descents=numbers(1.0, 0.0), due=numbers(1.0).squeeze(), gained=numbers(0.0, 0.3))
    found = weighed(state, numbers(0.5, 0.0), numbers(1.0, 1.0), numbers(1.0, 1.0))
    assert found["gained"].tolist() == pytest.approx([1 - MEMORY, 0.3])
    assert found["counted"].tolist() == pytest.approx([1 - MEMORY, 0])


def test_a_head_on_features_that_hardly_differ_goes_further() -> None:
    """Its slope stays: what it may move the outputs by is far from what its declared inputs would."""
    network = Linear(Logits(2), 8) @ (0.05 * Tanh()) @ Linear(8, 4)
    inputs, labels = gaussian(64, 4, seed=1), torch.arange(64) % 2
    method = agd(network, CrossEntropy())
    params = network.init(0, dtype=torch.float64)
    state = method.init(params)
    for _ in range(60):
        grads = torch.func.grad(method.objective)(params, inputs, labels)
        updates, state = method.update(grads, state, params)
        params = {n: w + updates[n] for n, w in params.items()}
    hidden, head = state.portions.tolist()
    assert head > 1.2 * hidden


def test_steps_multipliers_and_decay_follow_the_portions() -> None:
    network, (inputs, labels) = DEEP, (gaussian(32, 4, seed=2), torch.arange(32) % 3)
    model = network.to_torch(0)
    optimizer = AGD(model, CrossEntropy(), decay=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        CrossEntropy()(model(inputs.float()), labels).backward()
        optimizer.step()
    told, shares = optimizer.scalars(), {share.name: share for share in optimizer.explain().shares}
    portion = dict(zip(network.weights(), optimizer.current.portions.tolist(), strict=True))
    assert max(portion.values()) > 1.01 * min(portion.values())
    stretch = dict(zip(network.weights(), optimizer.current.stretches.tolist(), strict=True))
    assert max(stretch.values()) > 1.01
    for name, p in portion.items():
        p *= stretch[name]
        moved = optimizer.method.strides[name] * p * told["t"]
        assert told[f"step/{name}"] == pytest.approx(moved)
        assert shares[name].moved == pytest.approx(moved)
        assert shares[name].decayed == pytest.approx(0.5 * p * told["t"])


def test_a_stride_is_not_undone() -> None:
    """What a weight uses up that goes four unit steps counts per unit step, as if it had gone one."""
    ones, left = numbers(1.0, 1.0), numbers(0.6, 0.9)
    state = state_of(descents=ones, due=numbers(1.0).squeeze())
    found = weighed(state, left, ones, numbers(4.0, 1.0))
    assert found["used"].tolist() == pytest.approx([(1 - MEMORY) * 0.1, (1 - MEMORY) * 0.1])


def test_a_groups_multiplier_is_not_undone() -> None:
    """What a weight with a short step uses up counts per unit of its multiplier; one that stands still says nothing of itself."""
    inputs, labels = gaussian(64, 4, seed=3).float(), torch.arange(64) % 3
    portion = {}
    for rate in (1.0, 0.1, 0.0):
        model = DEEP.to_torch(0)
        first, *others = model.parameters()
        optimizer = AGD(model, CrossEntropy(), groups=[{"params": [first], "lr": rate}, {"params": others}])
        for _ in range(40):
            optimizer.zero_grad()
            CrossEntropy()(model(inputs), labels).backward()
            optimizer.step()
        assert optimizer.current.rates.tolist() == [rate, 1, 1, 1]
        portion[rate] = float(optimizer.current.portions[0])
        assert (float(optimizer.current.counted[0]) > 0) == (rate > 0)
    # left alone, a tenth of a step would look like a tenth of the curvature, and come to three times the portion
    assert portion[0.1] < 1.5 * portion[1.0]


class Counted(LinearBond):
    """A rule of a user's own that looks at the depth."""

    gain = Gain.exact(1.0, "nothing happens", "any")

    def forward(self, x):
        return x

    def propagate(self, x, step, path=""):
        return x if x.depth >= 0 else None


def test_depths_of_a_network_whose_rules_want_numbers() -> None:
    plain = Linear(3, 6) @ Linear(6, 4)
    found = agd(Linear(3, 6) @ Counted() @ Linear(6, 4), SquareLoss())._depths({})
    assert list(found.values()) == list(agd(plain, SquareLoss())._depths({}).values()) == [1, 1]


def test_the_certificate_names_it_and_declared_balance_is_equal_steps() -> None:
    assumed = agd(NET, SquareLoss()).certificate().assumptions
    assert any("measured balance" in text for text in assumed)
    plain = agd(NET, SquareLoss(), balance="declared")
    assert not any("balance" in text for text in plain.certificate().assumptions)
    params = NET.init(0, dtype=torch.float64)
    # a state may come from a method that measured
    state = plain.init(params)._replace(portions=numbers(0.5, 1.5))
    for step in range(5):
        updates, state = plain.update(torch.func.grad(plain.objective)(params, *batch(step)), state, params)
        params = {n: w + updates[n] for n, w in params.items()}
    assert state.portions.tolist() == [1, 1]


@pytest.mark.parametrize("curvature", ["measured", "declared"])
@pytest.mark.parametrize("balance", ["measured", "declared"])
def test_either_is_measured_without_the_other(curvature: str, balance: str) -> None:
    method = agd(NET, SquareLoss(), curvature=curvature, balance=balance)
    params = NET.init(0, dtype=torch.float64)
    state = method.init(params)
    for step in range(5):
        updates, state = method.update(torch.func.grad(method.objective)(params, *batch(step)), state, params)
        params = {n: w + updates[n] for n, w in params.items()}
    assert bool(state.directions) == ("measured" in (curvature, balance))
    assert (state.portions.tolist() != [1, 1]) == (balance == "measured")


@pytest.mark.parametrize("options", [{"sizes": "tracked"}, {"search": ClosedForm()}], ids=str)
def test_equal_steps_where_portions_would_change_the_growth(options) -> None:
    assert agd(NET, SquareLoss(), **options).balance == "declared"
    assert agd(NET, SquareLoss(), **options).curvature == "measured"
    with pytest.raises(InvalidArgument, match="measured balance with"):
        agd(NET, SquareLoss(), balance="measured", **options)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="measured balance without momentum"):
        agd(NET, SquareLoss(), momentum=None, balance="measured")
    with pytest.raises(InvalidArgument, match="balance='equal'"):
        agd(NET, SquareLoss(), balance="equal")
