"""Averaged weights: a window that grows with the run, and an optimizer that lends them without a mode to forget."""

import copy

import pytest
import torch
from torch import Tensor

from modula_agd import AGD, MLP, CrossEntropy, InvalidArgument, Logits, ResNet8, SquareLoss
from modula_agd.averaging import POWER, average_, averaged, share
from modula_agd.memory import FORMAT
from support import gaussian, same, seeded

NET = MLP(Logits(3), 6, 4, 2)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 4, generator=seeded(seed)), torch.randint(3, (8,), generator=seeded(seed))


def train(model, optimizer, steps: int) -> list[dict[str, Tensor]]:
    seen = []
    for step in range(steps):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        CrossEntropy()(model(inputs), labels).backward()
        optimizer.step()
        seen.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    return seen


def test_the_average_is_the_stated_sum() -> None:
    """Written out: w̄_n = Σ_i c_i·Π_{j>i}(1 − c_j)·w_i, of which the last fifth counts about 1 − (4/5)^5."""
    weights = [{"w": gaussian(3, 2, seed=n)} for n in range(90)]
    mean: dict[str, Tensor] | None = None
    for n, value in enumerate(weights, start=1):
        mean = averaged(mean, value, n)
    counts = [share(i) * torch.tensor([1 - share(j) for j in range(i + 1, 91)]).prod().item() for i in range(1, 91)]
    assert sum(counts) == pytest.approx(1)
    assert sum(counts[72:]) == pytest.approx(1 - (1 - 1 / 5) ** (POWER + 1), abs=0.03)
    expected = sum(count * value["w"] for count, value in zip(counts, weights, strict=True))
    assert mean is not None
    torch.testing.assert_close(mean["w"], expected)


def test_in_place_is_the_same_and_the_pure_one_changes_nothing() -> None:
    first, second = {"w": gaussian(3, seed=1)}, {"w": gaussian(3, seed=2)}
    mean = averaged(None, first, 1)
    before = mean["w"].clone()
    new = averaged(mean, second, 2)
    assert torch.equal(mean["w"], before)
    average_(mean, second, 2)
    assert torch.equal(mean["w"], new["w"])


def test_half_precision_is_averaged_in_float32_and_counters_are_taken_as_they_are() -> None:
    values = {"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    mean = averaged(averaged(None, values, 1), {"w": values["w"] * 2, "n": torch.tensor(4)}, 2)
    assert mean["w"].dtype == torch.float32
    assert mean["w"].tolist() == pytest.approx([1 + share(2)] * 2)
    assert int(mean["n"]) == 4


def test_a_block_lends_the_average_and_returns_the_live_weights() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    seen = train(model, optimizer, 5)
    expected: dict[str, Tensor] | None = None
    for n, weights in enumerate(seen, start=1):
        expected = averaged(expected, weights, n)
    assert expected is not None
    exported = optimizer.averaged_state()
    with optimizer.averaged():
        inside = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, value in expected.items():
        torch.testing.assert_close(inside[name], value)
        assert torch.equal(inside[name], exported[name])
        assert torch.equal(model.state_dict()[name], seen[-1][name])
        assert not torch.equal(inside[name], seen[-1][name])
    other = NET.to_torch(1)
    other.load_state_dict(exported)


def test_the_live_weights_return_after_an_error_too() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    last = train(model, optimizer, 3)[-1]
    with pytest.raises(RuntimeError, match="mine"), optimizer.averaged():
        raise RuntimeError("mine")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in last.items())
    train(model, optimizer, 1)


def test_training_the_average_by_mistake_is_refused() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    train(model, optimizer, 2)
    with optimizer.averaged():
        with pytest.raises(InvalidArgument, match="inside averaged"):
            optimizer.step()
        with pytest.raises(InvalidArgument, match="Leave the first block"), optimizer.averaged():
            pass


