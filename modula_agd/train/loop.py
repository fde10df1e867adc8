"""The training loop: minibatches, one pure update each, an evaluation now and then."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modula_agd import Method, State
from modula_agd.averaging import averaged
from modula_agd.error import InvalidArgument
from modula_agd.train.checkpoint import save
from modula_agd.train.extras import require
from modula_agd.train.meter import Meter, finite
from modula_agd.train.objective import aiming
from modula_agd.train.recipe import KEY, Recipe
from modula_agd.train.run_folder import Evaluation, RunFolder
from modula_agd.train.seeds import DROPOUT, stream
from modula_agd.train.task import Batch, Task

_SHOW_EVERY = 20
# Without gradients a network keeps little of a batch, so that small ones need not be evaluated in small ones.
_EVALUATION_BATCH = 256

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long to train and when to look; there is nothing else to schedule.

    Args:
        steps: number of updates, ≥ 1.
        batch_size: samples per minibatch, ≥ 1; the whole training set where it has fewer.
        eval_every: updates between evaluations, ≥ 1.
        seed: of the initial weights, the batches, the augmentation and the dropout.
    """

    steps: int
    batch_size: int
    eval_every: int
    seed: int

    def __post_init__(self) -> None:
        for what in ("steps", "batch_size", "eval_every"):
            if getattr(self, what) < 1:
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
        interrupted: whether the user stopped it.
    """

    params: Tensors
    buffers: Tensors
    average: Tensors
    state: State
    steps: int
    history: tuple[Evaluation, ...]
    interrupted: bool


@dataclass(frozen=True)
class _Point:
    """Where training stands; a step makes a new one."""

    params: Tensors
    buffers: Tensors
    average: Tensors
    state: State
    step: int


class _Trainer:
    """What one run computes with; holds nothing that changes but the generator of dropout."""

    def __init__(self, method: Method, task: Task, seed: int) -> None:
        self.method, self.task = method, task
        self.aims = aiming(method.loss, task.facts.classes, task.device)
        self.generator = stream(seed, DROPOUT, task.device)
        self.gradient = torch.func.grad_and_value(self._training_loss, has_aux=True)

    def start(self, seed: int) -> _Point:
        network, device = self.method.network, self.task.device
        params = network.init(seed, device=device)
        buffers = network.buffers(device)
        return _Point(params, buffers, {**params, **buffers}, self.method.init(params), 0)

    def _average(self, point: _Point, moved: Tensors, buffers: Tensors) -> Tensors:
        """What to evaluate after a step; steps along the batch's own gradient are judged by the weights that they lead to."""
        if self.method.momentum is None:
            return {**moved, **buffers}
        return averaged(point.average if point.step else None, {**moved, **buffers}, point.step + 1)

    def _training_loss(self, params: Tensors, buffers: Tensors, inputs: Tensor, aims: Tensor) -> tuple[Tensor, Any]:
        outputs, renewed = self.method.network.run(params, inputs, buffers, self.generator)
        return self.method.loss(outputs, aims), (outputs, renewed)

    def step(self, point: _Point, batch: Batch, meter: Meter) -> tuple[_Point, Tensors]:
        """The next point, and the updates that led to it."""
        aims = self.aims(batch.labels)
        method, params = self.method, point.params
        # of the masks that the gradient is about to draw
        evidence = (
            method.evidence(params, batch.inputs, aims, self.generator.clone_state()) if method.needs_evidence else None
        )
        grads, (value, (outputs, renewed)) = self.gradient(params, point.buffers, batch.inputs, aims)
        updates, state = method.update(grads, point.state, params, evidence=evidence, value=value)
        meter.add(value, outputs, batch.labels)
        moved = {name: weight + updates[name] if name in updates else weight for name, weight in params.items()}
        return _Point(moved, renewed, self._average(point, moved, renewed), state, point.step + 1), updates

    def evaluated(self, point: _Point, batch_size: int) -> tuple[float | None, float | None]:
        """Mean loss and accuracy on the held-out data, with averaged weights."""
        meter = Meter()
        mean = {
            name: value.to(point.params[name].dtype) if name in point.params else value
            for name, value in point.average.items()
        }
        with torch.no_grad():
            for inputs, labels in self.task.evaluation(batch_size):
                outputs = self.method.network(mean, inputs, mean)
                meter.add(self.method.loss(outputs, self.aims(labels)), outputs, labels)
        return meter.means()


