"""The loop: its log tells what happened, equal seeds give equal runs, an interrupt keeps what there is."""

import dataclasses
import json
import math

import pytest
import torch

from modula_agd import METHODS, MLP, CrossEntropy, InvalidArgument, Method, NonFiniteGradient, SquareLoss
from modula_agd.train import Classification, Examples, RunFolder, Schedule, build, load, train
from modula_agd.train.loop import evaluation


def blobs(count: int = 60, features: int = 6, classes: int = 3) -> Classification:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    inputs = torch.randn((classes, features), generator=generator)[labels]
    inputs = inputs + 0.1 * torch.randn((count, features), generator=generator)
    inputs = inputs / inputs.square().mean(1, keepdim=True).sqrt()
    examples = Examples(inputs, labels)
    return Classification("blobs", classes, (1, 1, features), examples, Examples(inputs[:12], labels[:12]))


def method(name: str = "agd") -> Method:
    return METHODS[name](MLP(3, 8, 6, depth=2), CrossEntropy())


def folder(path) -> RunFolder:
    run = RunFolder(path / "run")
    run.create({"seed": 0})
    return run


def test_training_learns_and_logs_each_evaluation(tmp_path):
    run = folder(tmp_path)
    outcome = train(method(), blobs(), Schedule(steps=45, batch_size=20, eval_every=10, seed=0), run)
    assert [e.step for e in outcome.history] == [0, 10, 20, 30, 40, 45]
    assert [e.epoch for e in outcome.history] == pytest.approx([0, 10 / 3, 20 / 3, 10, 40 / 3, 15], abs=1e-5)
    assert outcome.history[-1].val_accuracy == 1
    assert outcome.history[-1].val_loss < outcome.history[0].val_loss / 5
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    assert lines == [dataclasses.asdict(e) for e in outcome.history]
    assert lines[0]["train_loss"] is None
    assert lines[0]["eta"] is None
    assert set(lines[-1]["relative_update"]) == set(outcome.params)


def test_the_log_agrees_with_a_plain_loop():
    data, schedule = blobs(), Schedule(steps=3, batch_size=60, eval_every=3, seed=0)
    outcome = train(method(), data, schedule)
    plain = method()
    params = plain.network.init(0)
    state, losses, ratios = plain.init(params), [], {}
    for _ in range(3):
        grads, value = torch.func.grad_and_value(plain.objective)(params, *data.train)
        losses.append(value.item())
        updates, state = plain.update(grads, state, params)
        ratios = {name: (updates[name].norm() / params[name].norm()).item() for name in params}
        params = {name: params[name] + updates[name] for name in params}
    last = outcome.history[-1]
    assert last.train_loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert last.eta == pytest.approx(state.eta.item(), rel=1e-5)
    assert last.relative_update == pytest.approx(ratios, rel=1e-4)
    torch.testing.assert_close(outcome.params, params)


def test_equal_seeds_give_equal_runs_and_others_differ():
    runs = [train(method(), blobs(), Schedule(10, 20, 10, seed)) for seed in (1, 1, 2)]
    assert all(torch.equal(runs[0].params[name], runs[1].params[name]) for name in runs[0].params)
    assert runs[0].history[-1].val_loss != runs[2].history[-1].val_loss


def test_evaluation_in_batches_is_the_mean_over_all(monkeypatch):
    data, way = blobs(), method()
    params = way.network.init(0)
    whole = evaluation(way, params, data.train, data.train.labels)
    monkeypatch.setattr("modula_agd.train.loop._EVALUATION_BATCH", 7)
    assert evaluation(way, params, data.train, data.train.labels) == pytest.approx(whole, rel=1e-6)
    assert whole[0] == pytest.approx(way.objective(params, *data.train).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["agd", "closed-form", "exact", "certified"])
def test_every_method_trains(name):
    network = build("linear", outputs=3, width=8, inputs=6, depth=2)
    outcome = train(METHODS[name](network, SquareLoss()), blobs(), Schedule(30, 60, 30, 0))
    assert outcome.history[-1].val_loss < outcome.history[0].val_loss


def test_an_interrupt_keeps_the_last_step(tmp_path, monkeypatch):
    run, calls = folder(tmp_path), []
    update = Method.update

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return update(self, *arguments, **options)

    monkeypatch.setattr(Method, "update", interrupted)
    outcome = train(method(), blobs(), Schedule(20, 20, 3, 0), run)
    assert outcome.interrupted
    assert outcome.steps == 4
    assert [e.step for e in outcome.history] == [0, 3]
    saved = load(run.checkpoint)
    assert saved.metadata["step"] == "4"
    assert all(torch.equal(saved.params[name], value) for name, value in outcome.params.items())


def test_a_non_finite_input_is_an_error_and_the_log_stays_valid(tmp_path):
    run, data = folder(tmp_path), blobs()
    data.train.inputs[0, 0] = math.nan
    with pytest.raises(NonFiniteGradient):
        train(method(), data, Schedule(20, 60, 3, 0), run)
    assert [json.loads(line)["step"] for line in run.log.read_text().splitlines()] == [0]


def test_a_schedule_has_no_zero():
    with pytest.raises(InvalidArgument, match="batch_size=0"):
        Schedule(1, 0, 1, 0)
