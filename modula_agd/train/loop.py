"""The training loop: minibatches, one pure update each, an evaluation and a checkpoint now and then."""

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modula_agd import Method, State
from modula_agd.error import InvalidArgument
from modula_agd.train.checkpoint import Checkpoint
from modula_agd.train.continuing import Clock, clock, taken_up
from modula_agd.train.extras import require
from modula_agd.train.journal import read
from modula_agd.train.meter import Meter
from modula_agd.train.pixels import DataError
from modula_agd.train.ranks import ONE, Ranks
from modula_agd.train.recipe import Recipe
from modula_agd.train.record import Record
from modula_agd.train.run_folder import Evaluation, RunFolder
from modula_agd.train.stopping import Stop, stopping
from modula_agd.train.task import Task
from modula_agd.train.trainer import Point, Tensors, Trainer, looked_at

_SHOW_EVERY = 20
# Without gradients a network keeps little of a batch, so that small ones need not be evaluated in small ones.
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Schedule:
    """How long to train and when to look; there is nothing else to schedule.

    Args:
        steps: number of updates, ≥ 1.
        batch_size: samples per minibatch, ≥ 1; the whole training set where it has fewer.
        eval_every: updates between evaluations, ≥ 1.
        seed: of the initial weights, the batches, the augmentation and the dropout.
        checkpoint_every: updates between checkpoints, ≥ 1; None for one every five minutes. Each evaluation writes one too.
    """

    steps: int
    batch_size: int
    eval_every: int
    seed: int
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        for what in ("steps", "batch_size", "eval_every", "checkpoint_every"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise InvalidArgument(f"a schedule was made with {what}={getattr(self, what)}; it must be at least 1")


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
        params: the last weights.
        buffers: the last running statistics; ``{}`` for most networks.
        average: averaged weights and running statistics, by the names of both, which the evaluations are of; the last ones
            where nothing is averaged.
        state: the optimizer's last state.
        steps: updates made.
        history: one evaluation per line of the log.
        stopped: the signal that stopped it, such as ``signal.SIGTERM``; None where it came to its end.
        saved: whether all of this is in the checkpoint; True where there is no run folder.
    """

    params: Tensors
    buffers: Tensors
    average: Tensors
    state: State
    steps: int
    history: tuple[Evaluation, ...]
    stopped: int | None
    saved: bool

    @property
    def interrupted(self) -> bool:
        """Whether the user stopped it."""
        return self.stopped is not None


def train(
    method: Method,
    task: Task,
    schedule: Schedule,
    run: RunFolder | None = None,
    *,
    recipe: Recipe | None = None,
    config: Mapping[str, Any] | None = None,
    resume: Checkpoint | None = None,
    progress: bool = False,
    best: bool = False,
    ranks: Ranks = ONE,
) -> Outcome:
    """Train a network on the task's device, from fresh weights or from a checkpoint.

    SIGINT and SIGTERM, where this runs in the main thread, end the run after its step with what there is, a checkpoint of it
    included; a second one ends the process.

    Args:
        method: made for a network that takes the task's inputs and gives one output per class.
        task: where the batches come from.
        schedule: how long, and how often to evaluate and to write.
        run: a folder for the log and the checkpoint, made if it is not there; without a log, unless ``resume`` is given.
        recipe: of the network, for the checkpoint, so that ``restore`` can build it again.
        config: what JSON can hold, for the checkpoint: what the run was asked for.
        resume: a checkpoint to go on from, ``load(run.checkpoint)``: on a CPU with the same versions and number of threads the
            run then ends bit for bit as if it had not been stopped. Lines that the log has beyond it are dropped.
        progress: show a bar with loss, accuracy and η.
        best: keep the point with the lowest held-out loss too, in ``run.best``. It is chosen by these data, which then say too much of it:
            pass ``task.apart(0.1)``, and look at the task's own held-out data once, in the end.
        ranks: the processes of the run, of which the first alone is given ``run``.

    Returns:
        The outcome; also after a ``KeyboardInterrupt``, which ends the run with what there is.

    Raises:
        InvalidArgument: the folder holds the log of another run, or the checkpoint is not of this schedule or these data.
        CheckpointError: the checkpoint is not of this network and method, or not that of the log.
        NonFiniteGradient: a gradient held NaN or infinity; weights, log and checkpoint are as of the last evaluation, or of a
            checkpoint since.
        DataError: data that are read while training cannot be; the checkpoint is of the step before.
        OSError: the first checkpoint could not be written; one that fails later is a ``NotSaved`` warning.
    """
    require("the progress bar", "tqdm")
    from tqdm import tqdm

    if run is not None and resume is None:
        run.begin()
    trainer = Trainer(method, ranks.task(task, schedule.batch_size), schedule.seed, ranks)
    start = trainer.start(schedule.seed) if resume is None else taken_up(resume, trainer, schedule)
    used = Clock(0.0, 0) if resume is None else clock(resume)
    earlier = () if run is None else read(run.log, used.log)
    record = Record(run, earlier, used, best=best, schedule=schedule, task=task, recipe=recipe, config=config)
    with (
        stopping() as stop,
        tqdm(total=schedule.steps, initial=start.step, unit="step", disable=not progress, dynamic_ncols=True) as bar,
    ):
        point = start
        try:
            for point in _points(trainer, start, schedule, record, stop, bar):  # noqa: B007 (what counts is the last one)
                pass
        except KeyboardInterrupt:
            stop.signal = signal.SIGINT
        except DataError:
            # once the file is repaired, the run goes on from here
            record.keep(point)
            raise
        saved = record.keep(point)
    return Outcome(
        point.params, point.buffers, point.average, point.state, point.step, tuple(record.history), stop.signal, saved
    )


def _points(
    trainer: Trainer, point: Point, schedule: Schedule, record: Record, stop: Stop, bar: Any
) -> Iterator[Point]:
    """Each point from here to the end of the schedule, or until told to stop, once its step or its evaluation is done."""
    task, ranks, eval_batch = trainer.task, trainer.ranks, max(schedule.batch_size, EVALUATION_BATCH)
    per_epoch = task.per_epoch(schedule.batch_size)
    begin = (point.step,) if point.step else ()
    batches = task.batches(schedule.batch_size, schedule.seed, *begin)
    while not ranks.asked(stop):
        if point.due is not None:
            # ranks stop together, at a step
            held_out = trainer.evaluated(point, eval_batch, stop if ranks.size == 1 else None)
            if held_out is None:
                return
            record.add(_evaluation(point, per_epoch, held_out, record.seconds), point)
            point = looked_at(point)
            yield point
            record.keep(point, must=point.step == 0)
        if point.step >= schedule.steps or (stop and ranks.size == 1):
            return
        batch = next(batches, None)
        if batch is None:
            return
        count = point.step + 1
        due = count % schedule.eval_every == 0 or count == schedule.steps
        point = trainer.step(point, batch, due=due)
        yield point
        if due or count % _SHOW_EVERY == 0:
            _show(bar, point.meter, point.state)
        if due or record.due(point, schedule.checkpoint_every):
            trainer.method.check(point.state)
            if not due:
                record.keep(point)
        bar.update()


def _evaluation(
    point: Point, per_epoch: int, held_out: tuple[float | None, float | None], seconds: float
) -> Evaluation:
    eta = float(point.state.eta) if point.step else None
    epoch = round(point.step / per_epoch, 6)
    return Evaluation(point.step, epoch, *point.meter.means(), *held_out, eta, round(seconds, 3), point.due or {})


def _show(bar: Any, meter: Meter, state: State) -> None:
    loss, accuracy = meter.means()
    if loss is not None and accuracy is not None:
        bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.1%}, η {float(state.eta):.4f}", refresh=False)
