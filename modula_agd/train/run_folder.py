"""The folder of one run: log, checkpoint, configuration, plot."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from modula_agd.error import InvalidArgument
from modula_agd.train.files import replace, tidy


@dataclass(frozen=True)
class Evaluation:
    """One line of the log.

    Args:
        step: updates made so far.
        epoch: passes over the training data, fractional.
        train_loss: mean loss of the minibatches since the last evaluation; None before the first update, and where it
            is not finite, as are the other figures.
        train_accuracy: share of right predictions among their samples (of text: among the characters), 0 to 1.
        val_loss: mean loss over the held-out data.
        val_accuracy: share of right predictions there, 0 to 1.
        eta: η of the last update, dimensionless.
        seconds: wall time since training began, evaluations included.
        relative_update: ‖ΔW‖_F/‖W‖_F of each parameter in the last update; None where the weight was 0.
    """

    step: int
    epoch: float
    train_loss: float | None
    train_accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    eta: float | None
    seconds: float
    relative_update: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """A run's files.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def best(self) -> Path:
        """The checkpoint of the lowest loss on what is set apart."""
        return self.path / "best.safetensors"

    @property
    def look(self) -> Path:
        """What the held-out data said of the best, in the end."""
        return self.path / "held_out.json"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def plot(self) -> Path:
        return self.path / "plot.png"

    def check(self, *, overwrite: bool) -> None:
        """Refuse a folder that holds something, before any work is done.

        Args:
            overwrite: allow it; ``create`` will replace an earlier run's files and leave others alone.

        Raises:
            InvalidArgument: the folder is not empty, is a file, or would have to lie in one.
        """
        nearest = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not nearest.is_dir():
            what = "is a file" if nearest == self.path else f"cannot be made, as {nearest} is a file"
            raise InvalidArgument(f"the run folder {self.path} {what}. Name another with --out.")
        if not overwrite and self.path.is_dir() and any(self.path.iterdir()):
            raise InvalidArgument(
                f"the run folder {self.path} is not empty. Name another with --out, or replace that run with --overwrite."
            )

    def create(self, config: Mapping[str, Any]) -> None:
        """Make the folder, drop an earlier run's files from it, and write the configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (self.log, self.checkpoint, self.best, self.look, self.plot):
            file.unlink(missing_ok=True)
            tidy(file)
        # the old configuration goes when the new one is whole: a folder with one can be gone on with
        tidy(self.config)
        self.configure(config)

    def take_up(self, config: Mapping[str, Any]) -> None:
        """Go on with the run that is there: write how it is computed from now on, and drop what a kill has left half written."""
        for file in (self.checkpoint, self.best, self.look, self.config, self.plot):
            tidy(file)
        self.configure(config)

    def configure(self, config: Mapping[str, Any]) -> None:
        """Write the configuration of a run that is about to begin, or to go on."""
        replace(self.config, (json.dumps(config, indent=2) + "\n").encode())

    def begin(self) -> None:
        """Make the folder unless it is there, for a log that starts at step 0; an earlier run's best is not this one's.

        Raises:
            InvalidArgument: the folder holds a log, which two runs would share.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.log.exists():
            raise InvalidArgument(
                f"training was to begin in {self.path}, which holds the log of an earlier run. Name another folder, or delete it."
            )
        self.best.unlink(missing_ok=True)


def fresh(parent: Path, name: str) -> RunFolder:
    """A folder name under ``parent`` that no earlier run has: the given name and the time.

    Args:
        parent: need not exist.
        name: describes the run.
    """
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    path, copy = parent / stem, 2
    while path.exists():
        path, copy = parent / f"{stem}-{copy}", copy + 1
    return RunFolder(path)
