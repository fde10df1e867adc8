"""Many ranks take the step that one process takes on the union of their batches."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

import full_precision
import killed_rank
import rank_checks
from modula_agd import InvalidArgument, Linear, RowNorm, Sign, Spectral
from modula_agd.loss import SquareLoss
from modula_agd.optimizer import AGD
from modula_agd.shards import Box, Layout, Split, box, cost, owners


def spawned(folder: Path, size: int, which: str, kept: Path | None = None) -> None:
    """Every check of a list, on so many gloo ranks; ``kept`` is a folder for what outlasts them."""
    folder.mkdir(exist_ok=True)
    context = torch.multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=rank_checks.run, args=(rank, size, str(folder), which, kept and str(kept)))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    reports = sorted(folder.glob("*.txt"), key=lambda path: path.stat().st_mtime)
    assert not reports, f"{reports[0].name}: {reports[0].read_text(encoding='utf-8')}"
    assert len(list(folder.glob("done.*"))) == size


# -- where the parts lie --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("extent", "parts"), [(7, 2), (7, 4), (3, 4), (8, 4), (1, 3)])
def test_a_split_is_that_of_torch(extent: int, parts: int) -> None:
    rows = torch.arange(extent * 2).reshape(extent, 2)
    chunks = list(rows.chunk(parts)) + [rows[:0]] * parts
    for part in range(parts):
        assert torch.equal(rows[box((extent, 2), [Split(0, parts, part)]).slices], chunks[part])


def test_boxes_of_a_weight_are_sent_once_and_its_owner_sends_none_of_its_own_to_others() -> None:
    shape = (4, 6)
    # two replicas of two shards each
    boxes = tuple(box(shape, [Split(None, 2, r // 2), Split(0, 2, r % 2)]) for r in range(4))
    layout = Layout(shape, boxes)
    assert [layout.first(rank) for rank in range(4)] == [True, True, False, False]
    for owner in range(4):
        covered = torch.zeros(shape)
        for rank in layout.senders(owner):
            covered[boxes[rank].slices] += 1
        assert bool((covered == 1).all())
        assert owner in layout.senders(owner)
    assert not layout.replicated
    assert layout.whole((1,))
    assert not layout.whole((0,))


def test_a_rank_without_rows_sends_nothing() -> None:
    boxes = tuple(box((3, 2), [Split(0, 4, rank)]) for rank in range(4))
    assert boxes[3] == Box((3, 0), (0, 2))
    assert Layout((3, 2), boxes).senders(3) == (0, 1, 2)


def test_the_dearest_matrix_goes_to_the_rank_that_has_least_to_do() -> None:
    assert owners({"a": 1.0, "b": 5.0, "c": 3.0, "d": 3.0}, 2) == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert cost(Spectral(), (8, 4)) == 32 + 18 * 32 * 4
    assert cost(RowNorm(1.0), (8, 4)) == cost(Sign(), (8, 4)) == 32


def test_sharing_directions_without_a_process_group_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="there is no process group"):
        AGD(Linear(3, 4).to_torch(0), SquareLoss(), share_directions=True)


# -- many processes -------------------------------------------------------------------------------------------------------------


def test_two_ranks(tmp_path: Path) -> None:
    spawned(tmp_path, 2, "two")


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    spawned(tmp_path, 4, "four")


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_on_one_two_and_four(tmp_path: Path) -> None:
    spawned(tmp_path / "2", 2, "writing", tmp_path)
    for size in (1, 2, 4):
        spawned(tmp_path / f"{size} again", size, "going on", tmp_path)


# -- modula-agd under torchrun --------------------------------------------------------------------------------------------------

DIGITS = ("train", "--data", "digits", "--arch", "fcn", "--depth", "3", "--width", "16", "--batch-size", "32")
DIGITS += ("--steps", "20", "--eval-every", "10", "--quiet")


def torchrun(size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.run([*launch, *arguments], capture_output=True, text=True, check=False, timeout=240)


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def alike(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "eta"):
            assert (mine[key] is None) == (theirs[key] is None), key
            assert mine[key] is None or mine[key] == pytest.approx(theirs[key], rel=1e-4), (mine["step"], key)


@pytest.mark.slow
def test_torchrun_follows_one_process_and_goes_on_after_a_rank_was_killed(tmp_path: Path) -> None:
    single, precise, two, killed = (tmp_path / name for name in ("single", "precise", "two", "killed"))
    # a lead in bfloat16 rounds otherwise where gradients are summed in another order
    subprocess.run([sys.executable, full_precision.__file__, *DIGITS, "--out", str(single)], check=True, timeout=240)
    assert torchrun(2, full_precision.__file__, *DIGITS, "--out", str(precise)).returncode == 0
    alike(log(precise), log(single))
    done = torchrun(2, "-m", "modula_agd", *DIGITS, "--out", str(two))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1
    assert "2 ranks, each on cpu" in done.stdout
    again = torchrun(
        2, "--max-restarts=1", killed_rank.__file__, *DIGITS, "--checkpoint-every", "4", "--out", str(killed)
    )
    assert again.returncode == 0, again.stderr
    # the last checkpoint before the kill
    assert f"goes on after {killed_rank.STEP // 4 * 4} steps" in again.stdout
    # bit for bit
    assert log(killed) == log(two)


@pytest.mark.slow
def test_what_torchrun_cannot_do_is_one_line_of_explanation(tmp_path: Path) -> None:
    done = torchrun(3, "-m", "modula_agd", *DIGITS, "--out", str(tmp_path / "three"))
    assert done.returncode != 0
    assert (
        "error: a batch of 32 samples cannot be cut into equal parts for 3 ranks. Give --batch-size 30 or 33"
        in done.stderr
    )
    assert not (tmp_path / "three").exists()
    done = torchrun(2, "--max-restarts=2", "-m", "modula_agd", *DIGITS)
    assert (
        "error: torchrun may restart this run 2 times, but a new run folder has another name each time" in done.stderr
    )
