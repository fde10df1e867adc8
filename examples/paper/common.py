"""What the scripts of this folder share: arguments, one training loop for any optimizer, sweeps."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from results import Results
from torch import Tensor

from modula_agd import AGD, METHODS, Features, Module
from modula_agd.command_line import INTERRUPTED, MISTAKE, Parser
from modula_agd.device import usable
from modula_agd.error import InvalidArgument, ModulaError, NonFiniteGradient
from modula_agd.torch_module import TorchModule
from modula_agd.train import LOSSES, Classification, classification
from modula_agd.train.facts import ImageFacts
from modula_agd.train.image_folder import IMAGENET, image_folder
from modula_agd.train.image_task import ImageTask
from modula_agd.train.objective import aiming
from modula_agd.train.stream_task import StreamTask
from modula_agd.train.task import Task

POINTS = 50
EVALUATION_BATCH = 1000
MOMENTUM = 0.9
EXPONENTS = (-14, 4)
"""Ends of every grid of learning rates, in half-decades: 1e-7 to 100."""

BASELINES: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "adam": lambda weights, lr: torch.optim.Adam(weights, lr=lr),
    "sgd": lambda weights, lr: torch.optim.SGD(weights, lr=lr, momentum=MOMENTUM),
}
"""Optimizers that need a learning rate; every other setting is torch's default."""


@dataclass(frozen=True)
class Cell:
    """One run, by all that determines it: runs of equal cells are not repeated.

    Args:
        data: name of the data set.
        samples: training samples, which tell a data set from another of its name.
        network: architecture with its sizes, in words.
        optimizer: a name of ``METHODS`` or of ``BASELINES``.
        lr: learning rate of a baseline; multiplier of a derived step, 1 as derived.
        loss: a name of ``LOSSES``.
        batch_size: samples per step, ≥ 1.
        epochs: passes over the training data, ≥ 1.
        seed: of the initial weights, the shuffles and the augmentation, ≥ 0.
        augment: whether training images are padded, cropped and flipped at random.
    """

    data: str
    samples: int
    network: str
    optimizer: str
    lr: float
    loss: str
    batch_size: int
    epochs: int
    seed: int
    augment: bool = False

    def __str__(self) -> str:
        return f"{self.network}, {self.optimizer} at {self.lr:.3g}, batch {self.batch_size}, seed {self.seed}"


