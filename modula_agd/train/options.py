"""The arguments of ``modula-agd train`` and ``modula-agd sample``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modula_agd import METHODS
from modula_agd.error import InvalidArgument
from modula_agd.train.architecture import ARCHITECTURES
from modula_agd.train.catalogue import CONTEXT, EVERY_NAME, source
from modula_agd.train.objective import LOSSES

METHOD = "fading"
"""The default of ``--method``: the command trains from scratch, where no weights are to be kept."""

METHODS_ABOUT = {
    "agd": "AGD exactly as published",
    "held-out": "for small batches: the direction from past gradients, its descent from the fresh one, curvature as measured",
    "fading": "held-out, and weights forget over a time that grows with the run, against overfitting",
    "closed-form": "the published formula, with the network's own depth and magnitude",
    "exact": "the exact minimum of the network's own bound",
    "certified": "never raises the loss of a full batch; needs --arch linear",
}

DEFAULTS: dict[str, Any] = {
    "batch_size": 128,
    "arch": "fcn",
    "loss": "cross-entropy",
    "method": METHOD,
    "epochs": 10,
    "hold_out": 0.0,
    "seed": 0,
    "device": "auto",
}
"""What ``train`` takes where nothing is given; the parser says None, so that ``--resume`` can tell what was given."""

DATA_OPTIONS = ("augment", "context", "workers")
NETWORK_OPTIONS = tuple(dict.fromkeys(name for each in ARCHITECTURES.values() for name in each.options))


LARGEST = 2**63 - 1
"""Torch's integers end here."""


def integer(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """A parser of integers in a range, for ``type=``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r} is above {most}")
        return value

    return parse


def number(least: float, below: float) -> Callable[[str], float]:
    """A parser of numbers in a half-open range, for ``type=``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = below
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to below {below:g}")
        return value

    return parse


def add_seed(group: argparse._ActionsContainer, about: str, default: int | None = 0) -> None:
    """``--seed``, which torch's generators take up to 2⁶³ − 1."""
    group.add_argument("--seed", type=integer(0), default=default, metavar="N", help=f"{about} (default: 0)")


def add_device(group: argparse._ActionsContainer, default: str | None = "auto") -> None:
    """``--device``."""
    group.add_argument(
        "--device", default=default, metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)"
    )


def add_train(command: argparse.ArgumentParser) -> None:
    """Every argument of ``train``."""
    natural = integer(1)
    data = command.add_argument_group("data")
    data.add_argument("--data", type=_data_name, metavar="NAME", help=f"one of {', '.join(EVERY_NAME)} (of the hub)")
    data.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with train.parquet and test.parquet; with train/CLASS/*.jpg and val/CLASS/*.jpg (imagenet); with input.txt "
        "(shakespeare); or with a folder NAME that holds them; or where FILE is. digits needs none",
    )
    data.add_argument("--batch-size", type=natural, metavar="N", help="samples per step (default: 128)")
    data.add_argument(
        "--augment",
        action="store_const",
        const=True,
        help="pad training images by 4 pixels and crop them at random; mirror every second one in colour, but no grey one: "
        "digits and letters must not be mirrored",
    )
    data.add_argument(
        "--context", type=natural, metavar="N", help=f"characters that a text network sees at once (default: {CONTEXT})"
    )
    data.add_argument(
        "--workers",
        # each takes memory and seconds to start; thousands look like a hang
        type=integer(0, 256),
        metavar="N",
        help="processes that decode imagenet's files (default: one per processor, at most 8)",
    )
    data.add_argument(
        "--hold-out",
        type=number(0, 1),
        metavar="SHARE",
        help="set a share of the training data apart (of a text its end): evaluations look at that alone, the weights that do best on it "
        "are kept beside the last ones, and what is held out anyway is looked at once, by those, in the end (default: 0)",
    )
    _add_network(command.add_argument_group("network and loss"))
    _add_run(command.add_argument_group("run"))


def _add_network(group: argparse._ActionsContainer) -> None:
    natural = integer(1)
    families = "; ".join(f"{name}: {each.about}" for name, each in ARCHITECTURES.items())
    group.add_argument("--arch", choices=list(ARCHITECTURES), help=f"architecture (default: fcn). {families}")
    group.add_argument("--depth", type=natural, metavar="N", help=f"layers or blocks {_defaults('depth')}")
    group.add_argument("--width", type=natural, metavar="N", help=f"hidden features or channels {_defaults('width')}")
    group.add_argument("--heads", type=natural, metavar="N", help=f"attention heads {_defaults('heads')}")
    group.add_argument("--bias", action="store_const", const=True, help=f"with biases ({_having('bias')})")
    group.add_argument(
        "--affine", action="store_const", const=True, help=f"normalisation with scale and shift ({_having('affine')})"
    )
    group.add_argument(
        "--form",
        choices=["convex", "sum"],
        help=f"residual connections: convex, whose depth is that of one block, or the usual sum {_defaults('form')}",
    )
    group.add_argument("--dropout", type=number(0, 1), metavar="P", help=f"share left out {_defaults('dropout')}")
    group.add_argument("--loss", choices=list(LOSSES), help="(default: cross-entropy)")


def _add_run(group: argparse._ActionsContainer) -> None:
    natural = integer(1)
    group.add_argument(
        "--method",
        choices=list(METHODS),
        help=f"how the step is chosen (default: {METHOD}). "
        + "; ".join(f"{name}: {METHODS_ABOUT[name]}" for name in METHODS if name in METHODS_ABOUT),
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=natural, metavar="N", help="passes over the data (default: 10)")
    length.add_argument("--steps", type=natural, metavar="N", help="updates, instead of --epochs")
    group.add_argument(
        "--eval-every", type=natural, metavar="N", help="updates between evaluations (default: an epoch)"
    )
    group.add_argument(
        "--checkpoint-every",
        type=natural,
        metavar="N",
        help="updates between checkpoints; every evaluation writes one too (default: one every five minutes)",
    )
    add_seed(group, "of weights, batches, augmentation and dropout", None)
    add_device(group, None)
    group.add_argument(
        "--threads", type=integer(1, 1024), metavar="N", help="processor threads (default: torch's choice)"
    )
    group.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: a new one under runs/)")
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN_FOLDER",
        help="go on with a run that was stopped or killed, with its own options, to the same end as without the break",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def filled(options: argparse.Namespace) -> argparse.Namespace:
    """The options of a new run, defaults where nothing is given.

    Raises:
        InvalidArgument: no data are named.
    """
    if options.data is None:
        raise InvalidArgument(
            f"modula-agd train was asked for without data. Name them with --data: one of {', '.join(EVERY_NAME)}; or name a run to go on "
            "with by --resume."
        )
    mine = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**{**vars(options), **DEFAULTS, **mine})


def given(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of some options that the user has set."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _data_name(text: str) -> str:
    try:
        source(text)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _having(option: str) -> str:
    return ", ".join(name for name, each in ARCHITECTURES.items() if option in each.options)


def _defaults(option: str) -> str:
    """The default of each architecture that has the option."""
    values = {name: each.options[option] for name, each in ARCHITECTURES.items() if option in each.options}
    by_value = {value: [name for name in values if values[name] == value] for value in dict.fromkeys(values.values())}
    told = [f"{value} for {', '.join(names)}" for value, names in by_value.items()]
    return f"(default: {'; '.join(told)})"
