"""Captured models trained: two lines of change, a bound that an example gave, states that go on."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from modula_agd import (
    AGD,
    CrossEntropy,
    InvalidArgument,
    Linear,
    Logits,
    RMSNorm,
    SpaceMismatch,
    Tanh,
    agd,
    from_torch,
)
from modula_agd.bridge import Bridged
from modula_agd.train.data import classification


def test_a_plain_convolutional_network_does_not_run_away(data_dir: Path) -> None:
    """Whose logits are near 0 at first, so that the example's bound is far too small: losses came to 3.7 and 6.6 early on, once."""
    images = classification("cifar10", data_dir).train
    torch.manual_seed(0)
    sides = ((3, 32), (32, 32), (32, 64), (64, 64), (64, 128))
    body = [
        layer
        for n, (i, o) in enumerate(sides)
        for layer in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), *[nn.MaxPool2d(2)] * (n % 2))
    ]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(128 * 64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = AGD(model, CrossEntropy(), example_inputs=images.inputs[:64])
    losses = []
    for rows in torch.arange(40 * 64).split(64):
        loss = nn.functional.cross_entropy(model(images.inputs[rows]), images.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses) < 2.6
    assert sum(losses[-5:]) / 5 < 2.25


def test_a_loop_switches_from_adamw_in_two_lines() -> None:
    torch.manual_seed(0)
    labels = torch.randint(10, (512,))
    images = torch.randn(10, 3, 32, 32)[labels] + 0.5 * torch.randn(512, 3, 32, 32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 10))
    losses = []
    optimizer = AGD(model, CrossEntropy(), example_inputs=images[:64])
    for step in range(40):
        x, y = images[8 * step : 8 * step + 8], labels[8 * step : 8 * step + 8]
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    with optimizer.averaged(), torch.no_grad():
        assert float(nn.functional.cross_entropy(model(images), labels)) < 0.5 * losses[0]
    assert "1.weight" in str(optimizer.explain())


