"""A share of the training data set apart: what it holds, the best weights by it, and the command that uses it."""

import errno
import json
import os
import re
from dataclasses import replace

import numpy
import pytest
import torch

from faults import differences
from modula_agd import METHODS, CrossEntropy, InvalidArgument
from modula_agd.command_line import main
from modula_agd.train import (
    CheckpointError,
    Examples,
    NotSaved,
    RunFolder,
    Schedule,
    Task,
    build,
    command_line,
    continuing,
    load,
    restore,
    task,
    train,
)
from modula_agd.train.apart import drawn_apart
from modula_agd.train.trainer import Trainer, judged
from test_resume import files, images, stopped, text

SCHEDULE = Schedule(steps=30, batch_size=12, eval_every=3, seed=3)
TINY = [
    "train",
    "--data",
    "digits",
    "--width",
    "16",
    "--quiet",
    "--batch-size",
    "64",
    "--steps",
    "6",
    "--eval-every",
    "2",
]


def overfitting():
    """A network that learns classes by faint patterns, and by heart what is labelled wrongly, as a fifth is."""
    source = images(flat=True)
    pixels, labels = source.data.train
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn((5, *pixels.shape[1:]), generator=generator)
    wrong = torch.rand(len(labels), generator=generator) < 0.2
    shown = Examples(pixels + 0.5 * patterns[labels], torch.where(wrong, (labels + 1) % 5, labels))
    source = replace(source, data=replace(source.data, train=shown))
    return METHODS["held-out"](build("fcn", source.facts, width=32), CrossEntropy()), source.apart(0.2)


# -- which ----------------------------------------------------------------------------------------------------------------


