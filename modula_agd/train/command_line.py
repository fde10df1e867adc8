"""``modula-agd train``: train a network on a data set; no learning rate is asked for."""

import argparse
import json
import os
import platform
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modula_agd import METHODS, CrossEntropy, Method, __version__
from modula_agd.error import InvalidArgument, ModulaError, UnknownBound
from modula_agd.train.architecture import fitting, settled
from modula_agd.train.catalogue import check, kind, task
from modula_agd.train.checkpoint import Checkpoint
from modula_agd.train.continuing import clock, finished
from modula_agd.train.extras import require
from modula_agd.train.facts import TextFacts
from modula_agd.train.files import replace
from modula_agd.train.journal import read
from modula_agd.train.loop import EVALUATION_BATCH, Outcome, Schedule, train
from modula_agd.train.objective import LOSSES
from modula_agd.train.options import DATA_OPTIONS, METHOD, METHODS_ABOUT, NETWORK_OPTIONS, add_train, filled, given
from modula_agd.train.plot import plot
from modula_agd.train.ranks import ONE, Ranks, gathered, restarts
from modula_agd.train.recipe import Recipe
from modula_agd.train.record import NotSaved
from modula_agd.train.restore import restore
from modula_agd.train.resuming import resumption
from modula_agd.train.run_folder import Evaluation, RunFolder, fresh
from modula_agd.train.task import Task
from modula_agd.train.text import TEXT
from modula_agd.train.trainer import judged

_SIGNALLED = 128
"""A shell's exit status of a process that a signal ended is this, and the signal's number."""


class TrainingFailed(ModulaError, RuntimeError):
    """The machine could not go on with a run."""


