"""The loop: its log tells what happened, equal seeds give equal runs, an interrupt keeps what there is."""

import dataclasses
import json
import math

import pytest
import torch

from modula_agd import (
    METHODS,
    MLP,
    CrossEntropy,
    Dropout,
    Features,
    InvalidArgument,
    Linear,
    Method,
    NonFiniteGradient,
    SquareLoss,
)
from modula_agd.train import (
    LOSSES,
    Characters,
    Classification,
    Examples,
    ImageFacts,
    ImageTask,
    RunFolder,
    Schedule,
    TextTask,
    Vocabulary,
    build,
    load,
    train,
)
from modula_agd.train.trainer import Trainer


def blobs(
    count: int = 60, shape: tuple[int, int, int] = (1, 1, 6), classes: int = 3, *, flat: bool = True
) -> ImageTask:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = torch.randn((classes, *shape), generator=generator)[labels]
    images = images + 0.1 * torch.randn((count, *shape), generator=generator)
    images = images / images.square().mean((1, 2, 3), keepdim=True).sqrt()
    facts = ImageFacts("blobs", classes, shape, (0.0,) * shape[0], (1.0,) * shape[0])
    data = Classification(facts, Examples(images, labels), Examples(images[:12], labels[:12]))
    return ImageTask(data, flat)


def verse(context: int = 8) -> TextTask:
    ids = torch.arange(400) % 5
    return TextTask(Characters("verse", Vocabulary("abcde"), ids[:360], ids[360:]), context)


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


def test_the_folder_is_made_and_one_with_a_log_is_refused(tmp_path):
    run, schedule = RunFolder(tmp_path / "new" / "run"), Schedule(steps=1, batch_size=20, eval_every=1, seed=0)
    train(method(), blobs(), schedule, run)
    before = run.log.read_text()
    with pytest.raises(InvalidArgument, match="holds the log of an earlier run"):
        train(method(), blobs(), schedule, run)
    assert run.log.read_text() == before


def test_the_log_agrees_with_a_plain_loop():
    task, schedule = blobs(), Schedule(steps=3, batch_size=60, eval_every=3, seed=0)
    outcome = train(method(), task, schedule)
    inputs, labels = task.data.train.inputs.flatten(1), task.data.train.labels
    plain = method()
    params = plain.network.init(0)
    state, losses, ratios = plain.init(params), [], {}
    for _ in range(3):
        grads, value = torch.func.grad_and_value(plain.objective)(params, inputs, labels)
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


def test_evaluation_in_batches_is_the_mean_over_all():
    task, way = blobs(), method()
    trainer = Trainer(way, task, 0)
    point = trainer.start(0)
    whole = trainer.evaluated(point, 100)
    assert trainer.evaluated(point, 5) == pytest.approx(whole, rel=1e-6)
    inputs, labels = task.data.validation
    assert whole[0] == pytest.approx(way.objective(point.params, inputs.flatten(1), labels).item(), rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name):
    network = build("linear", blobs().facts, logits=False, width=8, depth=2)
    outcome = train(METHODS[name](network, SquareLoss()), blobs(), Schedule(30, 60, 30, 0))
    assert outcome.history[-1].val_loss < outcome.history[0].val_loss


@pytest.mark.parametrize("loss", LOSSES)
def test_text_trains_with_every_loss(loss):
    task = verse()
    network = build("gpt", task.facts, width=8, depth=1, heads=2)
    outcome = train(METHODS["exact"](network, LOSSES[loss]), task, Schedule(30, 16, 30, 0))
    first, last = outcome.history
    assert last.val_loss < 0.7 * first.val_loss
    assert last.val_accuracy > 0.9 > first.val_accuracy


def test_running_statistics_are_renewed_kept_and_used(tmp_path):
    run, task = folder(tmp_path), blobs(shape=(1, 8, 8), flat=False)
    network = build("cnn", task.facts, width=4)
    assert network.buffers()
    outcome = train(METHODS["agd"](network, CrossEntropy()), task, Schedule(20, 30, 20, 0), run)
    start, saved = network.buffers(), load(run.checkpoint)
    assert outcome.buffers.keys() == start.keys() == saved.buffers.keys()
    assert all(not torch.equal(value, start[name]) for name, value in outcome.buffers.items())
    assert all(torch.equal(value, saved.buffers[name]) for name, value in outcome.buffers.items())
    assert not any(value.requires_grad for value in outcome.buffers.values())
    (batch,) = task.evaluation(100)
    expected = CrossEntropy()(network(outcome.average, batch.inputs, outcome.average), batch.labels)
    assert outcome.history[-1].val_loss == pytest.approx(expected.item(), rel=1e-5)


def test_dropout_draws_from_the_seed_alone_and_not_in_evaluation():
    task = verse()
    network = build("gpt", task.facts, width=8, depth=1, heads=2, dropout=0.3)
    runs = []
    for seed in (1, 1, 2):
        torch.rand(1)
        runs.append(train(METHODS["exact"](network, CrossEntropy()), task, Schedule(5, 16, 5, seed)))
    assert all(torch.equal(runs[0].params[name], runs[1].params[name]) for name in runs[0].params)
    assert runs[0].history[-1].val_loss == runs[1].history[-1].val_loss != runs[2].history[-1].val_loss
    plain = build("gpt", task.facts, width=8, depth=1, heads=2)
    without = train(METHODS["exact"](plain, CrossEntropy()), task, Schedule(5, 16, 5, 1))
    assert without.history[-1].train_loss != runs[0].history[-1].train_loss
    assert without.history[0].val_loss == pytest.approx(runs[0].history[0].val_loss)


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
    run, task = folder(tmp_path), blobs()
    task.data.train.inputs[0, 0] = math.nan
    with pytest.raises(NonFiniteGradient):
        train(method(), task, Schedule(20, 60, 3, 0), run)
    assert [json.loads(line)["step"] for line in run.log.read_text().splitlines()] == [0]


def test_a_schedule_has_no_zero():
    with pytest.raises(InvalidArgument, match="batch_size=0"):
        Schedule(1, 0, 1, 0)


def test_a_certified_step_knows_the_residual_under_the_masks_of_its_gradient():
    network = Linear(3, 8) @ Dropout(0.5) @ Linear(8, 6)
    task = blobs()
    trainer = Trainer(METHODS["certified"](network, SquareLoss()), task, seed=0)
    seen = []

    class Watched:
        """The method, which remembers its evidence."""

        def __getattr__(self, name):
            return getattr(METHODS["certified"](network, SquareLoss()), name)

        def evidence(self, *arguments):
            seen.append(METHODS["certified"](network, SquareLoss()).evidence(*arguments))
            return seen[-1]

    point, batch = trainer.start(0), next(task.batches(20, 0))
    masks = trainer.generator.clone_state()
    trainer.method = Watched()  # type: ignore[assignment]
    trainer.step(point, batch)
    outputs, _ = network.run(point.params, batch.inputs, generator=masks)
    residual = SquareLoss().residual(outputs, trainer.aims(batch.labels), Features(3))
    assert torch.equal(seen[0].residual, residual)
    # and the gradient drew those masks: the generator stands where they end
    assert torch.equal(trainer.generator.get_state(), masks.get_state())
