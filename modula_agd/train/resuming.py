"""What ``--resume`` goes on with: the checkpoint of a run folder, and the options that the run was begun with."""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from modula_agd.error import InvalidArgument
from modula_agd.train.checkpoint import Checkpoint, CheckpointError, load
from modula_agd.train.continuing import CONFIG
from modula_agd.train.options import DEFAULTS
from modula_agd.train.run_folder import RunFolder

FREE = ("data_dir", "device", "threads", "workers", "checkpoint_every")
"""Options that may be given anew: they say where and how a run is computed, not which run it is."""

# of what a command was called with, these are no part of the run
_NO_PART = ("run", "resume", "overwrite", "quiet")


class Resumption(NamedTuple):
    """A run to go on with.

    Args:
        options: what the run was begun with, and what was given anew.
        config: the same for ``config.json``.
        saved: its checkpoint; None where it was killed before the first, and begins again.
    """

    options: argparse.Namespace
    config: dict[str, Any]
    saved: Checkpoint | None


def resumption(asked: argparse.Namespace) -> Resumption:
    """The run that ``asked.resume`` names.

    Raises:
        InvalidArgument: there is no such run, or an option contradicts it.
        CheckpointError: its checkpoint cannot be gone on from.
    """
    folder = RunFolder(asked.resume)
    if not folder.path.is_dir():
        raise InvalidArgument(
            f"there is no run folder {folder.path} to go on with. Name one that modula-agd train has made."
        )
    saved = load(folder.checkpoint) if folder.checkpoint.exists() else None
    config = _begun(folder) if saved is None else _kept(saved, folder)
    anew = {name: value for name, value in vars(asked).items() if name not in _NO_PART and value is not None}
    if asked.overwrite:
        raise InvalidArgument("--overwrite begins a run anew and --resume goes on with it. Give one of the two.")
    _contradict(anew, config, folder)
    anew = {name: _plain(value) for name, value in anew.items() if name in FREE}
    config = {**config, **anew, "out": str(folder.path)}
    values = {name: config.get(name, DEFAULTS.get(name)) for name in vars(asked)}
    place = values["data_dir"]
    paths = {"data_dir": None if place is None else Path(place), "out": folder.path}
    mine = {name: getattr(asked, name) for name in _NO_PART}
    return Resumption(argparse.Namespace(**{**values, **paths, **mine}), config, saved)


def _begun(folder: RunFolder) -> dict[str, Any]:
    """The configuration of a run that was killed before its first checkpoint."""
    lines = folder.log.read_bytes().count(b"\n") if folder.log.exists() else 0
    # the line of step 0 is written before the first checkpoint
    if not folder.config.exists() or lines > 1:
        raise CheckpointError(
            f"there is no checkpoint {folder.checkpoint} to go on from. Name the folder of a run that modula-agd train has begun, or "
            "begin one."
        )
    return _read(folder)


def _kept(saved: Checkpoint, folder: RunFolder) -> dict[str, Any]:
    if CONFIG not in saved.metadata:
        raise CheckpointError(
            f"{folder.checkpoint} does not say with which options its run was begun: an older version wrote it, or train was called from "
            "Python. Go on there: train(..., resume=load(path))."
        )
    try:
        config = dict(json.loads(saved.metadata[CONFIG]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder.checkpoint} holds no readable options: {error}. Train again.") from error
    told = _read(folder) if folder.config.exists() else config
    odd = [name for name in config if name not in (*FREE, "versions", "out") and told.get(name) != config[name]]
    if odd:
        raise InvalidArgument(
            f"{folder.config} has {odd[0]} {told.get(odd[0])!r}, but the run to go on with was begun with {config[odd[0]]!r}. Put the "
            "file back as it was, or begin a run of its own."
        )
    return config


def _read(folder: RunFolder) -> dict[str, Any]:
    try:
        return dict(json.loads(folder.config.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder.config} is no configuration of a run: {error}. Put it back as it was, or begin another run."
        ) from error


def _contradict(anew: dict[str, Any], config: dict[str, Any], folder: RunFolder) -> None:
    """Refuse options that are not those of the run."""
    for name, value in anew.items():
        if name in FREE:
            continue
        same = value.resolve() == folder.path.resolve() if name == "out" else config.get(name) == value
        if not same:
            flag = name.replace("_", "-")
            raise InvalidArgument(
                f"--{flag} {value} was given to go on with a run that was begun with {config.get(name)!r}. Leave it out, or begin a run "
                "of its own."
            )


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return str(value.absolute()) if isinstance(value, Path) else value
