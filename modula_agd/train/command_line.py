"""``modula-agd train``: train a network on a data set; no learning rate is asked for."""

import argparse
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from modula_agd import METHODS, CrossEntropy, Logits, Method, __version__
from modula_agd.device import usable
from modula_agd.error import InvalidArgument
from modula_agd.train.architecture import ARCHITECTURES, build
from modula_agd.train.data import HUB, NAMES, Classification, batches_per_epoch, classification
from modula_agd.train.extras import require
from modula_agd.train.loop import Outcome, Schedule, train
from modula_agd.train.objective import LOSSES
from modula_agd.train.plot import plot
from modula_agd.train.run_folder import RunFolder, fresh

_TEXT = "shakespeare"
_METHOD = "agd"


def run(options: argparse.Namespace) -> int:
    """Train as the options say.

    Returns:
        Exit status: 0 done, 130 interrupted (what there is was saved).
    """
    require("modula-agd train", "matplotlib", "safetensors", "tqdm")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.data == _TEXT:
        raise InvalidArgument(
            f"training on {_TEXT} needs the small transformer, which arrives in a later version. Choose one of "
            f"{', '.join(NAMES)} for now; from Python, modula_agd.train.characters(folder) already reads the text."
        )
    device = _device(options.device)
    folder = RunFolder(options.out) if options.out else fresh(Path("runs"), _run_name(options))
    folder.check(overwrite=options.overwrite)
    data = classification(options.data, options.data_dir)
    method = _method(options, data)
    schedule = _schedule(options, data)

    print(method.network)
    print(
        f"\n{data.name}: {len(data.train.labels):,} training and {len(data.validation.labels):,} held-out samples of "
        f"{data.features} features, {data.classes} classes; {schedule.steps:,} steps of "
        f"{min(schedule.batch_size, len(data.train.labels))} on {device}"
    )
    config = {
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
    folder.create(config | resolved | {"versions": versions})

    outcome = train(method, data.to(device), schedule, folder, progress=not options.quiet)
    if outcome.history:
        plot(
            outcome.history,
            folder.plot,
            f"{options.data}, {options.arch} {options.depth}×{options.width}, {options.method}",
        )
    _report(outcome, folder)
    return 130 if outcome.interrupted else 0


def _report(outcome: Outcome, folder: RunFolder) -> None:
    if outcome.interrupted:
        print(f"interrupted after {outcome.steps:,} steps; what there is was saved", file=sys.stderr)
    if outcome.history:
        last = outcome.history[-1]
        loss = "not finite" if last.val_loss is None else f"{last.val_loss:.4f}"
        print(f"test accuracy {last.val_accuracy:.2%}, test loss {loss} at step {last.step:,} ({last.seconds:.1f} s)")
    print(f"run folder: {folder.path}")


def _method(options: argparse.Namespace, data: Classification) -> Method:
    loss = LOSSES[options.loss]
    # Cross-entropy's bound is proved in the maximum norm, that of Logits; AGD as published knows no such space.
    in_logits = isinstance(loss, CrossEntropy) and options.method != "agd"
    outputs = Logits(data.classes) if in_logits else data.classes
    network = build(options.arch, outputs=outputs, width=options.width, inputs=data.features, depth=options.depth)
    return METHODS[options.method](network, loss)


def _schedule(options: argparse.Namespace, data: Classification) -> Schedule:
    per_epoch = batches_per_epoch(len(data.train.labels), options.batch_size)
    steps = options.steps or options.epochs * per_epoch
    return Schedule(steps, options.batch_size, options.eval_every or per_epoch, options.seed)


def _device(name: str) -> torch.device:
    return usable(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _run_name(options: argparse.Namespace) -> str:
    data = re.sub(r"[^\w.-]+", "-", options.data)
    return f"{data}-{options.arch}-{options.method}-seed{options.seed}"


def _integer(least: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
        return value

    return parse


def _seed(text: str) -> int:
    value = _integer(0)(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 2^63")
    return value


def _data_name(text: str) -> str:
    if text not in (*NAMES, _TEXT) and not (text.startswith(HUB) and len(text) > len(HUB)):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(NAMES)}, {_TEXT} and {HUB}NAME")
    return text


def configure(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``train`` to its parser; ``options.run`` is what to call with the options."""
    command.description = "Train a network. The step size follows from what the network and the loss declare."
    command.epilog = (
        "The run folder receives log.jsonl, checkpoint.safetensors, config.json and plot.png. "
        "Example: modula-agd train --data mnist --data-dir data --depth 3 --width 512 --epochs 5"
    )
    command.set_defaults(run=run)
    natural = _integer(1)
    data = command.add_argument_group("data")
    data.add_argument(
        "--data",
        type=_data_name,
        required=True,
        metavar="NAME",
        help=f"one of {', '.join(NAMES)}, {_TEXT}, or {HUB}NAME for a labelled image data set of the Hugging Face hub",
    )
    data.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with train.parquet and test.parquet, or with NAME/train.parquet; digits needs none",
    )
    data.add_argument("--batch-size", type=natural, default=128, metavar="N", help="samples per step (default: 128)")
    network = command.add_argument_group("network and loss")
    network.add_argument("--arch", choices=list(ARCHITECTURES), default="fcn", help="architecture (default: fcn)")
    network.add_argument(
        "--depth", type=natural, default=3, metavar="N", help="layers, or residual blocks of resmlp (default: 3)"
    )
    network.add_argument("--width", type=natural, default=128, metavar="N", help="hidden features (default: 128)")
    network.add_argument("--loss", choices=list(LOSSES), default="cross-entropy", help="(default: cross-entropy)")
    group = command.add_argument_group("run")
    group.add_argument(
        "--method",
        choices=list(METHODS),
        default=_METHOD,
        help="how the step is chosen: agd, as published; closed-form or exact, by the bound; certified, which never raises "
        f"the loss of a full batch and needs --arch linear (default: {_METHOD})",
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=natural, default=10, metavar="N", help="passes over the data (default: 10)")
    length.add_argument("--steps", type=natural, metavar="N", help="updates, instead of --epochs")
    group.add_argument(
        "--eval-every", type=natural, metavar="N", help="updates between evaluations (default: an epoch)"
    )
    group.add_argument("--seed", type=_seed, default=0, metavar="N", help="of weights and shuffles (default: 0)")
    group.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)"
    )
    group.add_argument("--threads", type=natural, metavar="N", help="processor threads (default: torch's choice)")
    group.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: a new one under runs/)")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
