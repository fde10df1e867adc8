"""Going on from a checkpoint: every kind of run ends to the bit as without the break, and what cannot be gone on with is said."""

import json
import os
import random
import signal
from itertools import islice

import numpy
import PIL.Image
import pytest
import torch

from faults import differences
from modula_agd import METHODS, CrossEntropy, Dropout, InvalidArgument, Linear, Logits, SquareLoss, agd
from modula_agd.train import (
    Characters,
    CheckpointError,
    Classification,
    Examples,
    ImageFacts,
    ImageTask,
    RunFolder,
    Schedule,
    StreamTask,
    TextTask,
    Vocabulary,
    build,
    image_folder,
    load,
    record,
    train,
)
from modula_agd.train.trainer import Trainer
from pictures import colour

SCHEDULE = Schedule(steps=23, batch_size=12, eval_every=9, seed=3)


def images(channels: int = 3, side: int = 8, *, augment: bool = False, flat: bool = False, seed: int = 0) -> ImageTask:
    """Fifty images of five classes: four batches of twelve make an epoch."""
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = torch.randn((50, channels, side, side), generator=generator), torch.arange(50) % 5
    facts = ImageFacts("noise", 5, (channels, side, side), (0.0,) * channels, (1.0,) * channels)
    return ImageTask(
        Classification(facts, Examples(pixels, labels), Examples(pixels[:20], labels[:20]), str(seed)), flat, augment
    )


def text() -> TextTask:
    ids = torch.randint(5, (400,), generator=torch.Generator().manual_seed(0))
    return TextTask(Characters("verse", Vocabulary("abcde"), ids[:360], ids[360:]), 8)


def files(folder, workers: int) -> StreamTask:
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for row in range(7):
                PIL.Image.fromarray(colour(1, row, 12)[0]).save(folder / split / label / f"{row}.png")
    return StreamTask(image_folder(folder, side=8), False, workers, torch.device("cpu"))


def _held_out(arch, task, **options):
    return METHODS["held-out"](build(arch, task.facts, **options), CrossEntropy()), task


KINDS = {
    "fcn": lambda _: _held_out("fcn", images(flat=True), width=16),
    "published": lambda _: (
        METHODS["agd"](build("fcn", images().facts, logits=False, width=16), SquareLoss()),
        images(flat=True),
    ),
    "exact": lambda _: (
        METHODS["exact"](build("resmlp", images().facts, width=16), CrossEntropy()),
        images(flat=True),
    ),
    "augmented, with batch norm": lambda _: _held_out("cnn", images(augment=True), width=4),
    "text with dropout": lambda _: _held_out("gpt", text(), width=8, depth=1, heads=2, dropout=0.2),
    "certified with dropout": lambda _: (
        METHODS["certified"](Linear(Logits(5), 8) @ Dropout(0.5) @ Linear(8, 192), CrossEntropy()),
        images(flat=True),
    ),
    "directions that serve several steps, decay": lambda _: (
        agd(build("fcn", images().facts, width=16), CrossEntropy(), refresh=4, decay=0.1),
        images(flat=True),
    ),
    "image files": lambda folder: _held_out("cnn", files(folder, 0), width=2),
    "image files, read by a process": lambda folder: _held_out("cnn", files(folder, 1), width=2),
}


def stopped(monkeypatch, step: int, place: str = "step", number: int = signal.SIGTERM):
    """Have a signal come in the step that makes so many, or in the evaluation behind it."""
    inner = getattr(Trainer, place)

    def signalled(self, point, *arguments, **options):
        if point.step + (place == "step") == step:
            os.kill(os.getpid(), number)
        return inner(self, point, *arguments, **options)

    monkeypatch.setattr(Trainer, place, signalled)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_goes_on_to_the_same_end(tmp_path, monkeypatch, kind):
    method, task = KINDS[kind](tmp_path)
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    there = train(method, task, SCHEDULE, whole)
    # in the middle of an epoch and of two evaluations; on an evaluation; twice
    for step, place in ((5, "step"), (9, "evaluated"), (18, "step")):
        with monkeypatch.context() as patch:
            stopped(patch, step, place)
            resume = load(broken.checkpoint) if broken.checkpoint.exists() else None
            outcome = train(*KINDS[kind](tmp_path), SCHEDULE, broken, resume=resume)
        assert (outcome.steps, outcome.stopped, outcome.saved) == (step, signal.SIGTERM, True)
        assert int(load(broken.checkpoint).metadata["step"]) == step
    # as after a kill: the log is ahead of the checkpoint, and its last line torn
    with broken.log.open("a") as log:
        log.write(broken.log.read_text().splitlines()[-1] + '\n{"step": 1')
    here = train(*KINDS[kind](tmp_path), SCHEDULE, broken, resume=load(broken.checkpoint))
    assert list(differences(whole.path, broken.path)) == []
    assert [e.step for e in here.history] == [e.step for e in there.history] == [0, 9, 18, 23]
    for part in ("params", "buffers", "average"):
        mine, theirs = getattr(here, part), getattr(there, part)
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not here.interrupted


