"""What a run leaves behind as it goes on: its evaluations, log and checkpoints. A full disk does not end it."""

import math
import time
import warnings
from pathlib import Path
from typing import Any

from modula_agd.train.checkpoint import load
from modula_agd.train.continuing import Clock, keep
from modula_agd.train.journal import Journal
from modula_agd.train.run_folder import Evaluation, RunFolder
from modula_agd.train.trainer import Point

# What a kill may cost where nobody says how often to write: little beside hours, and writing takes seconds at most.
_SECONDS = 300.0


class NotSaved(UserWarning):
    """A checkpoint could not be written; training goes on, and the one before is still there."""


def _lowest(run: RunFolder | None, earlier: tuple[Evaluation, ...]) -> float:
    """The held-out loss of the best point that is kept; of one that is yet to be evaluated again, the lowest of before."""
    if run is None or not run.best.exists():
        return math.inf
    losses = {each.step: each.val_loss for each in earlier if each.val_loss is not None}
    step = int(load(run.best).metadata.get("step", -1))
    return losses.get(step, min(losses.values(), default=math.inf))


class Record:
    """What a run leaves behind: the evaluations, and with a folder its log and its checkpoints.

    Args:
        run: the folder, or None.
        earlier: the evaluations of before, if the run goes on.
        used: what it had used up by then.
        best: whether the point with the lowest held-out loss is kept beside the last one.
        options: what ``keep`` takes after the clock.
    """

    def __init__(
        self, run: RunFolder | None, earlier: tuple[Evaluation, ...], used: Clock, *, best: bool = False, **options: Any
    ) -> None:
        self.history, self._run, self._options = list(earlier), run, options
        # what is not below it is not kept
        self._lowest = _lowest(run, earlier) if best else -math.inf
        self._journal = None if run is None else Journal(run.log, used.log)
        self._start = time.perf_counter() - used.seconds
        self._kept_at, self._kept = time.perf_counter(), None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def add(self, evaluation: Evaluation, point: Point) -> None:
        """Take down the evaluation of a point; the best one yet is kept, if any is, as it was before it was looked at."""
        loss = evaluation.val_loss
        if self._run is not None and loss is not None and loss < self._lowest and self._write(self._run.best, point):
            self._lowest = loss
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
        if not self._write(self._run.checkpoint, point, must=must):
            return False
        self._kept = point
        return True

    def _write(self, path: Path, point: Point, *, must: bool = False) -> bool:
        """Write the log as far as it goes, and a point to a file."""
        assert self._journal is not None
        try:
            self._journal.flush()
            keep(path, point, Clock(self.seconds, self._journal.position), **self._options)
        except OSError as error:
            if must:
                raise
            warnings.warn(
                f"the checkpoint of step {point.step:,} could not be written: {error}. {path.name} is as it was, and training goes "
                "on. Make room.",
                NotSaved,
                stacklevel=4,
            )
            return False
        return True
