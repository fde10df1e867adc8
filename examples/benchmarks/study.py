"""The study: every task, every peer with its defaults and over grids of learning rates, and this library's default.

python examples/benchmarks/study.py --data-dir DIR [--tasks fcn chargpt] [--seeds 0 1 2] [--device cuda --processes 12]

Every finished run is a line of ``--out``; the same command goes on from the lines that are there, and several processes may
share the file. ``report.py`` makes the tables and plots of it.
"""

import argparse
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Store, circumstances
from measuring import run, shown
from peers import GRIDS, OURS, OWN, PEERS, SCHEDULED
from tasks import TASKS, USUAL, Benchmark

from modula_agd.train import Task

START = {"sgd": -3, "adam": -6, "adamw": -5, "muon": -5}
"""Where each grid begins, in half-decades."""


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
        found += [Job(replace(base, peer=own), (seed,)) for own in OWN for seed in seeds]
    if "defaults" in plan.groups:
        others = [peer for peer in PEERS if peer not in (*OWN, *plan.skip)]
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
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=USUAL, help=f"default: {' '.join(USUAL)}")
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
