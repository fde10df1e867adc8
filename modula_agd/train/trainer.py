"""What one run computes: from a point of training to the next, and what a point is worth on the held-out data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modula_agd import Method, State
from modula_agd.averaging import averaged
from modula_agd.train.meter import Meter, finite
from modula_agd.train.objective import aiming
from modula_agd.train.ranks import ONE, Ranks
from modula_agd.train.seeds import DROPOUT, stream
from modula_agd.train.stopping import Stop
from modula_agd.train.task import Batch, Task

Tensors = dict[str, Tensor]
Ratios = dict[str, float | None]


@dataclass(frozen=True)
class Point:
    """Where training stands: all that its future depends on, besides the method, the task and the schedule.

    Args:
        params: weights.
        buffers: running statistics.
        average: averaged weights and running statistics.
        state: the optimizer's.
        step: updates made, which is also how many batches were taken.
        dropout: state of the generator of dropout's masks.
        meter: of the minibatches since the last evaluation.
        due: the last update's ‖ΔW‖/‖W‖ of each weight where an evaluation is due here; None where none is.
    """

    params: Tensors
    buffers: Tensors
    average: Tensors
    state: State
    step: int
    dropout: Tensor
    meter: Meter
    due: Ratios | None


class Trainer:
    """What one run computes with; holds nothing that changes but the generator of dropout."""

    def __init__(self, method: Method, task: Task, seed: int, ranks: Ranks = ONE) -> None:
        self.method, self.task, self.ranks = method, task, ranks
        self.exchange = ranks.exchange(method)
        self.aims = aiming(method.loss, task.facts.classes, task.device)
        self.generator = stream(seed, DROPOUT, task.device)
        self.gradient = torch.func.grad_and_value(self._training_loss, has_aux=True)

    def start(self, seed: int) -> Point:
        """The point before the first step, whose evaluation is due."""
        network, device = self.method.network, self.task.device
        params = network.init(seed, device=device)
        buffers = network.buffers(device)
        state = self.method.init(params)
        return Point(params, buffers, {**params, **buffers}, state, 0, self.generator.get_state(), Meter(), {})

    def _average(self, point: Point, moved: Tensors, buffers: Tensors) -> Tensors:
        """What to evaluate after a step; steps along the batch's own gradient are judged by the weights that they lead to."""
        if self.method.momentum is None:
            return {**moved, **buffers}
        return averaged(point.average if point.step else None, {**moved, **buffers}, point.step + 1)

    def _training_loss(
        self, params: Tensors, buffers: Tensors, inputs: Tensor, aims: Tensor, masks: torch.Generator
    ) -> tuple[Tensor, Any]:
        outputs, renewed = self.method.network.run(params, inputs, buffers, masks)
        return self.method.loss(outputs, aims), (outputs, renewed)

    def step(self, point: Point, batch: Batch, *, due: bool = False) -> Point:
        """The next point.

        Args:
            point: stays as it is.
            batch: to learn from.
            due: whether the next point shall be evaluated.
        """
        self.generator.set_state(point.dropout)
        masks = self.ranks.masks(self.generator)
        aims = self.aims(batch.labels)
        method, params = self.method, point.params
        # of the masks that the gradient is about to draw
        evidence = method.evidence(params, batch.inputs, aims, masks.clone_state()) if method.needs_evidence else None
        grads, (value, (outputs, renewed)) = self.gradient(params, point.buffers, batch.inputs, aims, masks)
        seen = Meter().plus(value, outputs, batch.labels)
        grads, renewed = self.ranks.joined(self.exchange, grads, renewed)
        updates, state = method.update(
            grads,
            point.state,
            params,
            evidence=evidence,
            value=value,
            average=point.average,
            exchange=self.exchange,
        )
        moved = {name: weight + updates[name] if name in updates else weight for name, weight in params.items()}
        return Point(
            moved,
            renewed,
            self._average(point, moved, renewed),
            state,
            point.step + 1,
            self.generator.get_state(),
            point.meter.joined(self.ranks.total(seen, value)),
            _relative(updates, params) if due else None,
        )

    def evaluated(
        self, point: Point, batch_size: int, stop: Stop | None = None
    ) -> tuple[float | None, float | None] | None:
        """Mean loss and accuracy on the held-out data, with averaged weights; None where it was told to stop before the end."""
        mean = {
            name: value.to(point.params[name].dtype) if name in point.params else value
            for name, value in point.average.items()
        }
        meter = judged(self.method, mean, self.task, batch_size, stop)
        return None if meter is None else self.ranks.total(meter, next(iter(mean.values()))).means()


def judged(method: Method, weights: Tensors, task: Task, batch_size: int, stop: Stop | None = None) -> Meter | None:
    """The held-out data as weights and running statistics see them; None where it was told to stop before the end."""
    meter, aims = Meter(), aiming(method.loss, task.facts.classes, task.device)
    with torch.no_grad():
        for inputs, labels in task.evaluation(batch_size):
            if stop:
                return None
            outputs = method.network(weights, inputs, weights)
            meter = meter.plus(method.loss(outputs, aims(labels)), outputs, labels)
    return meter


def looked_at(point: Point) -> Point:
    """The point once its evaluation is done: training goes on with a new mean of minibatches."""
    return replace(point, meter=Meter(), due=None)


def _relative(updates: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Ratios:
    """‖ΔW‖_F/‖W‖_F of each updated parameter, None where W is 0."""
    if not updates:
        return {}
    ratios = torch.stack([update.norm().float() / params[name].norm().float() for name, update in updates.items()])
    return {name: finite(ratio) for name, ratio in zip(updates, ratios.tolist(), strict=True)}
