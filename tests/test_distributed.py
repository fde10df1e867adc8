"""Many ranks take the step that one process takes on the union of their batches."""

from pathlib import Path

import pytest
import torch.multiprocessing

import rank_checks


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
