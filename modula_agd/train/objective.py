"""The losses that ``--loss`` names, and the targets that each takes."""

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
