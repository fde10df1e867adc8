"""The losses that ``--loss`` names, and the targets that each takes."""

from collections.abc import Callable

import torch
from jaxtyping import Int, Num
from torch import Tensor

from modula_agd import CrossEntropy, Loss, SquareLoss, UnhalvedSquareLoss, one_hot

LOSSES: dict[str, Loss] = {
    "cross-entropy": CrossEntropy(),
    "square": SquareLoss(),
    "unhalved-square": UnhalvedSquareLoss(),
}


def targets(loss: Loss, labels: Int[Tensor, " batch"], classes: int) -> Num[Tensor, "batch *target"]:
    """What ``loss`` compares the outputs with: the labels themselves, or one-hot rows of RMS 1 for a square loss.

    Args:
        loss: one of ``LOSSES``.
        labels: class indices.
        classes: number of classes.
    """
    return labels if isinstance(loss, CrossEntropy) else one_hot(labels, classes)


def aiming(
    loss: Loss, classes: int, device: torch.device | str
) -> Callable[[Int[Tensor, "batch *time"]], Num[Tensor, "batch *target"]]:
    """``targets`` of one batch after another, which looks at no label and so waits for no device.

    Args:
        loss: one of ``LOSSES``.
        classes: number of classes; every label lies below it.
        device: of the labels.
    """
    rows = targets(loss, torch.arange(classes), classes).to(device)
    return (lambda labels: labels) if rows.ndim == 1 else (lambda labels: rows[labels])
