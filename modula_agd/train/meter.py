"""Means of loss and accuracy over batches."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Meter:
    """Sums of loss and hits, kept on the device so that a step waits for nothing.

    Args:
        count: what has been counted.
        sums: of losses and of hits; None before the first.
    """

    count: int = 0
    sums: Float[Tensor, " 2"] | None = None

    def plus(
        self, loss: Float[Tensor, ""], outputs: Float[Tensor, "batch *time classes"], labels: Int[Tensor, "batch *time"]
    ) -> "Meter":
        """The same with a batch more.

        Args:
            loss: its mean loss.
            outputs: the network's; the largest is its prediction.
            labels: the right predictions.
        """
        count = labels.numel()
        hits = (outputs.argmax(-1) == labels).sum()
        return self.joined(Meter(count, torch.stack((loss.detach().float() * count, hits.float()))))

    def joined(self, other: "Meter") -> "Meter":
        """What both have counted."""
        if self.sums is None or other.sums is None:
            return other if self.sums is None else self
        return Meter(self.count + other.count, self.sums + other.sums)

    def means(self) -> tuple[float | None, float | None]:
        """Mean loss (None where not finite) and the share of right predictions; waits for the device."""
        if self.sums is None:
            return None, None
        loss, hits = self.sums.tolist()
        return finite(loss / self.count), hits / self.count


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
