"""One run of the study: training, and what is measured of it."""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cells import Cell
from passes import TrainingStep
from peers import OWN, PEERS, Request, Runner
from tasks import Benchmark

from modula_agd import NonFiniteGradient, UnhalvedSquareLoss
from modula_agd.train import Task
from modula_agd.train.facts import TextFacts
from modula_agd.train.objective import aiming

POINTS = 60
"""Points of a curve."""
TRAINING_SAMPLES = 8192
"""Training samples on which the final weights are evaluated."""
EVALUATION_SEED = 20_000


def shown(outcome: dict[str, Any]) -> str:
    """An outcome in a line."""
    if outcome["diverged"]:
        return f"diverged ({outcome['seconds']:.0f} s)"
    return (
        f"train {outcome['train_loss']:.4f}, at the end {outcome['end_loss']:.4f}, held out {outcome['val_loss']:.4f} "
        f"{outcome['val_accuracy']:.4f} ({outcome['seconds']:.0f} s, step {outcome['step_ms']:.1f} of {outcome['total_ms']:.1f} ms)"
    )


def run(cell: Cell, benchmark: Benchmark, source: Task) -> dict[str, Any]:
    """Train once; the held-out split is read once, after the last step, and ``benchmark.looks`` times before.

    Returns:
        Mean training loss and accuracy over the last tenth of the steps (live weights); loss and accuracy of the weights to
        evaluate on fixed training samples ("end") and on the held-out split ("val"); the curve; the looks; times: of the whole run
        per step, looks and a graph's capture included, and the median that a step of the optimizer took the host (where it is part
        of a graph, of those before the capture).
    """
    device = source.device
    batch = cell.batch or benchmark.batch
    steps = max(10, round(cell.scale * benchmark.budget(source, batch)))
    if cell.batch and not benchmark.epochs:
        steps = max(10, round(steps * benchmark.batch / batch))
    # dropout draws from torch's own generators
    torch.manual_seed(cell.seed)
    network = benchmark.network(source.facts.classes, cell.width, cell.depth)
    model = network.to_torch(cell.seed, device=device)
    # others minimise what is reported; this library's bound is about the loss that declares it
    loss = benchmark.loss if cell.peer in OWN or benchmark.unit == 1 else UnhalvedSquareLoss()
    unit = benchmark.unit if loss is benchmark.loss else 1.0
    runner = PEERS[cell.peer](model, Request(cell.task, loss, cell.lr, cell.schedule, steps, cell.options))
    aims = aiming(loss, source.facts.classes, device)
    training = TrainingStep(model, lambda outputs, labels: loss(outputs, aims(labels)), runner, benchmark.half)
    record = torch.full((3, steps), math.nan, device=device)
    judge = Judge(model, loss, unit, aims, training, source, batch)
    model.train()
    begun, done, seen = time.perf_counter(), 0, []
    for index, (inputs, labels) in zip(range(steps), source.batches(batch, cell.seed), strict=False):
        try:
            value, accuracy = training(inputs, labels)
        except NonFiniteGradient:
            break
        record[0, index] = unit * value
        record[1, index] = accuracy
        eta = _eta(runner)
        if eta is not None:
            record[2, index] = eta
        done = index + 1
        if index % 100 == 99 and not math.isfinite(float(record[0, index])):
            break
        if benchmark.looks and done < steps and done % max(1, steps // benchmark.looks) == 0:
            with runner.averaged():
                seen.append([done, *judge.held_out()])
            model.train()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begun
    record = record.cpu()
    # where a step cannot raise, it is left out and counted
    skipped = getattr(getattr(runner.optimizers[0], "current", None), "skipped", 0)
    diverged = done < steps or not bool(record[:2].isfinite().all()) or int(skipped) > 0
    last = record[:, -max(1, steps // 10) :].mean(1).tolist()
    outcome: dict[str, Any] = {
        "diverged": diverged,
        "steps": steps,
        "seconds": round(seconds, 2),
        "step_ms": round(1e3 * statistics.median(runner.seconds), 3) if runner.seconds else 0.0,
        "total_ms": round(1e3 * seconds / max(1, done), 3),
        "train_loss": _finite(last[0]),
        "train_accuracy": _finite(last[1]),
        "curve": _curve(record),
        "state": runner.numbers(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "looks": seen,
    }
    with runner.averaged():
        renew(model, training, source, batch)
        end = judge.training() if not diverged else (None, None)
        held = judge.held_out() if not diverged else (None, None)
    return outcome | {"end_loss": end[0], "end_accuracy": end[1], "val_loss": held[0], "val_accuracy": held[1]}


def _eta(runner: Runner) -> torch.Tensor | None:
    current = getattr(runner.optimizers[0], "current", None)
    return None if current is None else current.eta


def renew(model: Any, training: TrainingStep, source: Task, batch: int, passes: int = 50) -> None:
    """Running statistics for the weights that are about to be evaluated; nothing without batch norm."""
    if any(True for _ in model.buffers()):
        model.train()
        with torch.no_grad(), training.precision():
            for _, (inputs, _labels) in zip(range(passes), source.batches(batch, EVALUATION_SEED + 1), strict=False):
                model(inputs)


@dataclass(frozen=True)
class Judge:
    """Evaluates a model as it is.

    Args:
        model: to evaluate.
        loss: of outputs and targets.
        unit: what the loss is multiplied with to be told.
        aims: targets of labels.
        step: in whose precision.
        source: the data.
        batch: samples at once, of training samples.
    """

    model: Any
    loss: Any
    unit: float
    aims: Any
    step: TrainingStep
    source: Task
    batch: int

    def training(self) -> tuple[float | None, float | None]:
        """Loss and accuracy on fixed training samples."""
        window = self.source.facts.context if isinstance(self.source.facts, TextFacts) else 1
        count = max(1, TRAINING_SAMPLES // (self.batch * window))
        batches = self.source.batches(self.batch, EVALUATION_SEED)
        return self._evaluation(found for _, found in zip(range(count), batches, strict=False))

    def held_out(self) -> tuple[float | None, float | None]:
        """Loss and accuracy on the held-out split."""
        return self._evaluation(self.source.evaluation(256))

    def _evaluation(self, batches: Iterator[Any]) -> tuple[float | None, float | None]:
        self.model.eval()
        count, sums = 0, torch.zeros(2, dtype=torch.float64, device=self.source.device)
        with torch.no_grad():
            for inputs, labels in batches:
                with self.step.precision():
                    outputs = self.model(inputs)
                sums[0] += self.unit * self.loss(outputs.float(), self.aims(labels)) * labels.numel()
                sums[1] += (outputs.argmax(-1) == labels).sum()
                count += labels.numel()
        value, hits = (sums / count).tolist()
        return _finite(value), hits


def _curve(record: torch.Tensor) -> dict[str, list[float | None]]:
    parts = record.tensor_split(min(POINTS, record.shape[1]), dim=1)
    ends = torch.tensor([part.shape[1] for part in parts]).cumsum(0)
    means = torch.stack([part.mean(1) for part in parts], 1).tolist()
    rows = {"step": ends.tolist(), "train_loss": means[0], "eta": means[2]}
    return {name: [_finite(value) for value in row] for name, row in rows.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
