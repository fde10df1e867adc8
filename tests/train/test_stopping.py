"""Signals: the first one ends a run with a checkpoint, the second one ends it at once, and a process killed anywhere goes on."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from faults import differences, forked
from modula_agd.command_line import main
from modula_agd.train import command_line, load
from modula_agd.train.stopping import leave_to_parent, stopping
from modula_agd.train.trainer import Trainer

DIGITS = [
    "train",
    "--data",
    "digits",
    "--width",
    "16",
    "--depth",
    "2",
    "--batch-size",
    "16",
    "--threads",
    "1",
    "--quiet",
]
LONG = [*DIGITS, "--steps", "80", "--eval-every", "40", "--checkpoint-every", "7"]


@pytest.fixture
def undrawn(monkeypatch):
    """Plots take longer than these runs."""
    monkeypatch.setattr(command_line, "_draw", lambda *_: None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_taken_down_and_the_handlers_come_back(number):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with stopping() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal == number
        # whoever asks again is not heard by Python any more
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_no_handler_is_touched():
    seen = []

    def inside():
        with stopping() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGINT))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_reading_process_leaves_a_ctrl_c_to_its_parent_and_ends_when_told(tmp_path):
    def reading() -> int:
        leave_to_parent()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    assert forked(reading, tmp_path) == -signal.SIGTERM


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "_draw", lambda *_: None)
        assert main([*LONG, "--out", str(out)]) == 0
    return out


def signalled(monkeypatch, step: int, *numbers: int, place: str = "step") -> None:
    inner = getattr(Trainer, place)

    def one(self, point, *arguments, **options):
        if point.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return inner(self, point, *arguments, **options)

    monkeypatch.setattr(Trainer, place, one)


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "interrupted after 12 steps"), (signal.SIGTERM, 143, "stopped by SIGTERM after 12 steps")],
)
def test_a_signal_ends_the_command_with_its_status_and_the_run_goes_on(
    tmp_path, monkeypatch, capsys, undrawn, whole, number, status, said
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signalled(patch, 11, number)
        assert main([*LONG, "--out", str(out)]) == status
    told = capsys.readouterr().err
    assert f"{said}; what there is was saved. Go on with: modula-agd train --resume {out}" in told
    assert load(out / "checkpoint.safetensors").metadata["step"] == "12"
    assert main(["train", "--resume", str(out)]) == 0
    assert "goes on after 12 steps" in capsys.readouterr().out
    assert list(differences(whole, out)) == []


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(tmp_path, monkeypatch, capsys, undrawn, whole):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signalled(patch, 40, signal.SIGTERM, place="evaluated")
        assert main([*LONG, "--out", str(out)]) == 143
    assert len((out / "log.jsonl").read_text().splitlines()) == 1
    assert load(out / "checkpoint.safetensors").metadata["step"] == "40"
    assert main(["train", "--resume", str(out), "--quiet"]) == 0
    assert list(differences(whole, out)) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_ends_the_process_at_once(tmp_path, monkeypatch, capsys, undrawn, whole, numbers):
    out = tmp_path / "run"

    def twice() -> int:
        signalled(monkeypatch, 60, *numbers)
        return main([*LONG, "--out", str(out)])

    assert forked(twice, tmp_path) == -numbers[1]
    # the last multiple of seven before step 60
    assert load(out / "checkpoint.safetensors").metadata["step"] == "56"
    assert main(["train", "--resume", str(out), "--quiet"]) == 0
    assert list(differences(whole, out)) == []


def process(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "modula_agd", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def written(run: Path, child: subprocess.Popen) -> None:
    """Wait until a process has written a checkpoint, or has ended."""
    path = run / "checkpoint.safetensors"
    before = path.stat().st_ino if path.exists() else None
    while child.poll() is None and (path.stat().st_ino if path.exists() else None) == before:
        time.sleep(0.01)


# long enough that a signal finds it in training, however fast the machine
PROCESS = [*DIGITS, "--steps", "3000", "--eval-every", "500", "--checkpoint-every", "20"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_told_to_stop_saves_and_ends_with_its_status(tmp_path, capsys, number, status):
    out = tmp_path / "run"
    child = process([*PROCESS, "--out", str(out)])
    written(out, child)
    child.send_signal(number)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == status, said
    assert f"Go on with: modula-agd train --resume {out}" in said
    assert "Traceback" not in said
    assert main([*PROCESS, "--out", str(tmp_path / "whole")]) == 0
    assert main(["train", "--resume", str(out), "--quiet"]) == 0
    assert list(differences(tmp_path / "whole", out)) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_killed_at_random_times_until_it_is_done_ends_as_one_that_was_not(tmp_path, capsys):
    out, draw, kills = tmp_path / "run", random.Random(0), 0
    run = [*DIGITS, "--steps", "500", "--eval-every", "130", "--checkpoint-every", "20"]
    child = process([*run, "--out", str(out)])
    written(out, child)
    while True:
        # now while it imports and loads, now while it trains
        if kills % 3 == 2:
            time.sleep(draw.uniform(0, 3))
        else:
            written(out, child)
            time.sleep(draw.uniform(0, 0.2))
        child.kill()
        said, _ = child.communicate(timeout=60)
        if child.returncode != -signal.SIGKILL:
            assert child.returncode == 0, said
            break
        kills += 1
        assert kills < 100
        child = process(["train", "--resume", str(out), "--quiet"])
    assert kills >= 3
    assert main([*run, "--out", str(tmp_path / "whole")]) == 0
    assert list(differences(tmp_path / "whole", out)) == []