def test_averaging_changes_no_step_and_costs_nothing_when_off() -> None:
    models = [NET.to_torch(0) for _ in range(2)]
    optimizers = [AGD(models[0], CrossEntropy()), AGD(models[1], CrossEntropy(), averaging=False)]
    ends = [train(model, optimizer, 6)[-1] for model, optimizer in zip(models, optimizers, strict=True)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not any("average" in entry for entry in optimizers[1].state_dict()["state"].values())
    assert optimizers[1].state_dict()["param_groups"][0]["agd"]["buffers"] == {}
    with pytest.raises(InvalidArgument, match="averaging=True"):
        optimizers[1].averaged_state()
    # the paper's rule is judged by the weights that it leads to
    assert not AGD(NET.to_torch(0), CrossEntropy(), momentum=None).averaging


def test_a_saved_average_goes_on_bit_for_bit() -> None:
    straight, first = (NET.to_torch(0) for _ in range(2))
    whole, before = AGD(straight, CrossEntropy()), AGD(first, CrossEntropy())
    train(straight, whole, 6)
    train(first, before, 3)
    second = NET.to_torch(1)
    second.load_state_dict(first.state_dict())
    after = AGD(second, CrossEntropy())
    saved = copy.deepcopy(before.state_dict())
    after.load_state_dict(saved)
    for step in range(3, 6):
        inputs, labels = batch(step)
        after.zero_grad()
        CrossEntropy()(second(inputs), labels).backward()
        after.step()
    for name, value in whole.averaged_state().items():
        assert torch.equal(after.averaged_state()[name], value)
    # what was loaded was copied, as later steps write over the optimizer's own
    assert same(saved, before.state_dict())


def test_running_statistics_are_averaged_beside_the_weights() -> None:
    model = ResNet8(Logits(3), 1, width=4).to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    images, labels = torch.randn(8, 1, 8, 8, generator=seeded(0)), torch.arange(8) % 3
    for _ in range(3):
        optimizer.zero_grad()
        CrossEntropy()(model(images), labels).backward()
        optimizer.step()
    live = {name: value.clone() for name, value in model.named_buffers()}
    with optimizer.averaged():
        assert any(not torch.equal(value, live[name]) for name, value in model.named_buffers())
    assert all(torch.equal(value, live[name]) for name, value in model.named_buffers())


def test_the_average_lies_nearer_to_the_minimum_than_noisy_weights() -> None:
    net = MLP(2, 2, 3, 1)
    truth = net.init(5)
    model = net.to_torch(0)
    optimizer = AGD(model, SquareLoss())
    generator, distances = seeded(0), []
    for _ in range(400):
        inputs = torch.randn(4, 3, generator=generator)
        targets = net(truth, inputs) + torch.randn(4, 2, generator=generator)
        optimizer.zero_grad()
        SquareLoss()(model(inputs), targets).backward()
        optimizer.step()
        distances.append(sum(float((model.state_dict()[n] - w).square().sum()) for n, w in truth.items()))
    mean = sum(float((optimizer.averaged_state()[n] - w).square().sum()) for n, w in truth.items())
    assert mean < 0.7 * sum(distances[-100:]) / 100


def test_running_statistics_may_be_renewed_while_the_model_holds_averages() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    batches = [gaussian(16, 6, seed=seed).float() for seed in range(4)]
    optimizer = AGD(model, CrossEntropy(), example_inputs=batches[0])
    for x in batches:
        optimizer.zero_grad()
        CrossEntropy()(model(x), torch.arange(16) % 3).backward()
        optimizer.step()
    live = {name: x.clone() for name, x in model.named_buffers()}
    with optimizer.averaged():
        mean = model[1].running_mean.clone()
        torch.optim.swa_utils.update_bn(batches, model)
        features = torch.cat([model[0](x) for x in batches])
        torch.testing.assert_close(model[1].running_mean, features.mean(0))
        assert not torch.equal(model[1].running_mean, mean)
    assert same(dict(model.named_buffers()), live)


def test_running_statistics_are_found_where_the_model_has_them_now() -> None:
    model = ResNet8(Logits(3), 1, width=4).to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    # a conversion replaces the model's buffers
    model.double()
    images, labels = torch.randn(8, 1, 8, 8, generator=seeded(0)).double(), torch.arange(8) % 3
    for _ in range(2):
        optimizer.zero_grad()
        CrossEntropy()(model(images), labels).backward()
        optimizer.step()
    exported = optimizer.averaged_state()
    assert all(len(exported[name].unique()) > 1 for name, _ in model.named_buffers())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["state"][0].pop("average"), "average lacks '0.weight'"),
        (lambda d: d["state"][1].pop("momentum_buffer"), "momentum lacks '2.weight'"),
        (lambda d: d["state"][0].update(average=torch.zeros(6, 4, dtype=torch.int64)), "int64"),
        (lambda d: d["state"][0].update(average=torch.zeros(6, 4).to_sparse()), "sparse"),
        (lambda d: d["state"][0].update(average=torch.zeros(6, 4, device="meta")), "without values"),
        (lambda d: d["state"][0].update(average=torch.full((6, 4), torch.nan)), "NaN"),
        (lambda d: d["state"][0].update(average=torch.zeros(6, 5)), "average of '0.weight'"),
        (lambda d: d["state"][0].update(momentum_buffer=torch.full((6, 4), torch.inf)), "NaN or infinity"),
        (lambda d: d["state"][0].update(momentum_buffer=torch.zeros(6, 4, dtype=torch.int64)), "int64"),
        (lambda d: d["state"].update({0: [1]}), "no dictionary"),
        (lambda d: d["param_groups"][0]["agd"].update({"smoothed": torch.tensor(1j)}), "complex"),
        (lambda d: d["param_groups"][0]["agd"].update({"clock": torch.tensor(1.5)}), "float32"),
        (lambda d: d["param_groups"][0]["agd"].update({"buffers": {"x": torch.zeros(1)}}), "average lacks 'x'"),
        (lambda d: d["param_groups"][0].update({"agd": None}), "no state of AGD"),
        (lambda d: d["param_groups"][0].pop("agd"), "older version"),
        (lambda d: d["param_groups"][0]["agd"].update(format=FORMAT + 1), "newer version"),
        (lambda d: d["param_groups"][0]["agd"].pop("format"), "newer version"),
        (lambda d: d.update({"param_groups": None}), "no state of AGD"),
        (lambda d: d["param_groups"][0].pop("lr"), "lr"),
        (lambda d: d["param_groups"].append(dict(d["param_groups"][0])), "parameter groups"),
        (lambda d: d["param_groups"][0]["params"].pop(), "parameter groups"),
        (lambda d: d["param_groups"][0].update(param_names=["a", "b"]), "parameters a, b"),
        (lambda d: d.pop("state"), "older version"),
    ],
)
def test_a_state_that_cannot_be_is_refused_whole(change, message: str) -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    train(model, optimizer, 2)
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    change(saved)
    with pytest.raises(InvalidArgument, match=message):
        optimizer.load_state_dict(saved)
    assert same(optimizer.state_dict(), before)
    train(model, optimizer, 1)


def test_no_copy_is_made_of_an_optimizer_that_lends_its_average() -> None:
    model = NET.to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    train(model, optimizer, 2)
    with optimizer.averaged():
        with pytest.raises(InvalidArgument, match="inside averaged"):
            copy.deepcopy(optimizer)
        with pytest.raises(InvalidArgument, match="inside averaged"):
            optimizer.load_state_dict({})
    again, model_again = copy.deepcopy((optimizer, model))
    train(model_again, again, 1)
    train(model, optimizer, 1)
    assert all(torch.equal(w, model_again.state_dict()[name]) for name, w in model.state_dict().items())


def test_an_average_of_other_parameters_is_refused() -> None:
    mean = averaged(None, {"w": torch.zeros(2)}, 1)
    for params in ({"v": torch.zeros(2)}, {"w": torch.zeros(3)}):
        with pytest.raises(InvalidArgument, match="Start a new one"):
            averaged(mean, params, 2)
    with pytest.raises(InvalidArgument, match="number of steps"):
        averaged(mean, {"w": torch.zeros(2)}, 0)
    with pytest.raises(InvalidArgument, match="averaging"):
        AGD(NET.to_torch(0), CrossEntropy(), averaging="no")
