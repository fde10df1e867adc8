"""The tasks of the study: network, loss, data and budget of each. Nothing here depends on the optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modula_agd import GPT, MLP, VGG16, CrossEntropy, Logits, Loss, Module, ResNet, ResNet8, SquareLoss
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
        augment: whether training images are shifted and mirrored.
        context: characters of a window, of text alone.
        half: whether to compute in bfloat16 what autocast takes to it.
        looks: times that the held-out split is read along the way, besides the end.
        large: whether it takes an accelerator.
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
    augment: bool = False
    context: int | None = None
    half: bool = False
    looks: int = 0
    large: bool = False

    def source(self, folder: Path | None, device: str) -> Task:
        """The data, on the device."""
        options = {"augment": True} if self.augment else {} if self.context is None else {"context": self.context}
        return task(self.data, None if self.data == "digits" else folder, flat=self.flat, device=device, **options)

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


def _large_gpt(outputs: int, width: int, depth: int) -> Module:
    # the sizes and the dropout of nanoGPT's configuration for this text
    return GPT(outputs, 384 * width, 6, 6 * depth, 256, dropout=0.2)


def _resnet18(outputs: int, width: int, depth: int) -> Module:
    # the plain sum, as the architecture has it: ahead of the convex form in trials of a narrow one (docs/trials.md)
    return ResNet(Logits(outputs), width=64 * width, blocks=(2 * depth,) * 4, form="sum")


def _vgg16(outputs: int, width: int, _depth: int) -> Module:
    return VGG16(Logits(outputs), width=64 * width)


TASKS: dict[str, Benchmark] = {
    "digits": Benchmark("MLP 64-128-128-10", "digits", True, partial(_mlp, (64, 128, 3)), CrossEntropy(), 1, 64, 30),
    "mnist": Benchmark("MLP 784-512-512-10", "mnist", True, partial(_mlp, (784, 512, 3)), CrossEntropy(), 1, 128, 5),
    "fcn": Benchmark("bias-free FCN, depth 8, width 256, CIFAR-10", "cifar10", True, _fcn, SquareLoss(), 2, 128, 5),
    "cnn": Benchmark("ResNet, 16-32-64 channels, CIFAR-10", "cifar10", False, _cnn, CrossEntropy(), 1, 128, 5),
    "chargpt": Benchmark(
        "GPT, 4 blocks, width 128, context 64", "shakespeare", True, _gpt, CrossEntropy(), 1, 12, 0, 2000, context=64
    ),
    "resnet18": Benchmark(
        "ResNet-18, CIFAR-10",
        "cifar10",
        False,
        _resnet18,
        CrossEntropy(),
        1,
        128,
        60,
        augment=True,
        half=True,
        large=True,
    ),
    "vgg16": Benchmark(
        "VGG-16, CIFAR-10", "cifar10", False, _vgg16, CrossEntropy(), 1, 128, 60, augment=True, half=True, large=True
    ),
    "chargpt-large": Benchmark(
        "GPT, 6 blocks, width 384, context 256",
        "shakespeare",
        True,
        _large_gpt,
        CrossEntropy(),
        1,
        64,
        0,
        5000,
        context=256,
        half=True,
        looks=20,
        large=True,
    ),
}
USUAL = [name for name, benchmark in TASKS.items() if not benchmark.large]
"""The tasks that a CPU can run."""