def train(
    method: Method,
    task: Task,
    schedule: Schedule,
    run: RunFolder | None = None,
    *,
    recipe: Recipe | None = None,
    progress: bool = False,
) -> Outcome:
    """Train a network from fresh weights on the task's device.

    Args:
        method: made for a network that takes the task's inputs and gives one output per class.
        task: where the batches come from.
        schedule: how long, and how often to evaluate.
        run: a folder without a log, made if it is not there, for the log and, at each evaluation, the checkpoint.
        recipe: of the network, for the checkpoint, so that ``restore`` can build it again.
        progress: show a bar with loss, accuracy and η.

    Returns:
        The outcome; also after a ``KeyboardInterrupt``, which ends the run with what there is.

    Raises:
        InvalidArgument: the folder holds the log of another run.
        NonFiniteGradient: a gradient held NaN or infinity; weights, log and checkpoint are as of the last evaluation.
    """
    require("the progress bar", "tqdm")
    from tqdm import tqdm

    if run is not None:
        run.begin()
    trainer = _Trainer(method, task, schedule.seed)
    point, meter = trainer.start(schedule.seed), Meter()
    per_epoch = task.per_epoch(schedule.batch_size)
    history: list[Evaluation] = []
    interrupted = False
    start = time.perf_counter()

    def keep() -> None:
        if run is not None:
            about = {} if recipe is None else {KEY: str(recipe)}
            metadata = {"step": str(point.step), "seed": str(schedule.seed), **about}
            save(run.checkpoint, point.params, point.state, metadata, point.buffers, point.average)

    def evaluate(relative_update: dict[str, float | None]) -> None:
        nonlocal meter
        figures = *meter.means(), *trainer.evaluated(point, max(schedule.batch_size, _EVALUATION_BATCH))
        eta = float(point.state.eta) if point.step else None
        seconds = round(time.perf_counter() - start, 3)
        history.append(
            Evaluation(point.step, round(point.step / per_epoch, 6), *figures, eta, seconds, relative_update)
        )
        meter = Meter()
        if run is not None:
            run.append(history[-1])
        keep()

    with tqdm(total=schedule.steps, unit="step", disable=not progress, dynamic_ncols=True) as bar:
        try:
            evaluate({})
            stream_of_batches = task.batches(schedule.batch_size, schedule.seed)
            for _, batch in zip(range(schedule.steps), stream_of_batches, strict=False):
                before = point
                point, updates = trainer.step(point, batch, meter)
                due = point.step % schedule.eval_every == 0 or point.step == schedule.steps
                if due or point.step % _SHOW_EVERY == 0:
                    _show(bar, meter, point.state)
                if due:
                    method.check(point.state)
                    evaluate(_relative(updates, before.params))
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        keep()
    return Outcome(point.params, point.buffers, point.average, point.state, point.step, tuple(history), interrupted)


def _relative(updates: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, float | None]:
    """‖ΔW‖_F/‖W‖_F of each updated parameter, None where W is 0."""
    if not updates:
        return {}
    ratios = torch.stack([update.norm().float() / params[name].norm().float() for name, update in updates.items()])
    return {name: finite(ratio) for name, ratio in zip(updates, ratios.tolist(), strict=True)}


def _show(bar: Any, meter: Meter, state: State) -> None:
    loss, accuracy = meter.means()
    if loss is not None and accuracy is not None:
        bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.1%}, η {float(state.eta):.4f}", refresh=False)
