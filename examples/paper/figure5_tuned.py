"""Figure 5 of the AGD paper: AGD against Adam and SGD, each over a grid of learning rates whose best is interior.

python examples/paper/figure5_tuned.py --data-dir DIR [--size full] [--depth 8 --width 256]
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import PAPERS_OWN, Cell, Source, load, measure, parser, rate, start, sweep
from matplotlib.figure import Figure
from results import Results, logarithmic, mean, numbers, shown

from modula_agd import MLP

FIGURE = "figure5_tuned"
GRIDS = {"adam": (-8, -7, -6), "sgd": (-3, -2, -1)}
"""Half-decades at which each sweep begins."""


@dataclass(frozen=True)
class Size:
    """How large.

    Args:
        depth: Linear layers.
        width: hidden features.
        epochs: passes over the data.
        batch_size: samples per step.
    """

    depth: int
    width: int
    epochs: int
    batch_size: int = 128


# Depth 8 and width 256 are what the paper plots in this figure; of depth 16 and width 512 it states the test accuracies.
SIZES = {"cpu": Size(8, 256, 3), "full": Size(16, 512, 60)}
PUBLISHED = {(16, 512): {"agd": 52.7, "adam": 53.5}}


def run(source: Source, size: Size, seeds: Sequence[int], results: Results) -> list[Mapping[str, Any]]:
    """Sweep both baselines and compare them with AGD as published."""
    network = MLP(source.facts.classes, size.width, source.facts.features, size.depth)
    base = Cell(
        source.facts.name,
        source.samples,
        f"fully connected, depth {size.depth}, width {size.width}",
        "agd",
        1.0,
        "unhalved-square",
        size.batch_size,
        size.epochs,
        0,
    )

    def outcomes(optimizer: str, lr: float) -> list[Mapping[str, Any]]:
        cells = [replace(base, optimizer=optimizer, lr=lr, seed=seed) for seed in seeds]
        return [measure(cell, network, source, results) for cell in cells]

    published = PUBLISHED.get((size.depth, size.width), {}) if source.facts.name == PAPERS_OWN else {}
    best_of = {"agd": outcomes("agd", 1.0)}
    rows = [_row("agd", "derived", best_of["agd"], "", published.get("agd"))]
    facts = []
    for optimizer, grid in GRIDS.items():
        best, losses, interior = sweep(grid, lambda k, who=optimizer: mean(outcomes(who, rate(k)), "train_loss"))
        best_of[optimizer] = outcomes(optimizer, rate(best))
        for exponent in losses:
            chosen = exponent == best
            mark = ("best" if interior else "best, at the edge") if chosen else ""
            told = published.get(optimizer) if chosen else None
            rows.append(_row(optimizer, f"{rate(exponent):.2g}", outcomes(optimizer, rate(exponent)), mark, told))
        facts.append(f"{optimizer}: the best rate {rate(best):.2g} is {'interior' if interior else 'not interior'}.")
    facts.append("The best of a grid is the one of least training loss, the mean of the last tenth of the steps.")
    results.draw(draw(best_of))
    settings = {
        "network": base.network,
        "data": source.facts.name,
        "epochs": size.epochs,
        "batch size": size.batch_size,
    }
    return results.finish(settings | {"seeds": list(seeds)}, rows, facts)


def _row(
    optimizer: str, lr: str, outcomes: Sequence[Mapping[str, Any]], mark: str, published: float | None
) -> dict[str, Any]:
    return {
        "method": optimizer,
        "learning rate": lr,
        "train loss": shown(outcomes, "train_loss"),
        "train accuracy": shown(outcomes, "train_accuracy", percent=True),
        "test accuracy": shown(outcomes, "test_accuracy", percent=True),
        "grid": mark,
        "published": "—" if published is None else f"{published}%",
        "_train_loss": mean(outcomes, "train_loss"),
        "_test_accuracy": mean(outcomes, "test_accuracy"),
    }


def draw(best_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training loss and η over epochs, a line per seed; the best rate of each baseline."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    loss, eta = figure.subplots(1, 2)
    for position, (optimizer, outcomes) in enumerate(best_of.items()):
        for index, outcome in enumerate(outcomes):
            curve = outcome["curve"]
            style = {"color": f"C{position}", "label": optimizer if index == 0 else None}
            loss.plot(curve["epoch"], numbers(curve["train_loss"]), **style)
            eta.plot(curve["epoch"], numbers(curve["eta"]), **style)
    loss.set(title="Training loss", xlabel="epoch", ylabel="mean of (f − y)²")
    eta.set(title="η of AGD, learning rate of the others", xlabel="epoch")
    for axes in (loss, eta):
        logarithmic(axes)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main(options: argparse.Namespace) -> None:
    own = {key: value for key in ("depth", "width", "epochs") if (value := getattr(options, key)) is not None}
    results = Results(Path(options.out), FIGURE)
    if options.fresh:
        results.drop()
    run(load(options.data, options), replace(SIZES[options.size], **own), options.seeds, results)


if __name__ == "__main__":
    made = parser(str(__doc__))
    made.add_argument("--depth", type=int, metavar="N", help="Linear layers, in place of the size's own")
    made.add_argument("--width", type=int, metavar="N", help="hidden features, in place of the size's own")
    sys.exit(start(main, made))
