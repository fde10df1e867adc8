"""A run killed at any moment goes on from its last checkpoint, and ends to the bit as if it had not been killed."""

import os
import random
import signal
from pathlib import Path

import pytest

from faults import WRITE, WRITING, Lines, command, counted, differences, forked, source, spread
from modula_agd.command_line import main
from modula_agd.train import command_line

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")

VERSE = "To be, or not to be, that is the question:\n" * 12


def arguments(folder: Path, out: str) -> list[str]:
    """A tiny run with dropout and a share set apart, whose checkpoints fall between its evaluations and on them."""
    (folder / "verse.txt").write_text(VERSE)
    run = ["train", "--data", f"text:{folder / 'verse.txt'}", "--arch", "gpt", "--context", "8", "--depth", "1"]
    run += ["--width", "8", "--heads", "2", "--dropout", "0.2", "--batch-size", "4", "--threads", "1", "--quiet"]
    run += ["--steps", "11", "--eval-every", "4", "--checkpoint-every", "3", "--hold-out", "0.2"]
    return [*run, "--out", str(folder / out)]


@pytest.fixture(autouse=True)
def warm(tmp_path, monkeypatch, capsys):
    """What a first run imports and prepares, once for all children; none of them draws, which takes longer than the rest."""
    monkeypatch.setattr(command_line, "_draw", lambda *_: None)
    assert main(arguments(tmp_path, "warm")) == 0


def killed(folder: Path, points: int, seed: int = 0) -> tuple[int, list[str]]:
    """Kill a run at so many points, half of them where it writes, and go on from each; every third time with a second kill.

    Returns:
        How many kills there were, and what differed from the undisturbed run.
    """
    whole = arguments(folder, "whole")
    places = counted(whole, folder)
    everywhere = range(len(places))
    # where half of what is to be written will be there, where files are written, and anywhere
    torn = [index for index in everywhere if source(places[index]).startswith(WRITE)]
    writing = [index for index in everywhere if places[index][0] in WRITING and index not in torn]
    others = [index for index in everywhere if places[index][0] not in WRITING]
    chosen = spread(points // 6, torn)
    chosen += spread(points // 2 - len(chosen), writing)
    chosen += spread(points - len(chosen), others)
    assert len(set(chosen)) == points
    draw, kills, found = random.Random(seed), 0, []
    for count, index in enumerate(chosen):
        mine, run = arguments(folder, f"run{index}"), folder / f"run{index}"
        again = ["train", "--resume", str(run), "--quiet"]
        assert forked(lambda: command(mine, Lines(index)), folder) == -signal.SIGKILL  # noqa: B023 (called at once)
        kills += 1
        if count % 3 == 0:
            second = draw.randrange(600)
            ended = forked(lambda: command(again, Lines(second), whole=True), folder)  # noqa: B023
            # a short rest of a run may have fewer lines than that
            assert ended in (0, -signal.SIGKILL), (folder / "said.txt").read_text()
            kills += ended != 0
        assert forked(lambda: command(again, Lines()), folder) == 0, (folder / "said.txt").read_text()  # noqa: B023
        found += [
            f"killed before line {places[index]}, event {index}: {what}" for what in differences(folder / "whole", run)
        ]
    return kills, found


def test_a_run_killed_at_any_of_12_points_ends_as_if_it_had_not_been(tmp_path):
    kills, found = killed(tmp_path, 12)
    assert kills > 12
    assert found == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_at_any_of_200_points_ends_as_if_it_had_not_been(tmp_path):
    kills, found = killed(tmp_path, 200)
    assert kills > 200
    assert found == []
