"""A disk without room: training goes on, the checkpoint before stays whole, and once there is room nothing is missing."""

import errno
import os
import signal

import pytest
import torch

from faults import differences, forked
from modula_agd.command_line import main
from modula_agd.train import NotSaved, RunFolder, Schedule, command_line, files, load, train
from test_resume import KINDS

# nine checkpoints: a log, a file and a folder for each; one new name for each
CALLS = [("fsync", 8, 14), ("fsync", 5, 6), ("replace", 4, 7), ("replace", 2, 3)]


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def full(monkeypatch, fails: str, since: int, until: int) -> None:
    """Refuse one kind of call from one, counted from 1, to another."""
    inner, seen = getattr(os, fails), []

    def refused(*arguments, **options):
        seen.append(1)
        if since <= len(seen) < until:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return inner(*arguments, **options)

    monkeypatch.setattr(os, fails, refused)


@pytest.mark.parametrize(("fails", "since", "until"), CALLS)
def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, monkeypatch, run, fails, since, until):
    whole = RunFolder(tmp_path / "whole")
    schedule = Schedule(16, 12, 4, 3, checkpoint_every=2)
    train(*KINDS["text with dropout"](tmp_path), schedule, whole)
    with monkeypatch.context() as patch:
        full(patch, fails, since, until)
        with pytest.warns(NotSaved, match=r"step \d+ could not be written: .*No space left on device.*Make room"):
            outcome = train(*KINDS["text with dropout"](tmp_path), schedule, run)
    assert outcome.saved
    assert list(differences(whole.path, run.path)) == []


@pytest.mark.parametrize(("fails", "since"), [("fsync", 8), ("fsync", 13), ("replace", 4)])
def test_a_disk_that_stays_full_leaves_the_checkpoint_before_whole(tmp_path, monkeypatch, run, fails, since):
    whole = RunFolder(tmp_path / "whole")
    schedule = Schedule(16, 12, 4, 3, checkpoint_every=2)
    train(*KINDS["text with dropout"](tmp_path), schedule, whole)
    with monkeypatch.context() as patch:
        full(patch, fails, since, 10**9)
        with pytest.warns(NotSaved):
            outcome = train(*KINDS["text with dropout"](tmp_path), schedule, run)
    assert not outcome.saved
    # nothing of the result is lost for whoever called, either
    assert all(torch.equal(value, load(whole.checkpoint).params[name]) for name, value in outcome.params.items())
    assert 0 < int(load(run.checkpoint).metadata["step"]) < 16
    assert not [path for path in run.path.iterdir() if path.name.endswith(".tmp")]
    train(*KINDS["text with dropout"](tmp_path), schedule, run, resume=load(run.checkpoint))
    assert list(differences(whole.path, run.path)) == []


def test_a_disk_that_is_full_from_the_start_is_an_error(tmp_path, monkeypatch, run):
    full(monkeypatch, "fsync", 1, 10**9)
    with pytest.raises(OSError, match="No space left"):
        train(*KINDS["text with dropout"](tmp_path), Schedule(4, 12, 4, 3), run)


def test_the_command_warns_in_one_line_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "_draw", lambda *_: None)
    digits = [
        "train",
        "--data",
        "digits",
        "--width",
        "8",
        "--depth",
        "2",
        "--steps",
        "9",
        "--eval-every",
        "3",
        "--quiet",
    ]
    assert main([*digits, "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        # two for the configuration, four for the checkpoint of step 0 with its log and its folder, three for that of step 3
        full(patch, "fsync", 10, 10**9)
        assert main([*digits, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert [line.split(" could")[0] for line in lines[:-1]] == [
        "warning: the checkpoint of step 6",
        "warning: the checkpoint of step 9",
        "warning: the checkpoint of step 9",
    ]
    assert lines[-1].startswith("error: the run has made 9 steps, but the last of them could not be saved. Make room")
    assert lines[-1].endswith(f"modula-agd train --resume {tmp_path / 'run'}")
    assert "test accuracy" in said.out
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert list(differences(tmp_path / "whole", tmp_path / "run")) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_writes_that_the_kernel_cuts_short_leave_no_torn_file(tmp_path):
    """No patch: beyond a limit the system itself writes a part and refuses the rest."""
    resource = pytest.importorskip("resource")
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    method, task = KINDS["text with dropout"](tmp_path)
    schedule = Schedule(12, 12, 3, 3)
    train(method, task, schedule, whole)
    train(method, task, Schedule(3, 12, 3, 3), run)
    before = run.checkpoint.read_bytes()

    def limited() -> int:
        import warnings

        warnings.simplefilter("ignore", NotSaved)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
        return int(train(method, task, schedule, run, resume=load(run.checkpoint)).saved)

    assert forked(limited, tmp_path) == 0
    assert run.checkpoint.read_bytes() == before
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoint.safetensors", "log.jsonl"]
    train(method, task, schedule, run, resume=load(run.checkpoint))
    assert list(differences(whole.path, run.path)) == []


def test_content_is_on_disk_before_its_name_and_the_name_before_it_is_told(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        path = os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else "?"
        calls.append(("fsync", path))
        fsync(handle)

    def renamed(old, new):
        calls.append(("replace", str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    path = tmp_path / "file"
    files.replace(path, b"content")
    assert [what for what, _ in calls] == ["fsync", "replace", "fsync"]
    assert path.read_bytes() == b"content"
    if calls[0][1] != "?":
        assert calls[0][1].startswith(str(tmp_path / ".file."))
        assert calls[2][1] == str(tmp_path)
