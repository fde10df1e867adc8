"""Figure 6 of the AGD paper: AGD on fully-connected networks of every depth and width.

python examples/paper/figure6_depth_width.py --data-dir DIR [--size full]
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import PAPERS_OWN, Cell, Source, load, measure, parser, start
from matplotlib.figure import Figure
from results import Results, mean, shown

from modula_agd import MLP

FIGURE = "figure6_depth_width"


@dataclass(frozen=True)
class Size:
    """How large.

    Args:
        depths: numbers of Linear layers.
        widths: numbers of hidden features.
        epochs: passes over the data.
        batch_size: samples per step.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    epochs: int
    batch_size: int = 128


# The paper does not state its number of epochs; 60 is this project's choice.
SIZES = {
    "cpu": Size((2, 4, 8, 16, 32), (64, 128, 256), 2),
    "full": Size((2, 4, 8, 16, 32), (64, 128, 256, 512, 1024, 2048), 60),
}
PUBLISHED = {(4, 2048): 63.7, (2, 64): 42.55}
"""Test accuracies that the paper states, its best and its worst."""


def run(source: Source, size: Size, seeds: Sequence[int], results: Results) -> list[Mapping[str, Any]]:
    """Train every cell."""
    rows, published = [], PUBLISHED if source.facts.name == PAPERS_OWN else {}
    for depth in size.depths:
        for width in size.widths:
            network = MLP(source.facts.classes, width, source.facts.features, depth)
            base = Cell(
                source.facts.name,
                source.samples,
                f"fully connected, depth {depth}, width {width}",
                "agd",
                1.0,
                "unhalved-square",
                size.batch_size,
                size.epochs,
                0,
            )
            outcomes = [measure(replace(base, seed=seed), network, source, results) for seed in seeds]
            rows.append(
                {
                    "depth": depth,
                    "width": width,
                    "train loss": shown(outcomes, "train_loss"),
                    "train accuracy": shown(outcomes, "train_accuracy", percent=True),
                    "test accuracy": shown(outcomes, "test_accuracy", percent=True),
                    "published": f"{published[depth, width]}%" if (depth, width) in published else "—",
                    "_train_loss": mean(outcomes, "train_loss"),
                    "_train_accuracy": mean(outcomes, "train_accuracy"),
                    "_test_accuracy": mean(outcomes, "test_accuracy"),
                }
            )
    results.draw(draw(rows, size))
    settings = {"data": source.facts.name, "epochs": size.epochs, "batch size": size.batch_size, "seeds": list(seeds)}
    return results.finish(settings, rows)


def draw(rows: Sequence[Mapping[str, Any]], size: Size) -> Figure:
    """Heat maps of training and test accuracy; a cell that diverged stays white."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    cells = {(row["depth"], row["width"]): row for row in rows}
    for axes, what in zip(figure.subplots(1, 2), ("train", "test"), strict=True):
        values = [[cells[depth, width][f"_{what}_accuracy"] for width in size.widths] for depth in size.depths]
        shares = [[math.nan if value is None else 100 * value for value in line] for line in values]
        image = axes.imshow(shares, origin="lower", cmap="viridis", aspect="auto")
        for y, line in enumerate(shares):
            for x, value in enumerate(line):
                if not math.isnan(value):
                    colour = "white" if image.norm(value) < 0.6 else "black"
                    axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=colour, fontsize="small")
        axes.set(title=f"AGD, {what} accuracy (%)", xlabel="width", ylabel="depth")
        axes.set_xticks(range(len(size.widths)), [str(width) for width in size.widths])
        axes.set_yticks(range(len(size.depths)), [str(depth) for depth in size.depths])
        figure.colorbar(image, ax=axes)
    return figure


def main(options: argparse.Namespace) -> None:
    size = SIZES[options.size]
    size = replace(size, epochs=options.epochs) if options.epochs else size
    results = Results(Path(options.out), FIGURE)
    if options.fresh:
        results.drop()
    run(load(options.data, options), size, options.seeds, results)


if __name__ == "__main__":
    sys.exit(start(main, parser(str(__doc__))))
