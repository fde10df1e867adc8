"""Figure 4 of the AGD paper: AGD against tuned Adam and SGD on pairs of a network and a data set.

python examples/paper/figure4_benchmark.py --data-dir DIR [--size full] [--pairs resnet18-cifar10 ...]
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import BASELINES, Cell, Source, load, measure, parser, rate, start, sweep
from matplotlib.figure import Figure
from results import Results, logarithmic, mean, numbers, shown

import modula_agd
from modula_agd import MLP, Module
from modula_agd.error import InvalidArgument

FIGURE = "figure4_benchmark"


@dataclass(frozen=True)
class Pair:
    """A network on a data set.

    Args:
        data: name of the data set.
        network: the architecture with its sizes, in words.
        build: the network for a number of classes and a number of features or channels.
        loss: a name of ``LOSSES``; the paper takes square loss but on ImageNet.
        batch_size: samples per step.
        epochs: passes over the data.
        grids: half-decades at which the sweep of each baseline's learning rate begins; a single one is not swept.
        published: test accuracies of the paper, in per cent.
        augment: pad, crop and flip.
        flat: whether the network takes features rather than channels.
    """

    data: str
    network: str
    build: Callable[[int, int], Module]
    loss: str
    batch_size: int
    epochs: int
    grids: Mapping[str, tuple[int, ...]]
    published: Mapping[str, float]
    augment: bool = False
    flat: bool = False


SWEPT = {"adam": (-8, -7, -6), "sgd": (-3, -2, -1)}
# The paper gives epochs for ImageNet alone; elsewhere they are this project's choice (60).
PAIRS: dict[str, dict[str, Pair]] = {
    "cpu": {
        "fcn-cifar10": Pair(
            "cifar10",
            "fully connected, depth 8, width 256",
            lambda classes, inputs: MLP(classes, 256, inputs, 8),
            "unhalved-square",
            128,
            3,
            SWEPT,
            {},
            flat=True,
        ),
        "resnet8-cifar10": Pair(
            "cifar10",
            "ResNet8, 16-32-64 channels",
            lambda classes, channels: modula_agd.ResNet8(classes, channels),
            "unhalved-square",
            128,
            2,
            SWEPT,
            {},
        ),
    },
    "full": {
        "fcn-cifar10": Pair(
            "cifar10",
            "fully connected, depth 16, width 512",
            lambda classes, inputs: MLP(classes, 512, inputs, 16),
            "unhalved-square",
            128,
            60,
            SWEPT,
            {"agd": 52.7, "adam": 53.5},
            flat=True,
        ),
        "resnet18-cifar10": Pair(
            "cifar10",
            "ResNet18",
            lambda classes, channels: modula_agd.ResNet18(classes, channels),
            "unhalved-square",
            128,
            60,
            SWEPT,
            {"agd": 91.2, "adam": 92.9, "sgd": 93.0},
            augment=True,
        ),
        "vgg16-cifar100": Pair(
            "cifar100",
            "VGG16",
            lambda classes, channels: modula_agd.VGG16(classes, channels),
            "unhalved-square",
            128,
            60,
            SWEPT,
            {"agd": 67.4, "adam": 69.7},
            augment=True,
        ),
        "resnet50-imagenet": Pair(
            "imagenet",
            "ResNet50, ImageNet stem",
            lambda classes, channels: modula_agd.ResNet50(classes, channels, stem="imagenet"),
            "cross-entropy",
            1024,
            350,
            # the paper's one baseline there: SGD at 0.1, neither tuned nor decayed
            {"sgd": (-2,)},
            {"agd": 65.5},
            augment=True,
        ),
    },
}


def run(
    pairs: Mapping[str, Pair], load_data: Callable[[str], Source], seeds: Sequence[int], results: Results
) -> list[Mapping[str, Any]]:
    """Train every pair with AGD as published and with each baseline, its rate chosen by training loss.

    Args:
        pairs: by name.
        load_data: a data set from its name.
        seeds: one run of each cell per seed.
        results: where to keep the runs.
    """
    rows, curves = [], {}
    for name, pair in pairs.items():
        source = load_data(pair.data)
        network = pair.build(source.facts.classes, source.facts.features if pair.flat else source.facts.shape[0])
        base = Cell(
            pair.data,
            source.samples,
            pair.network,
            "agd",
            1.0,
            pair.loss,
            pair.batch_size,
            pair.epochs,
            0,
            pair.augment,
        )

        def outcomes(
            optimizer: str, lr: float, base: Cell = base, network: Module = network, source: Source = source
        ) -> list[Any]:
            cells = [replace(base, optimizer=optimizer, lr=lr, seed=seed) for seed in seeds]
            return [measure(cell, network, source, results) for cell in cells]

        rows.append(_row(name, pair, "agd", outcomes("agd", 1.0), "derived"))
        curves[name, "agd"] = outcomes("agd", 1.0)[0]
        for optimizer, grid in pair.grids.items():
            best, losses, interior = sweep(
                grid, lambda k, of=outcomes, who=optimizer: mean(of(who, rate(k)), "train_loss")
            )
            chosen = outcomes(optimizer, rate(best))
            note = f"{rate(best):.2g}, " + (
                "fixed" if len(grid) == 1 else f"best of {len(losses)}" if interior else "edge of the grid"
            )
            rows.append(_row(name, pair, optimizer, chosen, note, losses))
            curves[name, optimizer] = chosen[0]
    results.draw(draw(list(pairs), curves))
    settings = {"pairs": ", ".join(pairs), "seeds": list(seeds), "epochs": [pair.epochs for pair in pairs.values()]}
    facts = ["Rates were chosen by training loss; all methods start from the same orthogonal weights."]
    return results.finish(settings, rows, facts)


def _row(
    name: str, pair: Pair, optimizer: str, outcomes: Sequence[Any], note: str, losses: Mapping[int, Any] | None = None
) -> dict[str, Any]:
    return {
        "pair": name,
        "method": optimizer,
        "learning rate": note,
        "train loss": shown(outcomes, "train_loss"),
        "train accuracy": shown(outcomes, "train_accuracy", percent=True),
        "test accuracy": shown(outcomes, "test_accuracy", percent=True),
        "published": f"{pair.published[optimizer]}%" if optimizer in pair.published else "—",
        "seconds": f"{mean(outcomes, 'seconds'):.0f}",
        "_train_loss": mean(outcomes, "train_loss"),
        "_test_accuracy": mean(outcomes, "test_accuracy"),
        "_grid": {f"{rate(k):.3g}": loss for k, loss in (losses or {}).items()},
    }


def draw(pairs: Sequence[str], curves: Mapping[tuple[str, str], Mapping[str, Any]]) -> Figure:
    """A column per pair: AGD's η, training loss, training accuracy with the final test accuracy as a dot."""
    figure = Figure(figsize=(4 * len(pairs), 9), layout="constrained")
    panels = figure.subplots(3, len(pairs), sharex="col", squeeze=False)
    for column, pair in enumerate(pairs):
        eta, loss, accuracy = panels[:, column]
        for (name, optimizer), outcome in curves.items():
            if name != pair:
                continue
            curve, colour = outcome["curve"], f"C{('agd', *BASELINES).index(optimizer)}"
            style = {"color": colour, "linestyle": "-" if optimizer == "agd" else "--", "label": optimizer}
            if optimizer == "agd":
                eta.plot(curve["epoch"], numbers(curve["eta"]), **style)
                low, high = (numbers(curve[key]) for key in ("eta_min", "eta_max"))
                eta.fill_between(curve["epoch"], low, high, color=colour, alpha=0.2)
            loss.plot(curve["epoch"], numbers(curve["train_loss"]), **style)
            accuracy.plot(curve["epoch"], numbers(curve["train_accuracy"]), **style)
            if outcome["test_accuracy"] is not None:
                accuracy.plot(curve["epoch"][-1:], [outcome["test_accuracy"]], "o", color=colour)
        eta.set(title=f"{pair}: η of AGD")
        loss.set(title="training loss")
        logarithmic(eta)
        logarithmic(loss)
        accuracy.set(title="training accuracy (dot: test)", xlabel="epoch")
        loss.legend()
        for axes in (eta, loss, accuracy):
            axes.grid(alpha=0.3)
    return figure


def main(options: argparse.Namespace) -> None:
    pairs = PAIRS[options.size]
    unknown = set(options.pairs or ()) - set(pairs)
    if unknown:
        raise InvalidArgument(
            f"--pairs was given {', '.join(sorted(unknown))}, which --size {options.size} does not have; choose among "
            f"{', '.join(pairs)}"
        )
    chosen = {name: pairs[name] for name in options.pairs or pairs}
    if options.epochs:
        chosen = {name: replace(pair, epochs=options.epochs) for name, pair in chosen.items()}
    results = Results(Path(options.out), FIGURE)
    if options.fresh:
        results.drop()
    run(chosen, lambda name: load(name, options), options.seeds, results)


if __name__ == "__main__":
    made = parser(str(__doc__), data=None)
    made.add_argument(
        "--pairs", nargs="+", metavar="PAIR", help=f"some of {', '.join({**PAIRS['cpu'], **PAIRS['full']})}"
    )
    sys.exit(start(main, made))
