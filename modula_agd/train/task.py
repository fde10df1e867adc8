"""A task: where the batches of a run come from, whatever the data are."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Num
from torch import Tensor

from modula_agd.train.facts import Facts


class Batch(NamedTuple):
    """What a network is shown at once, on the task's device.

    Args:
        inputs: in the network's domain.
        labels: what it should answer: a class of each sample, or a character at each time.
    """

    inputs: Num[Tensor, "batch *shape"]
    labels: Int[Tensor, "batch *time"]


@runtime_checkable
class Task(Protocol):
    """Batches to learn from without end, and batches held out. Final implementations are frozen dataclasses."""

    @property
    def facts(self) -> Facts:
        """What the data are."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches arrive."""
        ...

    @property
    def held_out(self) -> str:
        """What the held-out split is called: "test", "validation" or "set-apart"."""
        ...

    def per_epoch(self, batch_size: int) -> int:
        """Batches that make one pass over the training data, ≥ 1."""
        ...

    def shown(self, batch_size: int) -> int:
        """Samples (or windows) that a batch really has: no more than there are."""
        ...

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Training batches without end, the same for equal arguments.

        Args:
            batch_size: samples (or windows) per batch, ≥ 1; all there are where there are fewer.
            seed: from 0 to 2⁶³ − 1.
            start: batches to leave out, ≥ 0: the others come as they would have come behind them. Only a run that goes on from a
                checkpoint passes it.
        """
        ...

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """The held-out samples, each once and the same ones every time."""
        ...

    def __str__(self) -> str:
        """Sizes of both splits and the shape of a sample, for people."""
        ...


def fingerprint(task: Task) -> str | None:
    """What tells the data of a task from others, if it has a ``fingerprint``, as all have that ``task`` opens."""
    return getattr(task, "fingerprint", None)
