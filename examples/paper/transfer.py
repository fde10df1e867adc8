"""Transfer in the manner of Modula: does the best multiplier of the derived step stay put as a network grows?

Each cell, a width and a number of residual blocks, is trained at every multiplier 2^k of a method's own step; the best one is
the one of least training loss. The claim: along either axis the best multipliers stay within a factor of 2
(Large et al. 2024, arXiv:2405.14813, whose networks have the same convex residual form).

python examples/paper/transfer.py --data-dir DIR [--size full] [--method exact]
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import Cell, Source, load, measure, parser, start, sweep
from matplotlib.figure import Figure
from results import Results, logarithmic, mean, numbers

from modula_agd import METHODS, Logits, Module, ResMLP
from modula_agd.train import LOSSES

FIGURE = "transfer"
ENDS = (-10, 10)
"""How far a cell's multipliers 2^k may grow beyond the size's own, until its best is interior."""
Losses = Mapping[int, float | None]
Swept = tuple[int, Losses, bool]


@dataclass(frozen=True)
class Size:
    """How large.

    Args:
        width: hidden features of the smallest network.
        blocks: residual blocks of the smallest network.
        epochs: passes over the data.
        factors: by how much each of the two grows, the first of them 1.
        exponents: k of the multipliers 2^k that every cell is trained at, in ascending order.
        batch_size: samples per step.
    """

    width: int
    blocks: int
    epochs: int
    factors: tuple[int, ...] = (1, 2, 4, 8)
    exponents: tuple[int, ...] = tuple(range(-4, 5))
    batch_size: int = 128


SIZES = {"cpu": Size(32, 2, 1), "full": Size(128, 2, 10)}


def run(
    source: Source,
    size: Size,
    seeds: Sequence[int],
    results: Results,
    method: str = "agd",
    loss: str = "unhalved-square",
) -> list[Mapping[str, Any]]:
    """Sweep the multiplier in every cell.

    Args:
        source: the data.
        size: the cells and the multipliers.
        seeds: one run of each cell and multiplier per seed.
        results: where to keep the runs.
        method: a name of ``METHODS``.
        loss: a name of ``LOSSES``.
    """
    # as in the command: cross-entropy's bound is proved in the norm of Logits, a space that AGD as published does not know
    outputs = Logits(source.facts.classes) if loss == "cross-entropy" and method != "agd" else source.facts.classes
    cells = {("width", size.width * factor, size.blocks) for factor in size.factors}
    cells |= {("blocks", size.width, size.blocks * factor) for factor in size.factors}
    swept: dict[tuple[int, int], Swept] = {}
    for _, width, blocks in sorted(cells):
        network = ResMLP(outputs, width, source.facts.features, blocks)
        words = f"residual, {blocks} blocks, width {width}"
        base = Cell(source.facts.name, source.samples, words, method, 1.0, loss, size.batch_size, size.epochs, 0)

        def loss_at(k: int, network: Module = network, base: Cell = base) -> float | None:
            runs = [replace(base, lr=2.0**k, seed=seed) for seed in seeds]
            # nothing here is about generalisation: the held-out samples are not looked at
            return mean([measure(run, network, source, results, test=False) for run in runs], "train_loss")

        swept[width, blocks] = sweep(size.exponents, loss_at, ENDS)
    first = swept[size.width, size.blocks]
    rows = [_row(axis, width, blocks, swept[width, blocks], first) for axis, width, blocks in sorted(cells)]
    facts = [verdict(axis, [row for row in rows if row["grows"] == axis]) for axis in ("width", "blocks")]
    results.draw(draw(rows, method))
    settings = {"method": method, "loss": loss, "data": source.facts.name, "epochs": size.epochs, "seeds": list(seeds)}
    return results.finish(settings, rows, facts)


def _row(axis: str, width: int, blocks: int, swept: Swept, first: Swept) -> dict[str, Any]:
    here, losses, interior = swept
    told = {
        "loss at the best": losses[here],
        "loss at × 1": losses.get(0),
        "loss at the smallest network's best": losses.get(first[0]),
    }
    found = losses[here] is not None
    return {
        "grows": axis,
        "width": width,
        "blocks": blocks,
        "best multiplier": (f"{2.0**here:g}" if interior else f"{2.0**here:g}, at the edge") if found else "none",
        **{name: "diverged" if loss is None else f"{loss:.4f}" for name, loss in told.items()},
        "_best": here if found else None,
        "_interior": interior,
        "_losses": {f"{2.0**k:g}": loss for k, loss in losses.items()},
    }


def verdict(axis: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the best multipliers along an axis stay within a factor of 2.

    Args:
        axis: what grows.
        rows: the cells along it.
    """
    exponents = [row["_best"] for row in rows]
    if None in exponents:
        return f"{axis}: undecided, some cell diverged at every multiplier."
    low, high = min(exponents), max(exponents)
    told = f"{axis}: best multipliers from {2.0**low:g} to {2.0**high:g}, a factor of {2 ** (high - low)}"
    if high - low > 1:
        return f"{told}: the claim of a factor of at most 2 fails."
    if not all(row["_interior"] for row in rows):
        return f"{told}: undecided, a best lies at the edge of its grid."
    return f"{told}: the claim of a factor of at most 2 holds."


def draw(rows: Sequence[Mapping[str, Any]], method: str) -> Figure:
    """Training loss over k of the multiplier 2^k, a panel per axis, a line per cell, its best marked."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, axis in zip(panels, ("width", "blocks"), strict=True):
        for position, row in enumerate(row for row in rows if row["grows"] == axis):
            exponents = [math.log2(float(multiplier)) for multiplier in row["_losses"]]
            axes.plot(exponents, numbers(row["_losses"].values()), ".-", color=f"C{position}", label=str(row[axis]))
            if row["_best"] is not None:
                axes.plot([row["_best"]], [row["_losses"][f"{2.0 ** row['_best']:g}"]], "o", color=f"C{position}")
        axes.set(title=f"{method}: growing {axis}", xlabel="log2 of the step's multiplier", ylabel="training loss")
        axes.grid(alpha=0.3)
        axes.legend(title=axis)
    logarithmic(*panels)
    return figure


def main(options: argparse.Namespace) -> None:
    size = SIZES[options.size]
    size = replace(size, epochs=options.epochs) if options.epochs else size
    results = Results(Path(options.out), f"{FIGURE}_{options.method}")
    if options.fresh:
        results.drop()
    run(load(options.data, options), size, options.seeds, results, options.method, options.loss)


if __name__ == "__main__":
    made = parser(str(__doc__))
    made.add_argument("--method", choices=list(METHODS), default="agd", help="(default: agd)")
    made.add_argument("--loss", choices=list(LOSSES), default="unhalved-square", help="(default: unhalved-square)")
    sys.exit(start(main, made))
