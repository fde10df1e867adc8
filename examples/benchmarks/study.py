"""The study: every task, every peer with its defaults and over grids of learning rates, and this library's default.

python examples/benchmarks/study.py --data-dir DIR [--tasks fcn chargpt] [--seeds 0 1 2] [--device cuda --processes 12]

Every finished run is a line of ``--out``; the same command goes on from the lines that are there, and several processes may
share the file. ``report.py`` makes the tables and plots of it.
"""

import argparse
import fcntl
import json
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from passes import TrainingStep
from peers import GRIDS, OURS, PEERS, SCHEDULED, Request, Runner
from tasks import TASKS, Benchmark

from modula_agd import NonFiniteGradient, UnhalvedSquareLoss
from modula_agd.train import Task
from modula_agd.train.facts import TextFacts
from modula_agd.train.objective import aiming

POINTS = 60
TRAINING_SAMPLES = 8192
"""Training samples on which the final weights are evaluated."""
EVALUATION_SEED = 20_000
START = {"sgd": -3, "adam": -6, "adamw": -5, "muon": -5}
"""Where each grid begins, in half-decades."""


@dataclass(frozen=True)
class Cell:
    """One run, by all that determines it.

    Args:
        task: a name of ``TASKS``.
        peer: a name of ``PEERS``.
        lr: learning rate (of this library: the multiplier); None for the default.
        schedule: "constant" or "cosine".
        seed: of weights and batches.
        scale: budget as a multiple of the task's own.
        batch: in place of the task's own.
        width: multiple of the task's own.
        depth: multiple of the task's own.
        options: of this library's method.
    """

    task: str
    peer: str
    lr: float | None = None
    schedule: str = "constant"
    seed: int = 0
    scale: float = 1.0
    batch: int | None = None
    width: int = 1
    depth: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        rate = "default" if self.lr is None else f"{self.lr:.3g}"
        rest = "".join(f" {k}={v}" for k, v in self.options.items())
        sized = f" batch {self.batch}" if self.batch else ""
        sized += f" width×{self.width} depth×{self.depth}" if (self.width, self.depth) != (1, 1) else ""
        return f"{self.task} {self.peer} {rate} {self.schedule} seed {self.seed} ×{self.scale:g}{sized}{rest}"


class Store:
    """Finished runs, one JSON line each; safe to share between processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """All that is there."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return [json.loads(line) for line in file if line.strip()]

    def outcome(self, cell: Cell) -> dict[str, Any] | None:
        """The outcome of an equal cell."""
        wanted = json.loads(json.dumps(asdict(cell)))
        return next((row["outcome"] for row in self.rows() if row["cell"] == wanted), None)

    def add(self, cell: Cell, outcome: dict[str, Any], made: dict[str, Any]) -> None:
        """Keep a run, and what it was made on."""
        row = {"cell": asdict(cell), "outcome": outcome, "made": made}
        with self.path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(row, allow_nan=False) + "\n")


def circumstances(device: torch.device) -> dict[str, Any]:
    """On what and when."""
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
    }