def configure(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``train`` to its parser; ``options.run`` is what to call with the options."""
    command.description = (
        "Train a network. The step size follows from what the network and the loss declare. The default method is "
        f"{METHOD}: {METHODS_ABOUT[METHOD]}."
    )
    command.epilog = (
        "The run folder receives log.jsonl, checkpoint.safetensors, config.json and plot.png, with --hold-out best.safetensors. "
        "Example: modula-agd train --data mnist --data-dir data --depth 3 --width 512 --epochs 5"
    )
    command.set_defaults(run=run)
    add_train(command)


def run(options: argparse.Namespace) -> int:
    """Train as the options say.

    Returns:
        Exit status: 0 done; 130 or 143 stopped by SIGINT or SIGTERM (what there is was saved).
    """
    require("modula-agd train", "matplotlib", "safetensors", "tqdm")
    with gathered(options.device or "auto") as ranks:
        return _run(again(options, ranks), ranks)


def _run(options: argparse.Namespace, ranks: Ranks) -> int:
    if options.quiet:
        # what the datasets library asks when it is imported, which happens where it is needed alone
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    taken = None if options.resume is None else resumption(options)
    options = filled(options) if taken is None else taken.options
    saved = None if taken is None else taken.saved
    if options.threads:
        torch.set_num_threads(options.threads)
    network, data = given(options, NETWORK_OPTIONS), given(options, DATA_OPTIONS)
    architecture = fitting(options.arch, kind(options.data), options.data)
    sizes = settled(options.arch, network)
    check(options.data, data)
    device = ranks.device(options.device)
    folder = RunFolder(options.out) if options.out else fresh(Path("runs"), _run_name(options))
    if taken is None and ranks.first:
        folder.check(overwrite=options.overwrite)
    opened = partial(task, options.data, options.data_dir, flat=architecture.takes == "rows", device=device, **data)
    if saved is not None and finished(saved, options.steps):
        return _told_to_be_finished(options, sizes, saved, folder, opened) if ranks.first else 0

    with _explained(folder):
        source = opened()
        if options.hold_out:
            source = source.apart(options.hold_out)
    loss = LOSSES[options.loss]
    # Cross-entropy's bound is proved in the maximum norm, that of Logits; AGD as published knows no such space.
    logits = isinstance(loss, CrossEntropy) and options.method != "agd"
    recipe = Recipe(options.arch, sizes, logits, source.facts)
    method = _method(options, recipe)
    schedule = _schedule(options, source)
    config = _config(options, sizes, schedule, folder, source) if taken is None else taken.config
    config |= {"device": str(device), "versions": _versions()}
    ranks.task(source, schedule.batch_size)
    print(method.network)
    where = str(device) if ranks.size == 1 else f"{ranks.size} ranks, each on {device.type}"
    print(f"\n{source}; {schedule.steps:,} steps of {source.shown(schedule.batch_size)} on {where}")
    if not ranks.first:
        pass
    elif saved is None:
        folder.create(config)
    else:
        print(f"goes on after {int(saved.metadata['step']):,} steps")
        folder.take_up(config)

    with _explained(folder), _warned():
        outcome = train(
            method,
            source,
            schedule,
            folder if ranks.first else None,
            recipe=recipe,
            config=config,
            resume=saved,
            progress=ranks.first and not options.quiet,
            best=bool(options.hold_out),
            ranks=ranks,
        )
    if not ranks.first:
        return 0 if outcome.stopped is None else _SIGNALLED + outcome.stopped
    _report(outcome, folder, source)
    if not outcome.saved:
        raise TrainingFailed(
            f"the run has made {outcome.steps:,} steps, but the last of them could not be saved. Make room, then go on from the "
            f"checkpoint before: modula-agd train --resume {folder.path}"
        )
    _draw(options, sizes, outcome.history, folder)
    if options.hold_out and outcome.stopped is None:
        return _last_look(options, folder, opened)
    return 0 if outcome.stopped is None else _SIGNALLED + outcome.stopped


def again(options: argparse.Namespace, ranks: Ranks) -> argparse.Namespace:
    """The options of a run that torchrun has started anew: it goes on from its checkpoint.

    Raises:
        InvalidArgument: torchrun may restart a run that would not find its folder again.
    """
    most = restarts()[1]
    if most and options.out is None and options.resume is None:
        raise InvalidArgument(
            f"torchrun may restart this run {most} times, but a new run folder has another name each time. Name one with --out."
        )
    out: Path | None = options.out
    if not ranks.restarted or options.resume is not None or out is None or not RunFolder(out).config.exists():
        return options
    return argparse.Namespace(**{**vars(options), "resume": out, "overwrite": False})


def chosen(name: str) -> torch.device:
    """The device of that name, tried; "auto" is an accelerator if there is one."""
    return ONE.device(name)


@contextmanager
def _explained(folder: RunFolder) -> Iterator[None]:
    """Turn what torch raises where a machine cannot go on into one line."""
    try:
        yield
    # torch answers with RuntimeError to all that a machine cannot do: memory, a kernel that is missing, a worker that died.
    except (RuntimeError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        short = (
            isinstance(error, MemoryError | torch.OutOfMemoryError)
            or "allocate memory" in reason
            or "Storage size" in reason
        )
        remedy = "Take a smaller --batch-size or --width, or another --device." if short else "Try --device cpu."
        kept = f" What there is lies in {folder.path}." if folder.path.is_dir() else ""
        raise TrainingFailed(f"training ended early: {reason}. {remedy}{kept}") from error


@contextmanager
def _warned() -> Iterator[None]:
    """Show what could not be saved as one line each."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", NotSaved)
        show = warnings.showwarning

        def line(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if issubclass(category, NotSaved):
                print(f"warning: {message}", file=sys.stderr)
            else:
                show(message, category, *rest)

        warnings.showwarning = line
        yield


def _report(outcome: Outcome, folder: RunFolder, source: Task) -> None:
    if outcome.stopped is not None:
        how = (
            "interrupted" if outcome.stopped == signal.SIGINT else f"stopped by {signal.Signals(outcome.stopped).name}"
        )
        print(f"{how} after {outcome.steps:,} steps", end="", file=sys.stderr)
        kept = f"; what there is was saved. Go on with: modula-agd train --resume {folder.path}"
        print(kept if outcome.saved else "", file=sys.stderr)
    if outcome.history:
        last = outcome.history[-1]
        figures = _told(source.facts.name, source.held_out, last.val_loss, last.val_accuracy)
        print(f"{figures} at step {last.step:,} ({last.seconds:.1f} s)")
    print(f"run folder: {folder.path}")


def _last_look(options: argparse.Namespace, folder: RunFolder, opened: Callable[[], Task]) -> int:
    """Look at what is held out, with the weights that were best on what was set apart, unless that was done; the exit status."""
    if not folder.best.exists():
        print(
            "no weights were kept, as no evaluation of what was set apart was finite; what is held out was not looked at"
        )
        return 0
    seen = json.loads(folder.look.read_text(encoding="utf-8")) if folder.look.exists() else None
    new = seen is None
    if new:
        try:
            with _explained(folder):
                seen = _looked(options, folder, opened())
        except KeyboardInterrupt:
            print(
                f"interrupted before what is held out was looked at. Do it with: modula-agd train --resume {folder.path}",
                file=sys.stderr,
            )
            return _SIGNALLED + signal.SIGINT
    figures = _told(options.data, seen["split"], seen["loss"], seen["accuracy"])
    print(f"by the weights of step {seen['step']:,}, the best on what was set apart: {figures}")
    if new:
        replace(folder.look, (json.dumps(seen) + "\n").encode())
    return 0


def _looked(options: argparse.Namespace, folder: RunFolder, whole: Task) -> dict[str, Any]:
    """What the held-out data say of the best weights."""
    kept = restore(folder.path, whole.device, best=True)
    method = METHODS[options.method](kept.network, LOSSES[options.loss])
    meter = judged(method, kept.average, whole, max(options.batch_size, EVALUATION_BATCH))
    assert meter is not None
    loss, accuracy = meter.means()
    return {"step": kept.step, "split": whole.held_out, "loss": loss, "accuracy": accuracy}


def _told(data: str, of: str, loss: float | None, accuracy: float | None) -> str:
    """What a split of some data says."""
    what = "accuracy" if kind(data) == "images" else "accuracy of the next character"
    told = "not finite" if loss is None else f"{loss:.4f}"
    return f"{of} {what} {'not finite' if accuracy is None else f'{accuracy:.2%}'}, {of} loss {told}"


def _told_to_be_finished(
    options: argparse.Namespace,
    sizes: dict[str, Any],
    saved: Checkpoint,
    folder: RunFolder,
    opened: Callable[[], Task],
) -> int:
    """Say that nothing is left to do, and do what a kill behind the last step has left undone: the plot, and the last look."""
    if not folder.plot.exists():
        _draw(options, sizes, read(folder.log, clock(saved).log), folder)
    print(f"the run in {folder.path} is finished: its {int(saved.metadata['step']):,} steps are made")
    return _last_look(options, folder, opened) if options.hold_out else 0


def _draw(options: argparse.Namespace, sizes: dict[str, Any], history: Sequence[Evaluation], folder: RunFolder) -> None:
    if history:
        sized = ", ".join(f"{name} {value}" for name, value in sizes.items() if name in ("depth", "width"))
        plot(history, folder.plot, f"{options.data}, {options.arch} ({sized}), {options.method}")


def _method(options: argparse.Namespace, recipe: Recipe) -> Method:
    network = recipe.network()
    try:
        return METHODS[options.method](network, LOSSES[options.loss])
    except UnknownBound as error:
        raise InvalidArgument(
            f"--method {options.method} cannot train --arch {options.arch}: {str(error).split('. ')[0]}. "
            f"Choose {'--arch linear, or ' if kind(options.data) == 'images' else ''}another method."
        ) from error


def _schedule(options: argparse.Namespace, source: Task) -> Schedule:
    per_epoch = source.per_epoch(options.batch_size)
    steps = options.steps or options.epochs * per_epoch
    return Schedule(steps, options.batch_size, options.eval_every or per_epoch, options.seed, options.checkpoint_every)


def _config(
    options: argparse.Namespace, sizes: dict[str, Any], schedule: Schedule, folder: RunFolder, source: Task
) -> dict[str, Any]:
    asked = {name: value for name, value in vars(options).items() if name not in ("run", "resume")}
    # a run may be gone on with from elsewhere; a text that is named by its file is found from where the run was begun
    place = options.data_dir or (Path() if options.data.startswith(TEXT) else None)
    resolved = {
        "out": str(folder.path),
        "data_dir": None if place is None else str(place.absolute()),
        "epochs": None if options.steps else options.epochs,
        "steps": schedule.steps,
        "eval_every": schedule.eval_every,
        # sums are rounded otherwise by another number
        "threads": torch.get_num_threads(),
    }
    if isinstance(source.facts, TextFacts):
        resolved["context"] = source.facts.context
    return asked | sizes | resolved


def _versions() -> dict[str, str]:
    return {"modula_agd": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _run_name(options: argparse.Namespace) -> str:
    data = re.sub(r"[^\w.-]+", "-", options.data)
    return f"{data}-{options.arch}-{options.method}-seed{options.seed}"
