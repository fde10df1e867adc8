"""What each choice of the default is worth, and how far it carries: cells of this library beside the study's.

python examples/benchmarks/ablations.py --data-dir DIR --what options|multiplier|batch|size|adamw [--tasks fcn] [--scale 0.2]

The rows go into the study's file; ``report.py`` prints them under Ablations.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from cells import Cell
from peers import OURS, OWN
from study import Job, work
from tasks import TASKS, USUAL

OPTIONS = {
    "naive": {"momentum": None},
    "frobenius": {"direction": "frobenius"},
    "momentum 0.8": {"momentum": 0.8},
    "momentum 0.9": {"momentum": 0.9},
    "momentum 0.98": {"momentum": 0.98},
    "smoothing 0.99": {"smoothing": 0.99},
    "declared": {"curvature": "declared"},
    "equal steps": {"balance": "declared"},
    "declared, relaxation 2": {"curvature": "declared", "relaxation": 2.0},
    "relaxation 1": {"relaxation": 1.0},
    "relaxation 2": {"relaxation": 2.0},
    "newest step": {"step_average": None},
    "steps of the last fifth": {"step_average": 4.0},
    "rows at full length": {"rows": "declared"},
    "nothing stretched": {"stretch": "declared"},
    "refresh 1": {"refresh": 1},
    "refresh 8": {"refresh": 8},
    "decay 0.03": {"decay": 0.03},
    "decay 0.1": {"decay": 0.1},
    "decay 0.4": {"decay": 0.4},
    "tracked": {"sizes": "tracked"},
    "proved": {"constants": "proved"},
    "magnitude 2": {"magnitude": 2.0},
    "closed form": {"search": "closed form"},
}
UNPROVED = ("cnn", "resnet18", "vgg16")
"""Tasks whose batch normalisation has no proved constant without a count of samples times positions."""
MULTIPLIERS = (0.1, 0.25, 0.5, 2.0, 4.0, 10.0)
BATCHES = (16, 64, 256, 1024, 4096)
ADAMW_RATES, ADAMW_DECAYS = (0.000316, 0.001, 0.00316), (0.1, 1.0)
SIZES = ((8, 1), (1, 8), (2, 1), (1, 2), (4, 1), (1, 4))


def cells(what: str, base: Cell, names: list[str] | None) -> list[Cell]:
    """The cells of one question."""
    if what == "options":
        known = [name for name in names or OPTIONS if name != "proved" or base.task not in UNPROVED]
        return [replace(base, options=OPTIONS[name]) for name in known]
    if what == "multiplier":
        return [base, *(replace(base, lr=multiplier) for multiplier in MULTIPLIERS)]
    if what == "batch":
        return [replace(base, batch=batch) for batch in BATCHES]
    if what == "adamw":
        # the study's grids search for a rate alone
        peer = replace(base, peer="adamw", schedule="cosine")
        return [replace(peer, lr=lr, options={"weight_decay": x}) for lr in ADAMW_RATES for x in ADAMW_DECAYS]
    return [replace(base, width=width, depth=depth) for width, depth in SIZES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--what", choices=["options", "multiplier", "batch", "size", "adamw"], required=True)
    parser.add_argument(
        "--peer", choices=OWN, default=OURS, help="which of this library's two rows (default: %(default)s)"
    )
    parser.add_argument("--names", nargs="+", choices=list(OPTIONS), help="of --what options (default: all)")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=USUAL)
    parser.add_argument("--scale", type=float, default=0.2, help="budget as a multiple of each task's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/study.jsonl"))
    options = parser.parse_args()
    everything = []
    for name in options.tasks:
        base = Cell(name, options.peer, scale=options.scale, seed=options.seed)
        everything += [Job(cell, (options.seed,)) for cell in [base, *cells(options.what, base, options.names)]]
    work(everything, options)


if __name__ == "__main__":
    main()
