"""The tasks of the study: network, loss, data and budget of each. Nothing here depends on the optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modula_agd import GPT, MLP, CrossEntropy, Logits, Loss, Module, ResNet8, SquareLoss
from modula_agd.train import Task, task


@dataclass(frozen=True)
class Benchmark:
    """One task.

    Args:
        about: network and data, in words.
        data: as ``modula_agd.train.task`` names it.
        flat: whether images are rows.
        network: for the number of classes, and multiples of the task's own width and depth.
        loss: what is minimised.
        unit: the reported loss is this multiple of ``loss``; 2 for the mean of (f − y)², of which ``SquareLoss`` is half.
        batch: samples (or windows) per step.
        epochs: budget in passes over the training data, or 0.
        steps: budget in steps where ``epochs`` is 0.
    """

    about: str
    data: str
    flat: bool
    network: Callable[[int, int, int], Module]
    loss: Loss
    unit: float
    batch: int
    epochs: int = 0
    steps: int = 0

    def source(self, folder: Path | None, device: str) -> Task:
        """The data, on the device."""
        return task(self.data, None if self.data == "digits" else folder, flat=self.flat, device=device)

    def budget(self, source: Task, batch: int) -> int:
        """Steps of a full run with batches of this size."""
        return self.epochs * source.per_epoch(batch) if self.epochs else self.steps


def _mlp(hidden: tuple[int, int, int], outputs: int, width: int, depth: int) -> Module:
    features, own_width, own_depth = hidden
    return MLP(Logits(outputs), own_width * width, features, own_depth * depth)


def _fcn(outputs: int, width: int, depth: int) -> Module:
    return MLP(outputs, 256 * width, 3072, 8 * depth)


def _cnn(outputs: int, width: int, depth: int) -> Module:
    return ResNet8(Logits(outputs), width=16 * width, depth=depth)


def _gpt(outputs: int, width: int, depth: int) -> Module:
    return GPT(outputs, 128 * width, 4, 4 * depth, 64)


TASKS: dict[str, Benchmark] = {
    "digits": Benchmark("MLP 64-128-128-10", "digits", True, partial(_mlp, (64, 128, 3)), CrossEntropy(), 1, 64, 30),
    "mnist": Benchmark("MLP 784-512-512-10", "mnist", True, partial(_mlp, (784, 512, 3)), CrossEntropy(), 1, 128, 5),
    "fcn": Benchmark("bias-free FCN, depth 8, width 256, CIFAR-10", "cifar10", True, _fcn, SquareLoss(), 2, 128, 5),
    "cnn": Benchmark("ResNet, 16-32-64 channels, CIFAR-10", "cifar10", False, _cnn, CrossEntropy(), 1, 128, 5),
    "chargpt": Benchmark(
        "GPT, 4 blocks, width 128, context 64", "shakespeare", True, _gpt, CrossEntropy(), 1, 12, 0, 2000
    ),
}
