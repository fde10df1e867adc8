"""Micro-batches: every second gradient makes the direction fresher, and the others measure the descent along it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.exchange import ALONE, Exchange
from modula_agd.method import Method
from modula_agd.polar import working_dtype
from modula_agd.state import State


class MicroBatches:
    """The gradients of the micro-batches since the last step, added up in two halves.

    Attributes:
        sums: of the 1st, 3rd, ... micro-batch, which measure, and of the 2nd, 4th, ..., which make the direction.
        count: how many there have been.
        reduced: whether the gradients of all were those of every process.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget them."""
        self.sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self.count, self.reduced = 0, True

    def take(self, gradients: Mapping[str, Tensor], *, reduced: bool = True) -> None:
        """Add a micro-batch.

        Args:
            gradients: of its mean loss.
            reduced: whether they are the mean over all processes, or this one's own.

        Raises:
            InvalidArgument: it has gradients of other parameters than the first; nothing was added.
        """
        first = self.sums[0]
        if self.count and gradients.keys() != first.keys():
            odd = ", ".join(map(repr, sorted(gradients.keys() ^ first.keys())))
            raise InvalidArgument(
                f"accumulate() met other parameters with a gradient than in the first micro-batch: {odd}. Let every micro-batch of a "
                "step use the same parameters, or start anew with discard()."
            )
        mine = self.sums[self.count % 2]
        for name, gradient in gradients.items():
            # sums of many half-precision gradients would stand still
            wide = gradient.to(working_dtype(gradient.dtype))
            mine[name] = mine[name].add_(wide) if name in mine else wide.clone()
        self.count, self.reduced = self.count + 1, self.reduced and reduced

    def gathered(
        self,
        method: Method,
        state: State,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor | None],
        exchange: Exchange = ALONE,
    ) -> tuple[dict[str, Tensor | None], State, float]:
        """The gradient that measures, the state whose directions have seen the others, and the share that measures.

        Args:
            method: whose step follows.
            state: before the step.
            params: every parameter of the network.
            grads: what ``backward`` left since the last micro-batch was taken.
            exchange: the other processes.

        Raises:
            InvalidArgument: there are both micro-batches and gradients left.
        """
        if not self.count:
            return dict(grads), state, 1.0
        left = [name for name, gradient in grads.items() if gradient is not None]
        if left:
            raise InvalidArgument(
                f"step() met gradients of {', '.join(left)} after accumulate(), and gave up the micro-batches. Call accumulate() after "
                "every backward(), the last one too."
            )
        if not self.reduced:
            self.sums = (exchange.means(self.sums[0]), exchange.means(self.sums[1]))
        many = ((self.count + 1) // 2, self.count // 2)
        measuring, making = (
            {name: (total / count).to(params[name].dtype) for name, total in part.items()}
            for part, count in zip(self.sums, many, strict=True)
        )
        part = many[0] / self.count
        if not making or method.momentum is None:
            mean = {name: part * g + (1 - part) * making[name] if making else g for name, g in measuring.items()}
            return {**grads, **mean}, state, 1.0
        if method.skips or state.t.device.type != "cpu":
            # what spoils one half leaves the whole step out
            good = torch.stack([x.isfinite().all() for x in making.values()]).all()
            measuring = {name: torch.where(good, g, torch.nan) for name, g in measuring.items()}
        return {**grads, **measuring}, method.absorb(making, state, params, 1 - part, exchange=exchange), part
