"""Figure 7 of the AGD paper: AGD on a four-layer fully-connected network at batch sizes 32 to 4096.

python examples/paper/figure7_batch.py --data-dir DIR [--size full]
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import PAPERS_OWN, Cell, Source, load, measure, parser, start
from matplotlib.figure import Figure
from results import Results, logarithmic, mean, numbers, shown

from modula_agd import MLP

FIGURE = "figure7_batch"


@dataclass(frozen=True)
class Size:
    """How large.

    Args:
        batch_sizes: samples per step.
        epochs: passes over the data.
        depth: Linear layers.
        width: hidden features.
    """

    batch_sizes: tuple[int, ...]
    epochs: int
    depth: int = 4
    width: int = 256


# The paper states four layers, but neither their width nor the epochs: both are this project's choice.
SIZES = {"cpu": Size((32, 128, 512, 4096), 3), "full": Size((32, 128, 512, 4096), 60, width=1024)}
PUBLISHED = {32: 55.0, 128: 58.0, 512: 60.0, 4096: 59.8}


def run(source: Source, size: Size, seeds: Sequence[int], results: Results) -> list[Mapping[str, Any]]:
    """Train at every batch size."""
    network = MLP(source.facts.classes, size.width, source.facts.features, size.depth)
    words = f"fully connected, depth {size.depth}, width {size.width}"
    rows, by_batch = [], {}
    published = PUBLISHED if source.facts.name == PAPERS_OWN else {}
    for batch in size.batch_sizes:
        base = Cell(source.facts.name, source.samples, words, "agd", 1.0, "unhalved-square", batch, size.epochs, 0)
        outcomes = [measure(replace(base, seed=seed), network, source, results) for seed in seeds]
        by_batch[batch] = outcomes
        rows.append(
            {
                "batch size": batch,
                "steps": outcomes[0]["steps"],
                "train loss": shown(outcomes, "train_loss"),
                "train accuracy": shown(outcomes, "train_accuracy", percent=True),
                "test accuracy": shown(outcomes, "test_accuracy", percent=True),
                "published": f"{published[batch]}%" if batch in published else "—",
                "_train_loss": mean(outcomes, "train_loss"),
                "_test_accuracy": mean(outcomes, "test_accuracy"),
            }
        )
    results.draw(draw(by_batch))
    settings = {"network": words, "data": source.facts.name, "epochs": size.epochs, "seeds": list(seeds)}
    return results.finish(settings, rows, ["At equal epochs a larger batch makes fewer steps."])


def draw(by_batch: Mapping[int, Sequence[Mapping[str, Any]]]) -> Figure:
    """η, training loss and training accuracy over epochs, a line per seed; dots are final test accuracies."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    fields = {"eta": "η", "train_loss": "training loss", "train_accuracy": "training accuracy (dot: test)"}
    for axes, (name, title) in zip(panels, fields.items(), strict=True):
        for position, (batch, outcomes) in enumerate(by_batch.items()):
            for index, outcome in enumerate(outcomes):
                curve = outcome["curve"]
                label = str(batch) if index == 0 else None
                axes.plot(curve["epoch"], numbers(curve[name]), color=f"C{position}", label=label)
                if name == "train_accuracy" and outcome["test_accuracy"] is not None:
                    axes.plot(curve["epoch"][-1:], [outcome["test_accuracy"]], "o", color=f"C{position}")
        axes.set(title=title, xlabel="epoch")
        if name != "train_accuracy":
            logarithmic(axes)
        axes.grid(alpha=0.3)
    panels[0].legend(title="batch size")
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