def test_no_difference_goes_unseen(tmp_path):
    method, task = KINDS["fcn"](tmp_path)
    for name, seed in (("one", 0), ("other", 0), ("third", 1)):
        train(method, task, Schedule(3, 12, 2, seed), RunFolder(tmp_path / name))
    assert list(differences(tmp_path / "one", tmp_path / "other")) == []
    found = list(differences(tmp_path / "one", tmp_path / "third"))
    assert {"params of 0.weight", "average of 0.weight", "loop of dropout", "seed", "log"} <= set(found)
    lines = (tmp_path / "other" / "log.jsonl").read_text()
    (tmp_path / "other" / "log.jsonl").write_text(lines + lines.splitlines()[-1] + "\n")
    assert list(differences(tmp_path / "one", tmp_path / "other")) == ["log"]


@pytest.mark.parametrize("kind", ["fcn", "augmented, with batch norm", "text with dropout", "image files"])
@pytest.mark.parametrize("start", [1, 4, 5, 11])
def test_batches_from_a_start_on_are_those_behind_it(tmp_path, kind, start):
    _, task = KINDS[kind](tmp_path)
    behind = islice(task.batches(12, 7), start, start + 6)
    for one, other in zip(behind, task.batches(12, 7, start), strict=False):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("kind", ["augmented, with batch norm", "text with dropout", "image files"])
def test_no_run_draws_from_a_global_source_of_randomness(tmp_path, kind):
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    train(*KINDS[kind](tmp_path), Schedule(3, 12, 2, 0), RunFolder(tmp_path / "run"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy.random.get_state()[1].tolist() == before[2]


def test_a_run_may_be_made_longer_from_python(tmp_path):
    method, task = KINDS["text with dropout"](tmp_path)
    run = RunFolder(tmp_path / "run")
    train(method, task, Schedule(9, 12, 9, 0), run)
    longer = train(method, task, Schedule(18, 12, 9, 0), run, resume=load(run.checkpoint))
    assert [e.step for e in longer.history] == [0, 9, 18]
    whole = train(method, task, Schedule(18, 12, 9, 0))
    assert all(torch.equal(longer.params[name], value) for name, value in whole.params.items())


def test_another_rank_goes_on_without_a_folder(half):
    method, task, run = half
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    there = train(method, task, SCHEDULE)
    here = train(method, task, SCHEDULE, resume=load(run.checkpoint))
    assert all(torch.equal(here.params[name], value) for name, value in there.params.items())
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def watched(monkeypatch) -> list[int]:
    """The steps of which checkpoints are written from now on."""
    written, keep = [], record.keep

    def one(path, point, *rest, **named):
        written.append(point.step)
        keep(path, point, *rest, **named)

    monkeypatch.setattr(record, "keep", one)
    return written


@pytest.mark.parametrize(("every", "steps"), [(4, [0, 4, 8, 9, 12, 16, 18, 20, 23]), (None, [0, 9, 18, 23])])
def test_checkpoints_are_written_at_evaluations_and_in_between(tmp_path, monkeypatch, every, steps):
    written = watched(monkeypatch)
    train(*KINDS["fcn"](tmp_path), Schedule(23, 12, 9, 3, every), RunFolder(tmp_path / "run"))
    assert written == steps


def test_without_a_number_of_steps_a_checkpoint_is_due_after_five_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_SECONDS", 0.0)
    written = watched(monkeypatch)
    train(*KINDS["fcn"](tmp_path), Schedule(4, 12, 3, 3), RunFolder(tmp_path / "run"))
    assert written == [0, 1, 2, 3, 4]


@pytest.fixture
def half(tmp_path, monkeypatch):
    """A method, its task and the folder of a run that was stopped after five steps."""
    method, task = KINDS["text with dropout"](tmp_path)
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        stopped(patch, 5)
        train(method, task, SCHEDULE, run)
    return method, task, run


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (Schedule(23, 12, 9, 4), "with seed 4, but the checkpoint was written with 3"),
        (Schedule(23, 13, 9, 3), "with batch_size 13, but the checkpoint was written with 12"),
        (Schedule(23, 12, 8, 3), "with eval_every 8, but the checkpoint was written with 9"),
        (Schedule(4, 12, 9, 3), "to step 4, but the checkpoint is of step 5 already"),
    ],
)
def test_another_schedule_is_refused(half, schedule, said):
    method, task, run = half
    before = run.log.read_text()
    with pytest.raises(InvalidArgument, match=said):
        train(method, task, schedule, run, resume=load(run.checkpoint))
    assert run.log.read_text() == before