def test_samples_are_drawn_without_regard_to_their_order_and_each_lies_on_one_side() -> None:
    learned, apart = drawn_apart(1000, 0.1, "samples")
    assert torch.equal(torch.cat([learned, apart]).sort().values, torch.arange(1000))
    assert len(apart) == 100
    # of data that are sorted by class, each class is on both sides
    assert len((apart // 100).unique()) == 10
    assert all(map(torch.equal, (learned, apart), drawn_apart(1000, 0.1, "samples")))


def test_images_in_memory_keep_their_labels_and_leave_the_test_split_out() -> None:
    source = images()
    part = source.apart(0.2)
    assert isinstance(part, Task)
    assert (len(part.data.train.labels), len(part.data.validation.labels), part.held_out) == (40, 10, "set-apart")
    whole = source.data.train.inputs
    for side in (part.data.train, part.data.validation):
        for image, label in zip(*side, strict=True):
            place = int((whole == image).flatten(1).all(1).nonzero())
            assert label == source.data.train.labels[place]
    assert "40 training and 10 held-out" in str(part)
    assert source.held_out == "test"


def test_of_a_text_it_is_the_end() -> None:
    source = text()
    part = source.apart(0.25)
    assert torch.equal(part.text.train, source.text.train[:270])
    assert torch.equal(part.text.validation, source.text.train[270:])
    assert (part.held_out, source.held_out, part.facts) == ("set-apart", "validation", source.facts)


def test_of_image_files_it_is_some_of_each_class(tmp_path) -> None:
    source = files(tmp_path, 0)
    part = source.apart(0.5)
    kept, seen = part.folder.train, part.folder.validation
    assert sorted((*kept.paths, *seen.paths)) == sorted(source.folder.train.paths)
    assert (len(seen.paths), set(seen.labels), part.held_out) == (7, {0, 1}, "set-apart")
    for side in (kept, seen):
        assert all((path.parent.name == "bee") == label for path, label in zip(side.paths, side.labels, strict=True))


@pytest.mark.parametrize("kind", ["images", "text", "files"])
def test_data_are_known_by_the_share_that_is_missing(tmp_path, kind) -> None:
    named = replace(text(), text=replace(text().text, fingerprint="a text"))
    source = {"images": images, "text": lambda: named, "files": lambda: files(tmp_path, 0)}[kind]()
    prints = {one.fingerprint for one in (source, source.apart(0.25), source.apart(0.5))}
    assert len(prints) == 3
    assert source.apart(0.25).fingerprint == source.apart(numpy.float64(0.25)).fingerprint


@pytest.mark.parametrize("wrong", [0, 1, -0.1, 2, True, None, "0.1", float("nan")])
def test_a_share_is_between_0_and_1(wrong) -> None:
    with pytest.raises(InvalidArgument, match="above 0 and below 1"):
        images().apart(wrong)


@pytest.mark.parametrize(("share", "left"), [(0.001, "0 to look at and 50"), (0.999, "50 to look at and 0")])
def test_a_share_leaves_something_on_both_sides(share, left) -> None:
    with pytest.raises(InvalidArgument, match=f"of 50 samples.*{left}"):
        images().apart(share)


def test_a_text_must_have_a_window_on_both_sides() -> None:
    with pytest.raises(InvalidArgument, match="windows of 8 characters"):
        text().apart(0.02)


# -- the best of a run -----------------------------------------------------------------------------------------------------


def test_the_lowest_evaluation_is_kept_beside_the_last(tmp_path) -> None:
    method, source = overfitting()
    run = RunFolder(tmp_path / "run")
    outcome = train(method, source, SCHEDULE, run, best=True)
    losses = {each.step: each.val_loss for each in outcome.history}
    lowest = min(losses, key=lambda step: losses[step])
    # it does overfit, and not from the start
    assert 0 < lowest < 30
    kept = load(run.best)
    assert int(kept.metadata["step"]) == lowest
    assert judged(method, kept.average, source, 256).means()[0] == pytest.approx(losses[lowest], rel=1e-6)
    assert int(load(run.checkpoint).metadata["step"]) == 30


def test_nothing_but_the_last_is_kept_unless_asked_for(tmp_path) -> None:
    run = RunFolder(tmp_path / "run")
    train(*overfitting(), SCHEDULE, run)
    assert not run.best.exists()
    with pytest.raises(CheckpointError, match=r"no checkpoint .*best\.safetensors.*--hold-out"):
        restore(run.path, best=True)


def test_a_run_that_goes_on_keeps_the_same(tmp_path, monkeypatch) -> None:
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    train(*overfitting(), SCHEDULE, whole, best=True)
    for step in (5, 16, 28):
        with monkeypatch.context() as patch:
            stopped(patch, step)
            resume = load(broken.checkpoint) if broken.checkpoint.exists() else None
            train(*overfitting(), SCHEDULE, broken, resume=resume, best=True)
    train(*overfitting(), SCHEDULE, broken, resume=load(broken.checkpoint), best=True)
    assert list(differences(whole.path, broken.path)) == []
    assert 0 < int(load(broken.best).metadata["step"]) < 30


@pytest.mark.parametrize("lost", ["begun without", "deleted"])
def test_a_run_whose_best_is_not_there_keeps_the_best_that_comes(tmp_path, lost) -> None:
    run = RunFolder(tmp_path / "run")
    train(*overfitting(), SCHEDULE, run, best=lost == "deleted")
    run.best.unlink(missing_ok=True)
    # what comes is worse than what there was
    longer = replace(SCHEDULE, steps=42)
    outcome = train(*overfitting(), longer, run, resume=load(run.checkpoint), best=True)
    losses = {each.step: each.val_loss for each in outcome.history if each.step > 30}
    assert min(losses.values()) > min(each.val_loss for each in outcome.history)
    assert int(load(run.best).metadata["step"]) == min(losses, key=lambda step: losses[step])


def test_a_new_run_does_not_take_an_old_best_for_its_own(tmp_path) -> None:
    run = RunFolder(tmp_path / "run")
    train(*overfitting(), SCHEDULE, run, best=True)
    run.log.unlink()
    train(*overfitting(), SCHEDULE, run)
    assert not run.best.exists()


def test_one_can_go_on_from_the_best(tmp_path) -> None:
    run = RunFolder(tmp_path / "run")
    train(*overfitting(), SCHEDULE, run, best=True)
    again = train(*overfitting(), SCHEDULE, resume=load(run.best))
    last = load(run.checkpoint)
    assert all(torch.equal(value, last.params[name]) for name, value in again.params.items())


def test_a_best_that_could_not_be_written_is_said_and_made_up_for(tmp_path, monkeypatch) -> None:
    run, inner, failed = RunFolder(tmp_path / "run"), continuing.keep, []

    def keep(path, point, *rest, **options):
        if path == run.best and point.step == 3:
            failed.append(point.step)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return inner(path, point, *rest, **options)

    monkeypatch.setattr("modula_agd.train.record.keep", keep)
    with pytest.warns(NotSaved, match=r"step 3 could not be written: .*best\.safetensors is as it was"):
        outcome = train(*overfitting(), SCHEDULE, run, best=True)
    assert failed == [3]
    # the lowest of those that could be written
    losses = {each.step: each.val_loss for each in outcome.history if each.step not in failed}
    assert int(load(run.best).metadata["step"]) == min(losses, key=lambda step: losses[step])


# -- the command -----------------------------------------------------------------------------------------------------------


def test_the_command_looks_at_the_test_split_once_by_the_best_weights(tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    assert main([*TINY, "--hold-out", "0.25", "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "1,078 training and 359 held-out samples" in printed
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["val_loss"])
    assert f"set-apart loss {lines[-1]['val_loss']:.4f} at step 6" in printed
    kept, whole = restore(folder, best=True), task("digits", flat=True)
    assert kept.step == best["step"]
    meter = judged(METHODS["fading"](kept.network, CrossEntropy()), kept.average, whole, 256)
    loss, accuracy = meter.means()
    told = re.search(
        r"by the weights of step (\d+), the best on what was set apart: test accuracy (\S+)%, test loss (\S+)", printed
    )
    assert told is not None
    assert int(told[1]) == kept.step
    assert float(told[2]) / 100 == pytest.approx(accuracy, abs=1e-4)
    assert float(told[3]) == pytest.approx(loss, abs=1e-4)
    seen = json.loads((folder / "held_out.json").read_text())
    assert seen == {"step": kept.step, "split": "test", "loss": loss, "accuracy": accuracy}


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_last_look_that_was_broken_off_is_made_when_the_run_goes_on(tmp_path, monkeypatch, capsys, how) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:

        def broken(*_, **__):
            raise KeyboardInterrupt if how == "interrupted" else SystemExit(9)

        patch.setattr(command_line, "judged", broken)
        try:
            status = main([*TINY, "--hold-out", "0.25", "--out", str(folder)])
        except SystemExit as exit:
            status = exit.code
    assert status == {"interrupted": 130, "killed": 9}[how]
    if how == "interrupted":
        assert f"before what is held out was looked at. Do it with: modula-agd train --resume {folder}" in (
            capsys.readouterr().err
        )
    assert not (folder / "held_out.json").exists()
    assert main(["train", "--resume", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "is finished" in said
    assert f"by the weights of step {json.loads((folder / 'held_out.json').read_text())['step']}, the best" in said
    # once is enough
    monkeypatch.setattr(command_line, "judged", None)
    assert main(["train", "--resume", str(folder)]) == 0
    assert said.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]


def test_where_no_evaluation_was_finite_nothing_was_kept_and_that_is_said(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Trainer, "evaluated", lambda *_: (None, None))
    assert main([*TINY, "--hold-out", "0.25", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "set-apart accuracy not finite, set-apart loss not finite at step 6" in said
    assert "no weights were kept, as no evaluation of what was set apart was finite" in said


def test_the_command_goes_on_with_the_same_share_alone(tmp_path, capsys) -> None:
    folder = str(tmp_path / "run")
    assert main([*TINY, "--hold-out", "0.25", "--out", folder]) == 0
    assert main(["train", "--resume", folder]) == 0
    assert "is finished" in capsys.readouterr().out
    for other in ("0.5", "0"):
        assert main(["train", "--resume", folder, "--hold-out", other]) == 2
        assert "was given to go on with a run that was begun with 0.25" in capsys.readouterr().err
    assert main([*TINY, "--out", str(tmp_path / "whole")]) == 0
    assert main(["train", "--resume", str(tmp_path / "whole"), "--hold-out", "0"]) == 0


@pytest.mark.parametrize(
    ("share", "said"), [("1", "below 1"), ("x", "not a number"), ("0.0001", "leaves 0 to look at")]
)
def test_the_command_says_what_a_share_may_be(tmp_path, capsys, share, said) -> None:
    try:
        status = main([*TINY, "--hold-out", share, "--out", str(tmp_path / "run")])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_sample_may_be_of_the_best(tmp_path, capsys) -> None:
    (tmp_path / "verse.txt").write_text("a rose is a rose is a rose\n" * 20)
    folder = str(tmp_path / "run")
    arguments = ["train", "--data", f"text:{tmp_path / 'verse.txt'}", "--arch", "gpt", "--context", "8", "--quiet"]
    arguments += ["--depth", "1", "--width", "8", "--heads", "2", "--steps", "4", "--eval-every", "2", "--out", folder]
    assert main([*arguments, "--hold-out", "0.2"]) == 0
    assert "the best on what was set apart" in capsys.readouterr().out
    assert main(["sample", folder, "--best", "--length", "9", "--prompt", "a"]) == 0
    assert len(capsys.readouterr().out.rstrip("\n")) == 10
    assert main([*arguments, "--overwrite"]) == 0
    capsys.readouterr()
    # an earlier run's best is not the new one's
    assert main(["sample", folder, "--best"]) == 2
    assert "--hold-out" in capsys.readouterr().err
