"""A point of training as a checkpoint, and the checkpoint as that point again, so that a run goes on as if it had not stopped.

Nothing in a run draws from a global source of randomness. Where the batches stand follows from the seed and the number of steps,
so that what is kept of randomness is that number and the generator of dropout.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.state import WEIGHT_SIZED, complaint, not_finite, odd_tensors
from modula_agd.train.checkpoint import Checkpoint, CheckpointError, save, state_like
from modula_agd.train.meter import Meter
from modula_agd.train.recipe import KEY, Recipe
from modula_agd.train.task import Task, fingerprint
from modula_agd.train.trainer import Point, Trainer

if TYPE_CHECKING:
    from modula_agd.train.loop import Schedule

CONFIG = "config"
"""Under which a checkpoint's metadata has the run's configuration."""

_LOOP = "loop"
_DROPOUT, _METER = "dropout", "meter"
_REMEDY = "It is damaged, or of another version; train again with this one"


class Clock(NamedTuple):
    """What a run has used up so far.

    Args:
        seconds: wall time.
        log: bytes of the log.
    """

    seconds: float
    log: int


def keep(
    path: Path,
    point: Point,
    clock: Clock,
    schedule: "Schedule",
    task: Task,
    recipe: Recipe | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a point of training down.

    Args:
        path: of the checkpoint, in an existing folder.
        point: where training stands.
        clock: as of this point.
        schedule: of the run.
        task: of the run.
        recipe: of the network.
        config: what JSON can hold, kept as it is.

    Raises:
        OSError: the file could not be written, and the old one is still there.
    """
    meter = {} if point.meter.sums is None else {_METER: point.meter.sums}
    told = {
        "batch_size": schedule.batch_size,
        "eval_every": schedule.eval_every,
        "data": fingerprint(task),
        "counted": point.meter.count,
        "due": point.due,
        **clock._asdict(),
    }
    metadata = {"step": str(point.step), "seed": str(schedule.seed), _LOOP: json.dumps(told)}
    metadata |= {} if recipe is None else {KEY: str(recipe)}
    metadata |= {} if config is None else {CONFIG: json.dumps(dict(config))}
    save(path, point.params, point.state, metadata, point.buffers, point.average, {_DROPOUT: point.dropout, **meter})


def clock(saved: Checkpoint) -> Clock:
    """What the run of a checkpoint had used up when it was written.

    Raises:
        CheckpointError: it does not tell what going on needs.
    """
    told = _told(saved)
    return Clock(float(told["seconds"]), int(told["log"]))


def finished(saved: Checkpoint, steps: int) -> bool:
    """Whether a run of so many steps has nothing left to do: the last step is made and evaluated."""
    return int(saved.metadata["step"]) >= steps and _told(saved)["due"] is None


def taken_up(saved: Checkpoint, trainer: Trainer, schedule: "Schedule") -> Point:
    """The point that a checkpoint was written at, on the task's device.

    Args:
        saved: what ``load`` read.
        trainer: of the method and the task that the run had.
        schedule: that of the run; it may be longer.

    Raises:
        CheckpointError: the checkpoint cannot be gone on from, or belongs to another network or method.
        InvalidArgument: the schedule or the data are not those of the run.
    """
    told = _told(saved)
    then = {"seed": int(saved.metadata["seed"]), **{name: told[name] for name in ("batch_size", "eval_every")}}
    for name, value in then.items():
        if getattr(schedule, name) != value:
            raise InvalidArgument(
                f"training was to go on with {name} {getattr(schedule, name)}, but the checkpoint was written with {value}, and would not "
                "end where the run would have. Give the same, or begin a run of its own."
            )
    step = int(saved.metadata["step"])
    if step > schedule.steps:
        raise InvalidArgument(
            f"training was to go on to step {schedule.steps}, but the checkpoint is of step {step} already. Ask for more steps."
        )
    data = fingerprint(trainer.task)
    if told["data"] != data:
        raise InvalidArgument(
            f"training was to go on with {trainer.task}, but the data are not those that the run began with (fingerprint {data}, where "
            f"the checkpoint has {told['data']}). Put the data back as they were, or begin a new run."
        )
    # whose tensors are where, and in what order, they are when training begins
    start = trainer.start(schedule.seed)
    params = _like(saved.params, start.params, "weights")
    state = _state(saved, start, trainer)
    sums = saved.loop.get(_METER)
    try:
        trainer.generator.set_state(saved.loop[_DROPOUT])
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint's state of dropout's generator does not fit {trainer.task.device}: {error}. Go on upon the kind of device "
            "that the run was on."
        ) from error
    return Point(
        params,
        _like(saved.buffers, start.buffers, "running statistics"),
        _like(saved.average, start.average, "averaged weights"),
        state,
        step,
        saved.loop[_DROPOUT],
        Meter(int(told["counted"]), None if sums is None else sums.to(trainer.task.device)),
        told["due"],
    )


def _told(saved: Checkpoint) -> dict[str, Any]:
    try:
        told = json.loads(saved.metadata[_LOOP])
        wanted = {"batch_size", "eval_every", "data", "counted", "due", *Clock._fields}
        if not wanted <= told.keys() or not {"step", "seed"} <= saved.metadata.keys():
            raise ValueError(f"it lacks {', '.join(sorted(wanted - told.keys())) or 'the step or the seed'}")
    except (KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint does not tell what going on needs ({error}). {_REMEDY}; modula_agd.train.restore still gives the network "
            "if its weights are whole."
        ) from error
    return told


def _state(saved: Checkpoint, start: Point, trainer: Trainer) -> Any:
    """The optimizer's state, each tensor where training has it."""
    if trainer.method.momentum is None and any(name.startswith("momentum.") for name in saved.state):
        raise CheckpointError(
            f"the checkpoint's state of the optimizer cannot be gone on with: it has momentum, where this method has none. {_REMEDY}."
        )
    state = state_like(start.state, saved.state)
    shapes = {name: tuple(value.shape) for name, value in start.params.items()}
    held = {what: getattr(state, what) for what in WEIGHT_SIZED}
    wrong = complaint(state._asdict(), start.state)
    for what, tensors in held.items():
        wrong = wrong or odd_tensors(what, tensors, shapes) or not_finite(what, tensors)
    if wrong is None and held["momentum"].keys() != held["lead"].keys():
        wrong = "its lead is not of the parameters that its momentum is of, as in runs of older versions"
    if wrong is not None:
        raise CheckpointError(f"the checkpoint's state of the optimizer cannot be gone on with: {wrong}. {_REMEDY}.")
    return state._replace(
        **{
            what: {name: tensors[name].to(start.params[name].device) for name in start.params if name in tensors}
            for what, tensors in held.items()
        }
    )


def _like(found: Mapping[str, Tensor], start: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The saved tensors where, and in the order in which, training has them."""
    odd = [
        name
        for name in sorted(found.keys() | start.keys())
        if name not in found or name not in start or found[name].shape != start[name].shape
    ]
    if odd:
        shapes = [tuple(part[odd[0]].shape) if odd[0] in part else "absent" for part in (found, start)]
        raise CheckpointError(
            f"the checkpoint holds other {what} than the network to be trained: {odd[0]} is {shapes[0]} there, {shapes[1]} here. "
            "Go on with the network that the run began with."
        )
    return {name: found[name].to(value.device) for name, value in start.items()}
