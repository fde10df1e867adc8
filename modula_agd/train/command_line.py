"""``modula-agd train``: train a network on a data set; no learning rate is asked for."""

import argparse
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from modula_agd import METHODS, CrossEntropy, Method, __version__
from modula_agd.device import usable
from modula_agd.error import InvalidArgument, ModulaError, UnknownBound
from modula_agd.train.architecture import fitting, settled
from modula_agd.train.catalogue import check, kind, task
from modula_agd.train.extras import require
from modula_agd.train.loop import Outcome, Schedule, train
from modula_agd.train.objective import LOSSES
from modula_agd.train.options import DATA_OPTIONS, METHOD, METHODS_ABOUT, NETWORK_OPTIONS, add_train, given
from modula_agd.train.plot import plot
from modula_agd.train.recipe import Recipe
from modula_agd.train.run_folder import RunFolder, fresh
from modula_agd.train.task import Task


class TrainingFailed(ModulaError, RuntimeError):
    """The machine could not go on with a run."""


def configure(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``train`` to its parser; ``options.run`` is what to call with the options."""
    command.description = (
        "Train a network. The step size follows from what the network and the loss declare. The default method is "
        f"{METHOD}: {METHODS_ABOUT[METHOD]}."
    )
    command.epilog = (
        "The run folder receives log.jsonl, checkpoint.safetensors, config.json and plot.png. "
        "Example: modula-agd train --data mnist --data-dir data --depth 3 --width 512 --epochs 5"
    )
    command.set_defaults(run=run)
    add_train(command)


def run(options: argparse.Namespace) -> int:
    """Train as the options say.

    Returns:
        Exit status: 0 done, 130 interrupted (what there is was saved).
    """
    require("modula-agd train", "matplotlib", "safetensors", "tqdm")
    if options.quiet:
        # what the datasets library asks when it is imported, which happens where it is needed alone
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if options.threads:
        torch.set_num_threads(options.threads)
    network, data = given(options, NETWORK_OPTIONS), given(options, DATA_OPTIONS)
    architecture = fitting(options.arch, kind(options.data), options.data)
    sizes = settled(options.arch, network)
    check(options.data, data)
    device = chosen(options.device)
    folder = RunFolder(options.out) if options.out else fresh(Path("runs"), _run_name(options))
    folder.check(overwrite=options.overwrite)

    with _explained(folder):
        source = task(options.data, options.data_dir, flat=architecture.takes == "rows", device=device, **data)
    loss = LOSSES[options.loss]
    # Cross-entropy's bound is proved in the maximum norm, that of Logits; AGD as published knows no such space.
    logits = isinstance(loss, CrossEntropy) and options.method != "agd"
    recipe = Recipe(options.arch, sizes, logits, source.facts)
    method = _method(options, recipe)
    schedule = _schedule(options, source)
    print(method.network)
    print(f"\n{source}; {schedule.steps:,} steps of {source.shown(schedule.batch_size)} on {device}")
    folder.create(_config(options, sizes, schedule, folder, device))

    with _explained(folder):
        outcome = train(method, source, schedule, folder, recipe=recipe, progress=not options.quiet)
    if outcome.history:
        sized = ", ".join(f"{name} {value}" for name, value in sizes.items() if name in ("depth", "width"))
        plot(outcome.history, folder.plot, f"{options.data}, {options.arch} ({sized}), {options.method}")
    _report(outcome, folder, source)
    return 130 if outcome.interrupted else 0


def chosen(name: str) -> torch.device:
    """The device of that name, tried; "auto" is an accelerator if there is one."""
    return usable(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


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


def _report(outcome: Outcome, folder: RunFolder, source: Task) -> None:
    if outcome.interrupted:
        print(f"interrupted after {outcome.steps:,} steps; what there is was saved", file=sys.stderr)
    if outcome.history:
        last = outcome.history[-1]
        loss = "not finite" if last.val_loss is None else f"{last.val_loss:.4f}"
        accuracy = "accuracy" if kind(source.facts.name) == "images" else "accuracy of the next character"
        print(
            f"{source.held_out} {accuracy} {last.val_accuracy:.2%}, {source.held_out} loss {loss} "
            f"at step {last.step:,} ({last.seconds:.1f} s)"
        )
    print(f"run folder: {folder.path}")


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
    return Schedule(steps, options.batch_size, options.eval_every or per_epoch, options.seed)


def _config(
    options: argparse.Namespace, sizes: dict[str, Any], schedule: Schedule, folder: RunFolder, device: torch.device
) -> dict[str, Any]:
    asked = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items() if name != "run"
    }
    resolved = {
        "out": str(folder.path),
        "device": str(device),
        "epochs": None if options.steps else options.epochs,
        "steps": schedule.steps,
        "eval_every": schedule.eval_every,
    }
    versions = {"modula_agd": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return asked | sizes | resolved | {"versions": versions}


def _run_name(options: argparse.Namespace) -> str:
    data = re.sub(r"[^\w.-]+", "-", options.data)
    return f"{data}-{options.arch}-{options.method}-seed{options.seed}"