def parser(about: str, *, data: str | None = "cifar10") -> argparse.ArgumentParser:
    """The arguments of every script; ``--data`` too, unless the script names its own data sets."""
    made = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--size", choices=("cpu", "full"), default="cpu", help="minutes on two cores, or a GPU's work")
    made.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    if data is not None:
        made.add_argument("--data", default=data, help=f"as for modula-agd train (default: {data})")
    made.add_argument("--data-dir", type=Path, metavar="DIR", help="as for modula-agd train")
    made.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="one run of each cell per seed")
    made.add_argument("--epochs", type=int, metavar="N", help="in place of the size's own")
    made.add_argument("--workers", type=int, default=8, metavar="N", help="processes that read ImageNet (default: 8)")
    made.add_argument("--threads", type=int, metavar="N", help="processor threads (default: torch's choice)")
    made.add_argument("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="(default: runs/paper)")
    made.add_argument("--fresh", action="store_true", help="drop earlier runs of this figure instead of reusing them")
    return made


def start(script: Callable[[argparse.Namespace], None], made: argparse.ArgumentParser) -> int:
    """Parse, run, and end a user's mistake with one line and status 2."""
    options = made.parse_args()
    try:
        for what, least in (("epochs", 1), ("threads", 1), ("workers", 0)):
            value = getattr(options, what)
            if value is not None and value < least:
                raise InvalidArgument(f"--{what} was given {value}; it must be at least {least}")
        if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
            raise InvalidArgument(
                f"--seeds was given {options.seeds}; they must be ≥ 0 and differ, or the spread would be that of copies"
            )
        if options.threads:
            torch.set_num_threads(options.threads)
        script(options)
    # OSError: a folder that cannot be written; ImportError: a missing extra. Their texts name what is missing.
    except (ModulaError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; the finished cells are kept, and the same command goes on from them", file=sys.stderr)
        return INTERRUPTED
    return 0


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A data set, as any network may want it.

    Args:
        facts: what the images are.
        samples: training images.
        task: batches of rows (``flat``) or of images, with or without augmentation.
    """

    facts: ImageFacts
    samples: int
    task: Callable[[bool, bool], Task]


PAPERS_OWN = "cifar10"
"""On what the paper trained in figures 5 to 7; its accuracies stand beside those on no other data."""


def in_memory(data: Classification) -> Source:
    """A source from a data set that is on the device to train on."""
    return Source(data.facts, len(data.train.labels), lambda flat, augment: ImageTask(data, flat, augment))


def load(name: str, options: argparse.Namespace) -> Source:
    """The data set, on the device that ``--device`` names; ImageNet is read by ``--workers`` processes as it is needed.

    Raises:
        DataError: it is not where ``--data-dir`` says.
        InvalidArgument: there is no such device or data set.
    """
    device = usable(("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device)
    if name != IMAGENET:
        return in_memory(classification(name, options.data_dir).to(device))
    folder = image_folder(options.data_dir)
    # a stream of training images is always cropped and mirrored at random, whatever ``augment`` says
    return Source(
        folder.facts, len(folder.train.paths), lambda flat, _: StreamTask(folder, flat, options.workers, device)
    )


# -- one run -----------------------------------------------------------------------------------------------------------


def optimizer_of(cell: Cell, model: TorchModule, network: Module) -> torch.optim.Optimizer:
    """A baseline, or the ``torch.optim`` face of a method.

    Raises:
        InvalidArgument: there is none of that name.
    """
    if cell.optimizer in BASELINES:
        return BASELINES[cell.optimizer](model.parameters(), cell.lr)
    if cell.optimizer not in METHODS:
        raise InvalidArgument(
            f"there is no optimizer {cell.optimizer!r}; choose one of {', '.join((*METHODS, *BASELINES))}"
        )
    optimizer = AGD(model, METHODS[cell.optimizer](network, LOSSES[cell.loss]))
    optimizer.param_groups[0]["lr"] = cell.lr
    return optimizer


def train(cell: Cell, network: Module, source: Source, *, test: bool = True) -> dict[str, Any]:
    """Train from fresh weights, and evaluate on the held-out samples once, after the last step.

    Args:
        cell: the run.
        network: takes rows (``Features``) or images.
        source: the data.
        test: whether to look at the held-out samples.

    Returns:
        Means of the last tenth of the steps, test figures, seconds and the curve; None where not finite.
    """
    task = source.task(isinstance(network.domain, Features), cell.augment)
    model = network.to_torch(cell.seed, device=task.device)
    optimizer, loss = optimizer_of(cell, model, network), LOSSES[cell.loss]
    aim = aiming(loss, source.facts.classes, task.device)
    per_epoch = task.per_epoch(cell.batch_size)
    steps = cell.epochs * per_epoch
    record = torch.full((3, steps), math.nan, device=task.device)
    model.train()
    begun = time.perf_counter()
    for step, (inputs, labels) in zip(range(steps), task.batches(cell.batch_size, cell.seed), strict=False):
        outputs = model(inputs)
        value = loss(outputs, aim(labels))
        optimizer.zero_grad()
        value.backward()
        try:
            optimizer.step()
        except NonFiniteGradient:
            break
        record[0, step] = value.detach()
        record[1, step] = (outputs.argmax(1) == labels).float().mean()
        record[2, step] = optimizer.current.eta if isinstance(optimizer, AGD) else cell.lr
        if (step + 1) % per_epoch == 0 and not math.isfinite(float(record[0, step])):
            break
    record = record.cpu()
    seconds = time.perf_counter() - begun
    diverged = not bool(record.isfinite().all())
    last = record[:, steps - max(1, steps // 10) :].mean(1).tolist()
    evaluated = evaluation(model, task, loss, aim) if test and not diverged else (None, None)
    return {
        "train_loss": finite(last[0]),
        "train_accuracy": finite(last[1]),
        "test_loss": evaluated[0],
        "test_accuracy": evaluated[1],
        "diverged": diverged,
        "steps": steps,
        "seconds": round(seconds, 2),
        "curve": _curve(record, per_epoch),
    }


def evaluation(
    model: TorchModule, task: Task, loss: Callable[[Tensor, Tensor], Tensor], aim: Callable[[Tensor], Tensor]
) -> tuple[float | None, float | None]:
    """Mean loss and accuracy over the held-out samples."""
    model.eval()
    count, sums = 0, torch.zeros(2, device=task.device)
    with torch.no_grad():
        for inputs, labels in task.evaluation(EVALUATION_BATCH):
            outputs = model(inputs)
            sums[0] += loss(outputs, aim(labels)) * len(labels)
            sums[1] += (outputs.argmax(1) == labels).sum()
            count += len(labels)
    value, hits = (sums / count).tolist()
    return finite(value), finite(hits)


def _curve(record: Float[Tensor, "3 steps"], per_epoch: int) -> dict[str, list[float | None]]:
    """The run in at most ``POINTS`` intervals of equal length: means, and of η the least and the largest too."""
    parts = record.tensor_split(min(POINTS, record.shape[1]), dim=1)
    ends = torch.tensor([part.shape[1] for part in parts]).cumsum(0) / per_epoch
    means = torch.stack([part.mean(1) for part in parts], 1)
    rows = {
        "epoch": ends,
        "train_loss": means[0],
        "train_accuracy": means[1],
        "eta": means[2],
        "eta_min": torch.stack([part[2].min() for part in parts]),
        "eta_max": torch.stack([part[2].max() for part in parts]),
    }
    return {name: [finite(value) for value in row.tolist()] for name, row in rows.items()}


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


# -- many runs ---------------------------------------------------------------------------------------------------------


def measure(cell: Cell, network: Module, source: Source, results: Results, *, test: bool = True) -> Mapping[str, Any]:
    """The outcome of a cell: from the file if it is there, else from a run that is then written into it."""
    config = asdict(cell)
    outcome = results.outcome(config)
    if outcome is None:
        outcome = train(cell, network, source, test=test)
        results.add(config, outcome, source.task(True, False).device)
        told = "diverged" if outcome["diverged"] else f"training loss {outcome['train_loss']:.4f}"
        print(f"{cell}: {told} ({outcome['seconds']:.0f} s)", file=sys.stderr)
    return outcome


def sweep(
    start: Sequence[int], loss_at: Callable[[int], float | None], ends: tuple[int, int] = EXPONENTS
) -> tuple[int, dict[int, float | None], bool]:
    """The exponent of the least loss on a grid that grows until its best is interior.

    Args:
        start: consecutive exponents to begin with; a single one is a fixed setting, and not swept.
        loss_at: mean training loss at an exponent, None if a run diverged.
        ends: how far the grid may grow.

    Returns:
        The best exponent, every loss looked at in ascending order, and whether the best is interior.
    """
    losses = {exponent: loss_at(exponent) for exponent in start}

    def order(exponent: int) -> tuple[float, int]:
        value = losses[exponent]
        # where everything diverges, the smallest rate leads the search downwards
        return (math.inf if value is None else value), exponent

    while True:
        best, low, high = min(losses, key=order), min(losses), max(losses)
        further = {low: low - 1, high: high + 1}.get(best)
        if len(start) == 1 or further is None or not ends[0] <= further <= ends[1]:
            return best, dict(sorted(losses.items())), low < best < high
        losses[further] = loss_at(further)


def rate(exponent: int) -> float:
    """10^(exponent/2): the grid of powers of sqrt(10)."""
    return 10.0 ** (exponent / 2)