def test_other_data_another_network_and_another_method_are_refused(half, tmp_path):
    method, task, run = half
    saved = load(run.checkpoint)
    with pytest.raises(InvalidArgument, match="the data are not those that the run began with"):
        train(
            method, TextTask(Characters(**{**vars(task.text), "fingerprint": "other"}), 8), SCHEDULE, run, resume=saved
        )
    wider = METHODS["held-out"](build("gpt", task.facts, width=16, depth=1, heads=2, dropout=0.2), CrossEntropy())
    with pytest.raises(CheckpointError, match="other weights than the network to be trained"):
        train(wider, task, SCHEDULE, run, resume=saved)
    published = METHODS["agd"](build("gpt", task.facts, width=8, depth=1, heads=2, dropout=0.2), CrossEntropy())
    with pytest.raises(CheckpointError, match="momentum, where this method has none"):
        train(published, task, SCHEDULE, run, resume=saved)
    deeper = METHODS["held-out"](build("gpt", task.facts, width=8, depth=2, heads=2, dropout=0.2), CrossEntropy())
    with pytest.raises(CheckpointError, match="other weights than the network to be trained"):
        train(deeper, task, SCHEDULE, run, resume=saved)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda saved: saved._replace(metadata={}), "does not tell what going on needs"),
        (lambda saved: saved._replace(metadata={**saved.metadata, "loop": "{"}), "does not tell what going on needs"),
        (lambda saved: saved._replace(metadata={**saved.metadata, "loop": "{}"}), "it lacks batch_size"),
        (lambda saved: saved._replace(loop={}), "state of dropout's generator does not fit"),
        (lambda saved: saved._replace(loop={"dropout": torch.zeros(3, dtype=torch.uint8)}), "generator does not fit"),
        (lambda saved: saved._replace(state={**saved.state, "steps": torch.tensor(-1)}), "steps is -1"),
        (lambda saved: saved._replace(state={**saved.state, "skipped": torch.tensor(10**6)}), "1000000 were left out"),
        (
            lambda saved: saved._replace(state={name: value * torch.nan for name, value in saved.state.items()}),
            "cannot be gone on with",
        ),
        (
            lambda saved: saved._replace(state={k: v for k, v in saved.state.items() if k != "eta"}),
            "has no eta",
        ),
        (
            # of a version whose directions were made of the momentum
            lambda saved: saved._replace(state={k: v for k, v in saved.state.items() if not k.startswith("lead")}),
            "its lead is not of the parameters",
        ),
        (lambda saved: saved._replace(average={}), "other averaged weights than the network"),
    ],
)
def test_a_checkpoint_that_cannot_be_gone_on_from_is_refused(half, spoil, said):
    method, task, run = half
    with pytest.raises(CheckpointError, match=said):
        train(method, task, SCHEDULE, run, resume=spoil(load(run.checkpoint)))


@pytest.mark.parametrize("log", [None, "", "no JSON\n" * 200, json.dumps({"step": 1}) + "\n" + " " * 999])
def test_a_log_that_is_not_the_checkpoints_is_refused(half, log):
    method, task, run = half
    run.log.unlink()
    if log is not None:
        run.log.write_text(log)
    with pytest.raises(CheckpointError, match="is not the one that its checkpoint belongs to"):
        train(method, task, SCHEDULE, run, resume=load(run.checkpoint))
