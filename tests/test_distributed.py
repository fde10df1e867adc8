"""Many ranks take the step that one process takes on the union of their batches."""

from pathlib import Path

import pytest
import torch.multiprocessing

import rank_checks


def spawned(folder: Path, size: int, which: str) -> None:
    """Every check of a list, on so many gloo ranks."""
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_checks.run, args=(rank, size, str(folder), which)) for rank in range(size)]
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
