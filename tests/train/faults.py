"""Faults on purpose: a run that is killed at a chosen line of its code, in a process of its own."""

import json
import linecache
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import modula_agd.train
from modula_agd.command_line import main
from modula_agd.train import Checkpoint, command_line, load

FOLDER = Path(modula_agd.train.__file__).parent
# what a run executes step by step; the rest of the package only computes
TRACED = (
    "loop",
    "record",
    "trainer",
    "continuing",
    "checkpoint",
    "journal",
    "files",
    "run_folder",
    "meter",
    "resuming",
)
NAMES = {str(FOLDER / f"{name}.py"): name for name in TRACED}
WRITING = ("record", "journal", "files")

WRITE = "file.write("
"""How the lines begin that write."""

Place = tuple[str, int]
"""A file's name and the line in it."""


def torn(frame: Any) -> None:
    """What a kill inside a write leaves: half of what was to be written, where it was to be. Elsewhere nothing is written."""
    if not source((NAMES[frame.f_code.co_filename], frame.f_lineno)).startswith(WRITE):
        return
    file, own = frame.f_locals["file"], frame.f_locals.get("self")
    content = frame.f_locals["content"] if own is None else own._waiting
    file.write(content[: len(content) // 2])
    file.flush()


class Lines:
    """Counts the lines that are executed, and kills the process before one of them.

    Args:
        kill_at: which, counted from 0; None for none.
    """

    def __init__(self, kill_at: int | None = None) -> None:
        self.places: list[Place] = []
        self._kill_at = kill_at

    def __enter__(self) -> "Lines":
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: Any, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in NAMES else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            if len(self.places) == self._kill_at:
                torn(frame)
                os.kill(os.getpid(), signal.SIGKILL)
            self.places.append((NAMES[frame.f_code.co_filename], frame.f_lineno))
        return self._line


def forked(work: Callable[[], int], folder: Path) -> int:
    """How a child process that does the work ends: its exit status, or minus the signal that ended it."""
    with warnings.catch_warnings():
        # later versions of Python warn of threads that a child lacks; these children use none
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 99
        try:
            said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            # pytest's own streams would write to where it captures
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(arguments: Sequence[str], lines: Lines, *, whole: bool = False) -> int:
    """The command with its lines counted: those of training, or ``whole`` all that it executes. For a child process."""
    if whole:
        with lines:
            return main(arguments)
    train = command_line.train

    def counted(*positional: Any, **named: Any) -> Any:
        with lines:
            return train(*positional, **named)

    command_line.train = counted
    return main(arguments)


def counted(arguments: Sequence[str], folder: Path, *, whole: bool = False) -> list[Place]:
    """Every line that a run executes, in order."""

    def work() -> int:
        lines = Lines()
        status = command(arguments, lines, whole=whole)
        (folder / "places.json").write_text(json.dumps(lines.places))
        return status

    assert forked(work, folder) == 0, (folder / "said.txt").read_text()
    return [(name, line) for name, line in json.loads((folder / "places.json").read_text())]


def source(place: Place) -> str:
    """The line of code."""
    return linecache.getline(str(FOLDER / f"{place[0]}.py"), place[1]).strip()


def spread(count: int, among: Sequence[int]) -> list[int]:
    """So many of some numbers, from the first to the last, all distinct."""
    count = min(count, len(among))
    return [among[i * (len(among) - 1) // max(1, count - 1)] for i in range(count)]


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of a log, but for the seconds, which no two runs have in common."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def differences(one: Path, other: Path) -> Iterator[str]:
    """In what two runs have not ended alike, to the bit."""
    for file in ("checkpoint.safetensors", "best.safetensors"):
        if (one / file).exists() or (other / file).exists():
            found = _different(load(one / file), load(other / file))
            yield from (what if file.startswith("checkpoint") else f"{what}, of the best" for what in found)
    if logged(one) != logged(other):
        yield "log"
    seconds = [json.loads(line)["seconds"] for line in (other / "log.jsonl").read_text().splitlines()]
    if seconds != sorted(seconds):
        yield "seconds that run backwards"
    leftovers = {path.name for path in other.iterdir()} - {
        "log.jsonl",
        "checkpoint.safetensors",
        "best.safetensors",
        "held_out.json",
        "config.json",
        "plot.png",
    }
    if leftovers:
        yield f"files {sorted(leftovers)}"


def _different(first: Checkpoint, second: Checkpoint) -> Iterator[str]:
    """In what two checkpoints are not alike, to the bit."""
    for part in ("params", "buffers", "average", "state", "loop"):
        mine, theirs = getattr(first, part), getattr(second, part)
        if mine.keys() != theirs.keys():
            yield f"{part}: {sorted(mine.keys() ^ theirs.keys())}"
        for name in mine.keys() & theirs.keys():
            # by their bytes, in which NaN equals itself
            bits = [x[name].flatten().view(torch.uint8) for x in (mine, theirs)]
            if mine[name].dtype != theirs[name].dtype or not torch.equal(*bits):
                yield f"{part} of {name}"
    for key in ("step", "seed", "recipe"):
        if first.metadata.get(key) != second.metadata.get(key):
            yield key
