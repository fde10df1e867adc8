"""Runs of the study, each by all that determines it, and the file that keeps their outcomes."""

import fcntl
import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Cell:
    """One run, by all that determines it.

    Args:
        task: a name of ``TASKS``.
        peer: a name of ``PEERS``.
        lr: learning rate (of this library: the multiplier); None for the default.
        schedule: "constant" or "cosine".
        seed: of weights and batches.
        scale: budget as a multiple of the task's own.
        batch: in place of the task's own.
        width: multiple of the task's own.
        depth: multiple of the task's own.
        options: of this library's method, or AdamW's.
    """

    task: str
    peer: str
    lr: float | None = None
    schedule: str = "constant"
    seed: int = 0
    scale: float = 1.0
    batch: int | None = None
    width: int = 1
    depth: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        rate = "default" if self.lr is None else f"{self.lr:.3g}"
        rest = "".join(f" {k}={v}" for k, v in self.options.items())
        sized = f" batch {self.batch}" if self.batch else ""
        sized += f" width×{self.width} depth×{self.depth}" if (self.width, self.depth) != (1, 1) else ""
        return f"{self.task} {self.peer} {rate} {self.schedule} seed {self.seed} ×{self.scale:g}{sized}{rest}"


class Store:
    """Finished runs, one JSON line each; safe to share between processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """All that is there."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return [json.loads(line) for line in file if line.strip()]

    def outcome(self, cell: Cell) -> dict[str, Any] | None:
        """The outcome of an equal cell."""
        wanted = json.loads(json.dumps(asdict(cell)))
        return next((row["outcome"] for row in self.rows() if row["cell"] == wanted), None)

    def add(self, cell: Cell, outcome: dict[str, Any], made: dict[str, Any]) -> None:
        """Keep a run, and what it was made on."""
        row = {"cell": asdict(cell), "outcome": outcome, "made": made}
        with self.path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(row, allow_nan=False) + "\n")


def circumstances(device: torch.device) -> dict[str, Any]:
    """On what and when."""
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
    }
