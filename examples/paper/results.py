"""The file of a figure's results: every run as soon as it is done, then the table."""

import io
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modula_agd import __version__
from modula_agd.error import InvalidArgument
from modula_agd.train import DataError
from modula_agd.train.files import replace


@dataclass(frozen=True)
class Results:
    """A JSON file of runs, complete after each of them.

    Args:
        folder: made if it is not there.
        figure: name of the figure, and of its files.
    """

    folder: Path
    figure: str

    @property
    def json(self) -> Path:
        return self.folder / f"{self.figure}.json"

    @property
    def png(self) -> Path:
        return self.folder / f"{self.figure}.png"

    def content(self) -> dict[str, Any]:
        """What the file holds so far.

        Raises:
            DataError: it is no file of results.
        """
        if not self.json.exists():
            return {"figure": self.figure, "runs": []}
        try:
            found = json.loads(self.json.read_text(encoding="utf-8"))
            runs = [(run["config"], run["outcome"]["curve"]) for run in found["runs"]]
        # what a file that is no JSON, or JSON of another kind, ends in
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.json} was to be continued, but holds no results of this figure ({type(error).__name__}: {error}). "
                "Move it away, name another folder with --out, or start anew with --fresh."
            ) from error
        if found.get("figure") != self.figure:
            raise DataError(
                f"{self.json} was to be continued, but its {len(runs)} runs belong to {found.get('figure')!r}, not to "
                f"{self.figure!r}. Name another folder with --out."
            )
        return found

    def drop(self) -> None:
        """Forget earlier runs."""
        self.json.unlink(missing_ok=True)

    def outcome(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The outcome of an earlier run of the same configuration."""
        return next((run["outcome"] for run in self.content()["runs"] if run["config"] == config), None)

    def add(self, config: Mapping[str, Any], outcome: Mapping[str, Any], device: torch.device) -> None:
        """Keep a run; it is on disk when this returns."""
        content = self.content()
        content["runs"].append({"config": dict(config), "outcome": dict(outcome), "made": circumstances(device)})
        self._write(content)

    def finish(
        self, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], facts: Sequence[str] = ()
    ) -> list[Mapping[str, Any]]:
        """Keep the table and print it.

        Args:
            settings: what the table is about.
            rows: one per cell; keys that start with "_" are numbers for the file alone, the others are columns.
            facts: sentences to stand below the table.
        """
        if not rows:
            raise InvalidArgument(f"{self.figure} was asked for no cell at all. Name at least one.")
        content = self.content()
        content |= {"settings": dict(settings), "table": [dict(row) for row in rows], "facts": list(facts)}
        self._write(content)
        made = sorted({run["made"]["date"][:10] for run in content["runs"]})
        machines = dict.fromkeys(run["made"]["machine"] for run in content["runs"])
        versions = dict.fromkeys(f"torch {run['made']['torch']}" for run in content["runs"])
        print(f"## {self.figure}\n")
        print("; ".join(f"{name} {value}" for name, value in settings.items()))
        print(
            f"\n{len(content['runs'])} runs in the file, made {' to '.join(dict.fromkeys((made[0], made[-1])))}, on ",
            end="",
        )
        print(f"{' and '.join(machines)}, {' and '.join(versions)}\n")
        print(markdown(rows))
        print("\n".join(["", *facts, "", f"{self.json}, {self.png}"]))
        return list(rows)

    def draw(self, figure: Figure) -> None:
        """Write the plot."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=120)
        replace(self.png, content.getvalue())

    def _write(self, content: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace(self.json, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def circumstances(device: torch.device) -> dict[str, Any]:
    """On what, when and with which versions a run was made."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{platform.machine()} with {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "machine": machine,
        "device": str(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "modula_agd": __version__,
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    columns = [name for name in rows[0] if not name.startswith("_")]
    lines = [columns, ["---"] * len(columns), *([str(row[name]) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def logarithmic(*axes: Axes) -> None:
    """Give panels a logarithmic y axis, unless every run in them diverged: matplotlib fails where nothing is positive."""
    heights = [numpy.asarray(line.get_ydata(), dtype=float) for panel in axes for line in panel.lines]
    if any((values > 0).any() for values in heights):
        for panel in axes:
            panel.set_yscale("log")


def numbers(values: Iterable[Any]) -> list[float]:
    """None as NaN, which a plot leaves out."""
    return [math.nan if value is None else float(value) for value in values]


def mean(outcomes: Sequence[Mapping[str, Any]], figure: str) -> float | None:
    """The mean of a figure over seeds; None if it is missing in any."""
    values = [outcome[figure] for outcome in outcomes]
    return None if None in values else statistics.fmean(values)


def shown(outcomes: Sequence[Mapping[str, Any]], figure: str, *, percent: bool = False) -> str:
    """A figure for the table: its mean, and its standard deviation where there are several seeds."""
    centre = mean(outcomes, figure)
    if centre is None:
        return "diverged" if any(outcome["diverged"] for outcome in outcomes) else "—"
    scale, digits = (100, 1) if percent else (1, 4)
    spread = statistics.stdev(outcome[figure] for outcome in outcomes) if len(outcomes) > 1 else None
    text = f"{centre * scale:.{digits}f}" + (f" ± {spread * scale:.{digits}f}" if spread is not None else "")
    return f"{text}%" if percent else text