@dataclass(frozen=True)
class Bench:
    """A task with its data in memory.

    Args:
        benchmark: the task.
        source: its data.
        store: where runs are kept.
    """

    benchmark: Benchmark
    source: Task
    store: Store

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The outcome of a cell, from the file or from a run."""
        found = self.store.outcome(cell)
        if found is None:
            found = run(cell, self.benchmark, self.source)
            self.store.add(cell, found, circumstances(self.source.device))
            print(f"{cell}: {shown(found)}", flush=True)
        return found


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
    loss = benchmark.loss if cell.peer == OURS or benchmark.unit == 1 else UnhalvedSquareLoss()
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


def sweep(bench: Bench, base: Cell) -> float:
    """Search a grid of half-decades until the best training loss is interior; the best rate."""
    losses: dict[int, float] = {}

    def look(exponent: int) -> None:
        found = bench.measure(replace(base, lr=rate(exponent)))
        losses[exponent] = math.inf if found["diverged"] else found["train_loss"]

    start = START[base.peer]
    for exponent in (start - 1, start, start + 1):
        look(exponent)
    while True:
        best = min(losses, key=lambda exponent: (losses[exponent], exponent))
        further = {min(losses): min(losses) - 1, max(losses): max(losses) + 1}.get(best)
        if further is None or not -14 <= further <= 6:
            return rate(best)
        look(further)


def rate(exponent: int) -> float:
    """10^(exponent/2)."""
    return float(f"{10 ** (exponent / 2):.3g}")


@dataclass(frozen=True)
class Job:
    """Runs that follow on each other.

    Args:
        base: the first of them, or the one whose rate is searched for.
        seeds: of the final runs.
        search: whether its rate is searched for, at the base's seed.
    """

    base: Cell
    seeds: tuple[int, ...]
    search: bool = False

    def perform(self, bench: Bench) -> None:
        """Every run of it."""
        cell = replace(self.base, lr=sweep(bench, self.base)) if self.search else self.base
        for seed in self.seeds:
            bench.measure(replace(cell, seed=seed))


def jobs(base: Cell, plan: argparse.Namespace) -> list[Job]:
    """All that the arguments ask for of one task; the longest first."""
    seeds = tuple(plan.seeds)
    found: list[Job] = []
    if "grids" in plan.groups:
        for wanted in plan.grids:
            peer = "adamw" if wanted == "adam" and base.task.startswith("chargpt") else wanted
            cells = [replace(base, peer=peer, schedule=schedule) for schedule in plan.schedules]
            found += [Job(cell, seeds, search=True) for cell in cells]
    if "ours" in plan.groups:
        found += [Job(base, (seed,)) for seed in seeds]
    if "defaults" in plan.groups:
        others = [peer for peer in PEERS if peer not in (OURS, *plan.skip)]
        cells = [replace(base, peer=p, schedule="cosine" if p in SCHEDULED else "constant") for p in others]
        found += [Job(cell, (seed,)) for cell in cells for seed in seeds]
    return found


def perform(job: Job, plan: argparse.Namespace) -> None:
    """A job, on the data that this process holds."""
    name = job.base.task
    source = _held(name, plan.data_dir, plan.device)
    job.perform(Bench(TASKS[name], source, Store(plan.out)))


@cache
def _loaded(name: str, folder: Path | None) -> Task:
    return TASKS[name].source(folder, "cpu")


@cache
def _held(name: str, folder: Path | None, device: str) -> Task:
    source = _loaded(name, folder)
    return source if device == "cpu" else source.to(device)  # pyright: ignore[reportAttributeAccessIssue]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    usual = [name for name, benchmark in TASKS.items() if not benchmark.large]
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=usual, help=f"default: {' '.join(usual)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="budget as a multiple of each task's own")
    parser.add_argument(
        "--groups", nargs="+", choices=["ours", "grids", "defaults"], default=["ours", "grids", "defaults"]
    )
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS), help="whose rates are searched for")
    parser.add_argument("--schedules", nargs="+", choices=["cosine", "constant"], default=["cosine", "constant"])
    parser.add_argument("--skip", nargs="+", choices=list(PEERS), default=[], help="peers left out of the defaults")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/study.jsonl"))
    return parser.parse_args()


def work(everything: list[Job], plan: argparse.Namespace) -> None:
    """All jobs, ``plan.processes`` at a time."""
    torch.set_num_threads(plan.threads)
    if plan.processes == 1:
        for job in everything:
            perform(job, plan)
        return
    for name in dict.fromkeys(job.base.task for job in everything):
        _loaded(name, plan.data_dir)
    # forked, so that the data are decoded once; nothing has touched the accelerator yet
    with ProcessPoolExecutor(plan.processes, multiprocessing.get_context("fork")) as pool:
        for future in [pool.submit(perform, job, plan) for job in everything]:
            future.result()


def main() -> None:
    options = arguments()
    work([job for name in options.tasks for job in jobs(Cell(name, OURS, scale=options.scale), options)], options)


if __name__ == "__main__":
    main()
