"""The log of a run on disk: whole lines only, in order, none twice; what a full disk refuses is kept for later."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from modula_agd.train.checkpoint import CheckpointError
from modula_agd.train.files import settle
from modula_agd.train.run_folder import Evaluation


class Journal:
    """Adds lines to a log, and knows how many bytes of it are on disk, so that a checkpoint can tell where it belongs.

    Args:
        path: of the log.
        position: bytes of it that count, 0 for a new one; what lies behind them was written after the checkpoint that
            training goes on from, and will be written again.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        self._path, self._waiting = path, b""
        self.position = position

    def add(self, evaluation: Evaluation) -> None:
        """Take in a line, which ``flush`` writes."""
        self._waiting += (json.dumps(asdict(evaluation), allow_nan=False) + "\n").encode()

    def flush(self) -> None:
        """Have every line on disk, and nothing else.

        Raises:
            OSError: they are not there, for want of space perhaps; the next call tries again.
        """
        fresh = not self._path.exists()
        with self._path.open("wb" if fresh else "r+b") as file:
            file.seek(self.position)
            # of a line that a kill or a full disk has torn, and of lines after the checkpoint, nothing is left
            file.truncate()
            file.write(self._waiting)
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            settle(self._path.parent)
        self.position, self._waiting = self.position + len(self._waiting), b""


def read(path: Path, position: int) -> tuple[Evaluation, ...]:
    """The evaluations in the first ``position`` bytes of a log.

    Raises:
        CheckpointError: the log does not hold them.
    """
    content = path.read_bytes()[:position] if path.is_file() else b""
    try:
        if len(content) < position:
            raise ValueError(f"it has {len(content)} bytes")
        return tuple(Evaluation(**json.loads(line)) for line in content.splitlines())
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"the log {path} is not the one that its checkpoint belongs to, which had written {position} bytes: {error}. Put the log "
            "back as it was, or train again."
        ) from error
