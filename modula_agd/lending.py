"""Averaged weights of an optimizer: kept beside the weights, and lent to the model without a mode to forget."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from modula_agd.averaging import average_
from modula_agd.error import InvalidArgument
from modula_agd.grouped import Grouped
from modula_agd.placement import local, reshard


class Lending(Grouped):
    """An optimizer that keeps averaged weights where ``averaging`` is true."""

    def _averages(self) -> dict[str, Tensor]:
        """The averages that there are, by name; none where none are kept."""
        if not self.averaging:
            return {}
        begun = {name: entry for name, entry in self._entries().items() if entry.get("begun")}
        statistics = self.param_groups[0]["agd"]["buffers"] if begun else {}
        return {**{name: entry["average"] for name, entry in begun.items() if "average" in entry}, **statistics}

    def _renew_average(self) -> None:
        if not self.averaging:
            return
        numbers, live = self.param_groups[0]["agd"], {**self._trained(), **self._statistics()}
        for name, value in self._statistics().items():
            numbers["buffers"].setdefault(name, value.clone())
        average = self._averages()
        device = self.capturable or torch.compiler.is_compiling()
        count = numbers["steps"] if device else int(numbers["clock"])
        held = {name: local(value) for name, value in average.items()}
        average_(held, {name: local(live[name]) for name in average}, count)

    def averaged_state(self) -> dict[str, Tensor]:
        """The averaged weights and running statistics by name, as the network's ``load_state_dict`` takes them: a copy.

        Raises:
            InvalidArgument: the optimizer keeps none.
        """
        if not self.averaging:
            raise InvalidArgument(
                "averaged weights were asked for, but AGD keeps none: averaging is False, or left out without momentum. "
                "Build it with averaging=True."
            )
        average = self._averages()
        live = {**self._parameters(), **self._statistics()}
        return {
            name: average.get(name, value).detach().to(value.device, value.dtype, copy=True)
            for name, value in live.items()
        }

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the model holds the averaged weights, to evaluate or to save; the live ones return at its end.

        Raises:
            InvalidArgument: as ``averaged_state``, or inside another such block.
        """
        if self._now.swapped:
            raise InvalidArgument("averaged() was entered inside averaged(). Leave the first block before.")
        mean, live = self.averaged_state(), {**self._parameters(), **self._statistics()}
        kept = {name: value.detach().clone() for name, value in live.items()}
        with torch.no_grad():
            for name, value in live.items():
                value.copy_(mean[name])
        reshard(self._inner)
        self._now.swapped = True
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in live.items():
                    value.copy_(kept[name])
            reshard(self._inner)
            self._now.swapped = False
