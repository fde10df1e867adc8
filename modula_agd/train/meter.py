"""Means of loss and accuracy over batches."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Meter:
    """Sums of loss and hits, kept on the device so that a step waits for nothing."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: Float[Tensor, " 2"] | None = None

    def add(
        self, loss: Float[Tensor, ""], outputs: Float[Tensor, "batch *time classes"], labels: Int[Tensor, "batch *time"]
    ) -> None:
        """Count a batch.

        Args:
            loss: its mean loss.
            outputs: the network's; the largest is its prediction.
            labels: the right predictions.
        """
        count = labels.numel()
        hits = (outputs.argmax(-1) == labels).sum()
        sums = torch.stack((loss.detach().float() * count, hits.float()))
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += count

    def means(self) -> tuple[float | None, float | None]:
        """Mean loss (None where not finite) and the share of right predictions; waits for the device."""
        if self._sums is None:
            return None, None
        loss, hits = self._sums.tolist()
        return finite(loss / self._count), hits / self._count


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