def test_a_compiled_model_is_captured_as_the_users_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    compiled = torch.compile(model, backend="eager")
    optimizer = AGD(compiled, CrossEntropy(), example_inputs=torch.randn(4, 8))
    assert list(optimizer.method.atoms) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    before = model[0].weight.detach().clone()
    nn.functional.cross_entropy(compiled(torch.randn(4, 8)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_a_plain_model_without_an_example_is_told_the_remedy() -> None:
    with pytest.raises(SpaceMismatch, match="example_inputs"):
        AGD(nn.Linear(8, 3), CrossEntropy())
    with pytest.raises(InvalidArgument, match="example_inputs"):
        AGD(nn.Linear(8, 3), nn.CrossEntropyLoss(), example_inputs=torch.randn(4, 8))
    with pytest.raises(InvalidArgument, match=r"no torch\.nn\.Module"):
        AGD(Linear(3, 8), CrossEntropy(), example_inputs=torch.randn(4, 8))
    method = agd(from_torch(nn.Linear(8, 3), torch.randn(4, 8)), CrossEntropy())
    with pytest.raises(InvalidArgument, match="ready method"):
        AGD(nn.Linear(8, 3), method, example_inputs=torch.randn(4, 8))


def test_captured_models_are_stepped_as_any_network_but_for_their_rows() -> None:
    captured = agd(from_torch(small(), torch.randn(16, 8)), CrossEntropy())
    own = agd(Linear(Logits(3), 16) @ Tanh() @ Linear(16, 8), CrossEntropy())
    told = [(method.relaxation, method.balance, method.curvature, method.stretch) for method in (captured, own)]
    assert told == [(None, "measured", "measured", "measured")] * 2
    assert (captured.rows, own.rows) == ("declared", "measured")


def test_tracked_sizes_follow_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = AGD(model, CrossEntropy(), example_inputs=torch.randn(16, 8), sizes="tracked")
    with torch.no_grad():
        model[0].weight.mul_(4.0)
    nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    sizes = dict(zip(optimizer.method.atoms, optimizer.current.sizes.tolist(), strict=True))
    declared = optimizer.method.atoms["0.weight"].size
    assert sizes["0.weight"] == pytest.approx(4 * declared, rel=0.05)


def some_steps(model: nn.Module, optimizer: AGD, count: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_a_copy_of_model_and_optimizer_goes_on_alike(how) -> None:
    model = small()
    optimizer = AGD(model, CrossEntropy(), example_inputs=torch.randn(16, 8))
    some_steps(model, optimizer, 2)
    other, second = how((model, optimizer))
    some_steps(model, optimizer, 3, seed=1)
    some_steps(other, second, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_run_that_captures_anew_goes_on_to_the_bit() -> None:
    model = small()
    optimizer = AGD(model, CrossEntropy(), example_inputs=torch.randn(16, 8))
    some_steps(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    some_steps(model, optimizer, 3, seed=1)
    other = small()
    other.load_state_dict(saved[0])
    # other weights, and another example
    second = AGD(other, CrossEntropy(), example_inputs=3 * torch.randn(16, 8))
    assert second.method.atoms["0.weight"].size != optimizer.method.atoms["0.weight"].size
    second.load_state_dict(saved[1])
    assert second.method.network.curvature_slack == optimizer.method.network.curvature_slack
    some_steps(other, second, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_measurements_of_another_model_are_refused_and_change_nothing() -> None:
    model = small()
    optimizer = AGD(model, CrossEntropy(), example_inputs=torch.randn(16, 8))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["agd"]["measured"] = torch.ones(5, dtype=torch.float64)
    before = optimizer.method.network.measured()
    with pytest.raises(InvalidArgument, match="another model"):
        optimizer.load_state_dict(saved)
    # of a version that measured by other norms
    for numbers in (before[1:], torch.cat((before[:1] - 1, before[1:]))):
        saved["param_groups"][0]["agd"]["measured"] = numbers
        with pytest.raises(InvalidArgument, match="of this library"):
            optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.method.network.measured(), before)


def test_a_compiled_update_of_a_captured_model_is_the_same() -> None:
    model, inputs = small(), torch.randn(16, 8)
    network = from_torch(model, inputs)
    method = agd(network, CrossEntropy())
    update = torch.compile(method.update, backend="eager", fullgraph=True)
    params = {name: value.detach() for name, value in network.parameters().items()}
    state = method.init(params)
    for seed in range(3):
        grads = torch.func.grad(method.objective)(
            params, inputs, torch.randint(3, (16,), generator=torch.manual_seed(seed))
        )
        expected, after = method.update(grads, state, params)
        found, state = update(grads, state, params)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close((state.fallen, state.t), (after.fallen, after.t))
        params = {name: value + found[name] for name, value in params.items()}


def test_measured_curvature_outweighs_the_bound_of_an_example_within_a_few_steps() -> None:
    """And not that of a declared one: what the first step expected is all that is known before it."""
    kept = []
    for network in (from_torch(small(), torch.randn(16, 8)), Linear(Logits(3), 16) @ RMSNorm() @ Linear(16, 8)):
        method = agd(network, CrossEntropy())
        params = network.parameters() if isinstance(network, Bridged) else network.init(0)
        grads = {name: torch.ones_like(value) for name, value in params.items()}
        state = method.init(params)
        for _ in range(6):
            # a slope that no step uses up
            _, state = method.update(grads, state, params)
        kept.append(float(state.fallen / state.expected))
    # by the last update five steps have been looked back at: of equal ones the bound has 1/6 and 0.95^5, and these grow
    assert 0.05 < kept[0] < 1 / 6
    assert 0.6 < kept[1] < 0.95**5


def test_a_weight_that_was_frozen_at_the_capture_is_not_left_behind_in_silence() -> None:
    model = small()
    model[0].requires_grad_(False)
    optimizer = AGD(model, CrossEntropy(), example_inputs=torch.randn(16, 8))
    some_steps(model, optimizer, 1)
    model[0].requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InvalidArgument, match="anew after unfreezing"):
        some_steps(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
