"""What a run leaves behind as it goes on: its evaluations, log and checkpoints. A full disk does not end it."""

import time
import warnings
from typing import Any

from modula_agd.train.continuing import Clock, keep
from modula_agd.train.journal import Journal
from modula_agd.train.run_folder import Evaluation, RunFolder
from modula_agd.train.trainer import Point

# What a kill may cost where nobody says how often to write: little beside hours, and writing takes seconds at most.
_SECONDS = 300.0


class NotSaved(UserWarning):
    """A checkpoint could not be written; training goes on, and the one before is still there."""


class Record:
    """What a run leaves behind: the evaluations, and with a folder its log and its checkpoints.

    Args:
        run: the folder, or None.
        earlier: the evaluations of before, if the run goes on.
        used: what it had used up by then.
        options: what ``keep`` takes after the clock.
    """

    def __init__(self, run: RunFolder | None, earlier: tuple[Evaluation, ...], used: Clock, **options: Any) -> None:
        self.history, self._run, self._options = list(earlier), run, options
        self._journal = None if run is None else Journal(run.log, used.log)
        self._start = time.perf_counter() - used.seconds
        self._kept_at, self._kept = time.perf_counter(), None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def add(self, evaluation: Evaluation) -> None:
        self.history.append(evaluation)
        if self._journal is not None:
            self._journal.add(evaluation)

    def due(self, point: Point, every: int | None) -> bool:
        """Whether it is time for a checkpoint between two evaluations."""
        if self._run is None:
            return False
        if every is not None:
            return point.step % every == 0
        return time.perf_counter() - self._kept_at >= _SECONDS

    def keep(self, point: Point, *, must: bool = False) -> bool:
        """Write the log, then the checkpoint that tells how long it is; whether that was possible.

        Raises:
            OSError: it was not, and it must be.
        """
        if self._run is None or self._journal is None or point is self._kept:
            return True
        self._kept_at = time.perf_counter()
        try:
            self._journal.flush()
            keep(self._run.checkpoint, point, Clock(self.seconds, self._journal.position), **self._options)
        except OSError as error:
            if must:
                raise
            warnings.warn(
                f"the checkpoint of step {point.step:,} could not be written: {error}. The one before is still there, and training goes "
                "on. Make room.",
                NotSaved,
                stacklevel=3,
            )
            return False
        self._kept = point
        return True
